"""SGLang's overlap loop, mixed steps, pages and tensor parallelism, with our scheduler inside.

    python test/end_to_end/overlap_engines.py [--log FILE]       # or: make test-overlap

The GPU's defaults on the CPU engine: one engine after the other answers the same requests, planned
ones of both sides and online ones. Some are aborted on the way, and some sides have so little KV
memory that requests are retracted. Greedy tokens must be those of stock SGLang without any of it;
what was aborted must have said the same until then. Each engine takes about half a minute, so this
is no part of `make test`.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tiny_model import build

AMPLE_TOKENS, SCARCE_TOKENS = 16_000, 1_000
ABORT_AFTER = 5  # tokens
LIMIT_SECONDS = 600


@dataclass(frozen=True)
class Side:
    """One engine: what differs from stock SGLang, one step after the other."""

    name: str
    blended: bool = True
    overlap: bool = True
    page: int = 1
    ranks: int = 1
    tokens: int = AMPLE_TOKENS


SIDES = (
    Side("stock", blended=False, overlap=False),
    Side("no-overlap", overlap=False),
    Side("overlap"),
    Side("overlap-page-16", page=16),
    Side("overlap-page-64", page=64),
    Side("overlap-scarce", tokens=SCARCE_TOKENS),
    Side("overlap-scarce-page-16", page=16, tokens=SCARCE_TOKENS),
    Side("overlap-tp-2", ranks=2),
    Side("overlap-scarce-tp-2", ranks=2, tokens=SCARCE_TOKENS),
)


def requests() -> list[dict[str, Any]]:
    """24 short answers under 4 prefixes, 12 long ones of which 3 are aborted, 4 online."""
    import numpy as np

    rng = np.random.default_rng(0)
    made: list[dict[str, Any]] = []

    def add(prompt: list[int], produced: int, side: str | None, aborted: bool = False) -> None:
        made.append({"prompt": prompt, "tokens": produced, "side": side, "aborted": aborted})

    for _ in range(4):
        prefix = rng.integers(10, 2_000, 96).tolist()
        for _ in range(6):
            own = rng.integers(10, 2_000, int(rng.integers(20, 120))).tolist()
            add(prefix + own, int(rng.integers(2, 10)), "left")
    for number in range(12):
        prompt = rng.integers(10, 2_000, int(rng.integers(10, 60))).tolist()
        add(prompt, 120, "right", aborted=number % 4 == 0)
    for _ in range(4):
        add(rng.integers(10, 2_000, 40).tolist(), 20, None)
    return made


def sampling(number: int, asked: dict[str, Any], blended: bool) -> dict[str, Any]:
    params = {"temperature": 0, "max_new_tokens": asked["tokens"], "ignore_eos": True}
    if not blended or asked["side"] is None:
        return params
    from blendserve.planner import Side as ScanSide
    from blendserve.runtime.plan_tag import PlanTag

    left = asked["side"] == "left"
    tag = PlanTag(
        side=ScanSide.LEFT if left else ScanSide.RIGHT,
        rank=number,
        density=5.0 if left else 0.2,
        # Half of what they will be: memory runs out where it is scarce.
        output_tokens=asked["tokens"] * (1.0 if left else 0.5),
        compute_seconds=0.1,
        memory_seconds=0.02 if left else 0.5,
    )
    return {**params, "custom_params": tag.to_params()}


async def answer(engine: Any, number: int, asked: dict[str, Any], blended: bool) -> list[int]:
    """The output tokens; of an aborted request those until it was."""
    got: list[int] = []
    stream = await engine.async_generate(
        input_ids=asked["prompt"], sampling_params=sampling(number, asked, blended),
        rid=f"r{number}", stream=True,
    )  # fmt: skip
    async for part in stream:
        got = list(part["output_ids"])
        if asked["aborted"] and len(got) >= ABORT_AFTER:
            engine.tokenizer_manager.abort_request(f"r{number}")
    return got


def serve(side: Side, model: str, output: str) -> None:
    """One engine, in a process of its own."""
    from blendserve.runtime import cpu_platform

    cpu_platform.activate()
    import sglang

    asked = requests()
    engine = sglang.Engine(
        model_path=model, skip_tokenizer_init=True, device="cpu",
        dtype="float32", max_total_tokens=side.tokens, max_running_requests=64,
        mem_fraction_static=0.1, chunked_prefill_size=128, schedule_policy="fcfs",
        attention_backend="blend" if side.blended else "torch_native",
        enable_mixed_chunk=side.blended, disable_overlap_schedule=not side.overlap,
        page_size=side.page, tp_size=side.ranks, log_level="warning", random_seed=1,
        **({"radix_cache_backend": "blendserve"} if side.blended else {}),
    )  # fmt: skip

    async def all_answers() -> list[list[int]]:
        return await asyncio.gather(
            *(answer(engine, n, a, side.blended) for n, a in enumerate(asked))
        )

    answers = engine.loop.run_until_complete(all_answers())
    (live,) = engine.get_server_info()["internal_states"]
    overlaps = not live["disable_overlap_schedule"]
    Path(output).write_text(json.dumps({"answers": answers, "overlaps": overlaps}))
    engine.shutdown()


def traced(path: Path) -> dict[str, int]:
    """Sums over the steps of a run."""
    rows = [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []
    mixed = sum(bool(row["prefill_tokens"] and row["decode_requests"]) for row in rows)
    prefilled = sum(row["prefill_tokens"] for row in rows)
    decoded = sum(row["decode_requests"] for row in rows)
    return {"steps": len(rows), "mixed": mixed, "prefilled": prefilled, "decoded": decoded}


def faults(answers: list[list[int]], expected: list[list[int]]) -> list[str]:
    """What of a side's answers is not what stock SGLang says."""
    found = []
    for number, (asked, got, want) in enumerate(zip(requests(), answers, expected, strict=True)):
        if asked["aborted"]:
            shared = min(len(got), len(want))
            if got[:shared] != want[:shared] or len(got) < ABORT_AFTER:
                found.append(f"r{number} (aborted) says something else")
            elif len(got) >= asked["tokens"]:
                found.append(f"r{number} was answered to its end, not aborted")
        elif got != want:
            found.append(f"r{number} says something else")
        elif len(got) != asked["tokens"]:
            found.append(f"r{number} has {len(got)} tokens of {asked['tokens']}")
    return found


def not_tried(side: Side, counts: dict[str, int], overlaps: bool) -> list[str]:
    """What a side is there for and did not do: equal tokens would then say nothing."""
    found = []
    if overlaps is not side.overlap:
        found.append(f"its steps are {'' if overlaps else 'not '}overlapped")
    if side.blended and not counts["mixed"]:
        found.append("no step was mixed")
    if side.tokens == SCARCE_TOKENS and not counts["retractions"]:
        found.append("nothing was retracted")
    return found


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--sides", nargs="+", default=[side.name for side in SIDES])
    parser.add_argument("--log", type=Path)
    parser.add_argument("--serve", nargs=3, help=argparse.SUPPRESS)
    options = parser.parse_args()
    by_name = {side.name: side for side in SIDES}
    if options.serve:
        serve(by_name[options.serve[0]], *options.serve[1:])
        return 0
    lines: list[str] = []

    def say(text: str) -> None:
        print(text, flush=True)
        lines.append(text)

    expected: list[list[int]] = []
    failed = 0
    with tempfile.TemporaryDirectory() as folder:
        # With weights on disk: dummy ones are others on each rank.
        model = build(Path(folder) / "model")
        for side in (
            by_name[name] for name in ["stock", *options.sides[options.sides[0] == "stock" :]]
        ):
            output, trace = Path(folder) / "answers.json", Path(folder) / f"{side.name}.jsonl"
            output.unlink(missing_ok=True)
            environment = {
                **os.environ,
                "BLENDSERVE_ENABLED": str(int(side.blended)),
                "BLENDSERVE_BATCH_DIR": folder,
                "OMP_NUM_THREADS": "1",
                # SGLang allocates pages of several tokens with Triton kernels.
                **({"TRITON_INTERPRET": "1"} if side.page > 1 else {}),
                # Our admission leaves no need to retract: SGLang is told to, now and then.
                **({"SGLANG_TEST_RETRACT": "1"} if side.tokens == SCARCE_TOKENS else {}),
                # It wants a NUMA node for each rank, or to be told the cores.
                **({"SGLANG_CPU_OMP_THREADS_BIND": "0|1"} if side.ranks > 1 else {}),
                **({"BLENDSERVE_TRACE_FILE": str(trace)} if side.blended else {}),
            }
            command = [sys.executable, __file__, "--serve", side.name, str(model), str(output)]
            start = time.monotonic()
            try:
                done = subprocess.run(
                    command, env=environment, timeout=LIMIT_SECONDS, text=True,
                    stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, start_new_session=True,
                )  # fmt: skip
                ended = f"status {done.returncode}: {done.stderr.strip()[-600:]}"
            except subprocess.TimeoutExpired:
                ended = f"did not end in {LIMIT_SECONDS} s"
            if not output.exists():
                say(f"{side.name}: no answers; {ended}")
                failed += 1
                continue
            said = json.loads(output.read_text())
            answers = said["answers"]
            if side.name == "stock":
                expected = answers
            wrong = faults(answers, expected)
            equal = len(answers) - len(wrong)
            counts = {"produced": sum(map(len, answers)), **traced(trace)}
            counts["retractions"] = done.stderr.count("#retracted_reqs")
            wrong += not_tried(side, counts, said["overlaps"])
            # A prefill brings a request's first token; the client of an aborted one may miss one.
            decoded = counts["produced"] - len(answers)
            uncounted = not side.blended or counts["retractions"]
            if not uncounted and abs(counts["decoded"] - decoded) > sum(
                r["aborted"] for r in requests()
            ):
                wrong.append(f"{counts['decoded']} decode tokens are counted, {decoded} were made")
            say(
                f"{side.name}: {equal} of {len(answers)} as stock, "
                f"{counts}, {time.monotonic() - start:.0f} s"
            )
            for text in wrong:
                say(f"  {text}")
            failed += bool(wrong)
    say(f"{failed} sides with faults")
    if options.log:
        options.log.write_text("\n".join(lines) + "\n")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
