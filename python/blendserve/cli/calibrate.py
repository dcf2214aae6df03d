"""``blendserve calibrate``: what this machine attains, measured, as a file for --hardware.

First the ceilings, a matrix product and a copy; then a small job of made-up tokens runs on the real
engine with a trace of its steps, from which follows what a step takes. `plan`, `simulate`, `serve`
and `run-batch` read the file.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import random
import sys
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import httpx
import numpy as np

from blendserve.cli.follow import openai_client
from blendserve.cli.server_process import ServerFailed, free_port, running_server
from blendserve.cli.stock_flags import ConfigFileError, read
from blendserve.cli.trace import TraceError, read_trace
from blendserve.planner import (
    HardwareError,
    MeasuredSteps,
    ModelSpec,
    ModelSpecError,
    StepTerms,
    UnusableSteps,
    fit_steps,
    hardware,
    model_spec,
)

MEASURED, REFUSED, INTERRUPTED, STOPPED = 0, 2, 3, 130
# (requests, prompt tokens, output tokens), at most: short chats, whose steps read the weights and
# little else; prompts without answers; long contexts that decode.
_JOB = ((16, 48, 160), (16, 24, 64), (6, 600, 2), (3, 1_600, 2), (4, 1_200, 48), (4, 400, 96))
_WARM_UP_TOKENS = 700
_FIRST_ID, _MOST_IDS = 100, 20_000
_LEAST_CONTEXT = 256
_POLL_SECONDS = 0.25
_ENDED = frozenset({"completed", "failed", "expired", "cancelled"})


class CalibrationError(RuntimeError):
    """The machine cannot be measured; the message says what to do."""


def main(argv: Sequence[str]) -> int:
    """Exit status: 0 measured; 2 wrong usage; 3 the engine failed; 130 stopped."""
    options, flags = _parse(argv)
    try:
        _calibrate(options, flags)
    except (CalibrationError, ConfigFileError, HardwareError, ModelSpecError) as error:
        print(f"blendserve calibrate: {error}", file=sys.stderr)
        return REFUSED
    except (ServerFailed, TraceError, UnusableSteps, httpx.HTTPError, OSError) as error:
        print(f"blendserve calibrate: {error}", file=sys.stderr)
        return INTERRUPTED
    except KeyboardInterrupt:
        return STOPPED
    return MEASURED


def _parse(argv: Sequence[str]) -> tuple[argparse.Namespace, list[str]]:
    parser = argparse.ArgumentParser(
        prog="blendserve calibrate",
        description="Measure this machine and a model on it; write a file for --hardware.",
        epilog="Every flag of `blendserve serve` may follow: give those that you serve with. "
        "Exit status: 0 measured; 2 wrong usage; 3 the engine failed; 130 stopped.",
        allow_abbrev=False,
    )
    parser.add_argument(
        "-o",
        "--output",
        type=Path,
        required=True,
        metavar="FILE.json",
        help="steps of other models that are in it already are kept",
    )
    return parser.parse_known_args(list(argv))


def _calibrate(options: argparse.Namespace, flags: Sequence[str]) -> None:
    from blendserve.runtime.ceilings import measure
    from blendserve.runtime.cpu_platform import best_dtype, needs_cpu_engine
    from blendserve.runtime.default_model import MODEL_NAME, ModelPathError, resolve_model_path

    target: Path = options.output
    if target.suffix != ".json" or not target.parent.is_dir() or target.is_dir():
        raise CalibrationError(
            f"-o {target}: give the name of a .json file in a folder that exists"
        )
    before = hardware(str(target)).steps if target.exists() else ()
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    parser.add_argument("--model-path", "--model", default=MODEL_NAME)
    parser.add_argument("--tp-size", "--tensor-parallel-size", "--tp", type=int, default=1)
    parser.add_argument("--dtype")
    known, _ = read(parser, flags)
    try:
        spec = model_spec(resolve_model_path(known.model_path))
    except ModelPathError as error:
        raise CalibrationError(str(error)) from error
    dtype = known.dtype or (best_dtype() if needs_cpu_engine() else "bfloat16")
    _say("measuring a matrix product and a copy ...")
    ceilings = measure("bfloat16" if dtype in ("auto", "half") else dtype)
    _say(
        f"  {ceilings.device}: {ceilings.compute_flops / 1e9:,.0f} GFLOP/s in {ceilings.dtype}, "
        f"{ceilings.bandwidth_bytes / 1e9:,.1f} GB/s"
    )
    _say(f"running a small job on the engine with {known.model_path} ...")
    terms = _engine_steps(flags, spec)
    _say(
        f"  {terms.steps:,} steps: {1e3 * terms.weight_seconds:.3g} ms at least, "
        f"{1e6 * terms.token_seconds:.3g} us a token, {1e9 * terms.context_seconds:.3g} ns a token "
        f"of context, {1e9 * terms.pair_seconds:.3g} ns a pair of a prompt; off by "
        f"{terms.mean_error:.0%} on average"
    )
    mine = _as_measured(terms, Path(known.model_path).name, spec, known.tp_size)
    _write(target, ceilings, [mine, *(old for old in before if not old.fits(spec, mine.ranks))])
    _say(f"written to {target}: give --hardware {target} to plan, simulate, serve and run-batch")


def _say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


def _as_measured(terms: StepTerms, name: str, spec: ModelSpec, ranks: int) -> MeasuredSteps:
    return MeasuredSteps(
        model=name,
        total_params=int(spec.total_params),
        layers=spec.shape.num_layers,
        ranks=ranks,
        token_seconds=terms.token_seconds,
        pair_seconds=terms.pair_seconds,
        context_seconds=terms.context_seconds,
        weight_seconds=terms.weight_seconds,
        error=terms.mean_error,
        steps=terms.steps,
    )


def _write(target: Path, ceilings: Any, steps: Sequence[MeasuredSteps]) -> None:
    content = {
        "name": ceilings.device,
        "compute_flops": ceilings.compute_flops,
        "bandwidth_bytes": ceilings.bandwidth_bytes,
        "memory_bytes": ceilings.memory_bytes,
        "source": f"blendserve calibrate: the best matrix product in {ceilings.dtype} and copy of "
        "several",
        "steps": [entry.as_json() for entry in steps],
    }
    draft = target.with_name(f".{target.name}.{os.getpid()}")
    draft.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")
    os.replace(draft, target)


# -- the job ------------------------------------------------------------------------------------


def _engine_steps(flags: Sequence[str], spec: ModelSpec) -> StepTerms:
    with tempfile.TemporaryDirectory(prefix="blendserve-calibrate-") as name:
        folder, port = Path(name), free_port()
        trace = folder / "trace.jsonl"
        command = [sys.executable, "-m", "blendserve", "serve", *flags]
        # One step after the other: a step's time is then that between two results.
        command += ["--disable-overlap-schedule", "--port", str(port)]
        command += ["--batch-dir", str(folder / "batches")]
        environment = {"BLENDSERVE_TRACE_FILE": str(trace)}
        with running_server(command, port, folder / "log", environment) as url:
            asyncio.run(_warm_up(url, spec))
            begun = len(trace.read_bytes().splitlines()) if trace.exists() else 0
            _run_job(url, folder / "job.jsonl", spec)
        return fit_steps(*_steps(trace, begun))


async def _warm_up(url: str, spec: ModelSpec) -> None:
    """The first chunk of a server's life takes over a second longer than those after it."""
    rng = random.Random(1)
    prompts = [_prompt(rng, _WARM_UP_TOKENS, spec), _prompt(rng, 8, spec)]
    async with httpx.AsyncClient(timeout=600, trust_env=False) as client:
        for prompt in prompts:
            body = {"model": await _model(client, url), "prompt": prompt, "max_tokens": 4}
            answer = await client.post(f"{url}/v1/completions", json=body)
            answer.raise_for_status()


async def _model(client: httpx.AsyncClient, url: str) -> str:
    answer = await client.get(f"{url}/v1/models")
    return str(answer.raise_for_status().json()["data"][0]["id"])


def _run_job(url: str, source: Path, spec: ModelSpec) -> None:
    source.write_text("".join(json.dumps(line) + "\n" for line in _lines(spec)))
    client = openai_client(url, {})
    upload = client.files.create(file=source, purpose="batch")
    batch = client.batches.create(
        input_file_id=upload.id, endpoint="/v1/completions", completion_window="24h"
    )
    while batch.status not in _ENDED:
        # Seldom, so that the engine is not disturbed.
        asyncio.run(asyncio.sleep(_POLL_SECONDS))
        batch = client.batches.retrieve(batch.id)
    counts = batch.request_counts
    if batch.status != "completed" or counts is None or counts.failed:
        raise CalibrationError(
            f"the job that measures has {batch.status}, {counts.failed if counts else 'all'} lines "
            "of it failed: does the model answer /v1/completions with these flags?"
        )


def _lines(spec: ModelSpec) -> Iterator[Mapping[str, Any]]:
    """Random tokens, so that nothing is found in the cache, in random order."""
    context = spec.context_length or _LEAST_CONTEXT
    rng = random.Random(0)
    shapes = [shape for shape in _JOB for _ in range(shape[0])]
    rng.shuffle(shapes)
    for number, (_, prompt, output) in enumerate(shapes):
        answer = min(output, context // 4)
        # No two alike: equal ones would start and end together.
        length = max(min(prompt, context // 2) + rng.randrange(-8, 8), 1)
        body = {
            "prompt": _prompt(rng, length, spec),
            "max_tokens": max(answer - rng.randrange(answer // 4 + 1), 1),
            "temperature": 0,
            "ignore_eos": True,
        }
        url = "/v1/completions"
        yield {"custom_id": f"c{number}", "method": "POST", "url": url, "body": body}


def _prompt(rng: random.Random, tokens: int, spec: ModelSpec) -> list[int]:
    most = min(spec.shape.vocab_size, _MOST_IDS)
    first = min(_FIRST_ID, most // 2)
    tokens = min(tokens, (spec.context_length or _LEAST_CONTEXT) // 2)
    return [rng.randrange(first, most) for _ in range(tokens)]


def _steps(trace: Path, begun: int) -> tuple[Any, Any]:
    """(n,) seconds and (n, 3) work of the steps after the first `begun`; see `fit_steps`."""
    found = read_trace(trace)[max(begun - 1, 0) :]
    work = [
        (step.prefill_tokens + step.decode_requests, step.decode_context_tokens, step.prefill_pairs)
        for step in found[1:]
    ]
    return np.diff([step.seconds for step in found]), np.array(work, dtype=np.float64)
