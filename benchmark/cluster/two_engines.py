"""One plan over two engines, beside one engine with as much KV memory; then one of them is killed.

    python benchmark/cluster/two_engines.py [--lines 800] [--kv-tokens 8192] [--model NAME]

Without --model the engines run a tiny model with random weights (test/end_to_end/tiny_model.py), in
float32. All run through the front's Batch API. Engines are `blendserve engine`, the coordinator is
what `blendserve serve --engine-urls` starts. About four minutes on two idle cores.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import random
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx

from blendserve.cli.server_process import die_with_parent, free_port

ROOT = Path(__file__).parents[2]
sys.path += [str(ROOT / "benchmark"), str(ROOT / "test" / "end_to_end")]

import tiny_model  # noqa: E402
from record import save  # noqa: E402

FAMILIES = 40
START_SECONDS = 400.0
JOB_SECONDS = 900.0
# The front asks the coordinator this often at most.
_OLDEST_STATUS_SECONDS = 1.0
WORDS = ("river", "stone", "light", "morning", "garden", "winter", "letter", "bread", "silver")


def write_job(path: Path, lines: int, seed: int) -> None:
    """Families with a long common beginning, shuffled; every eighth line has a long answer."""
    chance = random.Random(seed)
    beginnings = [" ".join(chance.choices(WORDS, k=180)) for _ in range(FAMILIES)]
    bodies = [
        {
            "model": "tiny",
            "prompt": f"{beginnings[n % FAMILIES]} {' '.join(chance.choices(WORDS, k=12))} {n}",
            "max_tokens": 48 if n % 8 == 0 else 6,
            "temperature": 0,
        }
        for n in range(lines)
    ]
    chance.shuffle(bodies)
    with path.open("w") as file:
        for number, body in enumerate(bodies):
            line = {"custom_id": f"line-{number}", "method": "POST", "url": "/v1/completions"}
            file.write(json.dumps({**line, "body": body}) + "\n")


@contextlib.contextmanager
def process(command: list[str], log: Path) -> Iterator[subprocess.Popen[bytes]]:
    environment = {**os.environ, "OMP_WAIT_POLICY": "passive", "OMP_NUM_THREADS": "1"}
    with log.open("wb") as output:
        child = subprocess.Popen(
            command,
            stdout=output,
            stderr=subprocess.STDOUT,
            env=environment,
            start_new_session=True,
            preexec_fn=die_with_parent,
        )
    try:
        yield child
    finally:
        child.terminate()
        with contextlib.suppress(subprocess.TimeoutExpired):
            child.wait(30)
        kill_group(child)
        child.wait(30)


def kill_group(child: subprocess.Popen[bytes]) -> None:
    with contextlib.suppress(ProcessLookupError):
        os.killpg(child.pid, signal.SIGKILL)


class Servers:
    """K engines, and the front and the coordinator before them."""

    def __init__(self, folder: Path, model: str, kv_tokens: int, engines: int) -> None:
        self._folder, self._model = folder, model
        self._kv_tokens, self._engines = kv_tokens, engines
        self._stack = contextlib.ExitStack()

    def __enter__(self) -> Servers:
        key = self._folder / "key"
        key.write_text("a-key-for-a-benchmark-only\n")
        program = [sys.executable, "-m", "blendserve"]
        ports = [free_port() for _ in range(self._engines)]
        self.children = [
            self._stack.enter_context(
                process(
                    [
                        *(*program, "engine", "--cluster-key-file", str(key), "--port", str(port)),
                        *("--model-path", self._model, "--served-model-name", "tiny"),
                        *("--device", "cpu", "--dtype", "float32"),
                        *("--max-total-tokens", str(self._kv_tokens)),
                    ],
                    self._folder / f"engine-{port}.log",
                )
            )
            for port in ports
        ]
        port = free_port()
        self.url = f"http://127.0.0.1:{port}"
        urls = ",".join(f"http://127.0.0.1:{port}" for port in ports)
        self._stack.enter_context(
            process(
                [
                    *(*program, "serve", "--engine-urls", urls, "--cluster-key-file", str(key)),
                    *("--min-engines", str(self._engines), "--port", str(port)),
                    *("--batch-dir", str(self._folder / f"batches-{port}")),
                ],
                self._folder / f"front-{port}.log",
            )
        )
        self.http = httpx.Client(base_url=self.url, timeout=30, trust_env=False)
        self.wait(lambda: self.status()["engine"]["state"] == "up", START_SECONDS)
        return self

    def __exit__(self, *_: object) -> None:
        self._stack.close()

    def wait(self, condition: Any, seconds: float) -> None:
        deadline = time.monotonic() + seconds
        while time.monotonic() < deadline:
            with contextlib.suppress(httpx.HTTPError):
                if condition():
                    return
            time.sleep(0.2)
        raise SystemExit(f"gave up after {seconds:.0f} s; logs in {self._folder}")

    def status(self) -> dict[str, Any]:
        return self.http.get("/blendserve/status").json()

    def run(self, job: Path, kill_at: int | None = None) -> dict[str, Any]:
        """The job's answers by custom_id, and figures."""
        time.sleep(_OLDEST_STATUS_SECONDS)
        before = self._answered()
        began = time.monotonic()
        with job.open("rb") as file:
            uploaded = self.http.post(
                "/v1/files", files={"file": file}, data={"purpose": "batch"}
            ).json()
        request = {
            "input_file_id": uploaded["id"],
            "endpoint": "/v1/completions",
            "completion_window": "24h",
        }
        batch = self.http.post("/v1/batches", json=request).json()
        returned = 0

        def ended() -> bool:
            nonlocal batch, returned, kill_at
            batch = self.http.get(f"/v1/batches/{batch['id']}").json()
            status = self.status()
            returned = max([returned, *(job["returned"] for job in status["jobs"])])
            if kill_at is not None and sum(self._answered()) - sum(before) >= kill_at:
                kill_group(self.children[0])
                kill_at = None
            return batch["status"] in ("completed", "failed", "expired", "cancelled")

        self.wait(ended, JOB_SECONDS)
        seconds = time.monotonic() - began
        time.sleep(_OLDEST_STATUS_SECONDS)
        text = self.http.get(f"/v1/files/{batch['output_file_id']}/content").text
        answers = [json.loads(line) for line in text.splitlines()]
        usage = [answer["response"]["body"]["usage"] for answer in answers]
        prompt = sum(each["prompt_tokens"] for each in usage)
        cached = sum(
            (each.get("prompt_tokens_details") or {}).get("cached_tokens", 0) for each in usage
        )
        shares = [now - then for now, then in zip(self._answered(), before, strict=True)]
        ids = Counter(answer["custom_id"] for answer in answers)
        return {
            "texts": {
                answer["custom_id"]: answer["response"]["body"]["choices"][0]["text"]
                for answer in answers
            },
            "figures": {
                "status": batch["status"],
                "lines": len(answers),
                "failed": batch["request_counts"]["failed"],
                "answered_twice": sum(times > 1 for times in ids.values()),
                "engine_shares": [round(share / sum(shares), 3) for share in shares],
                "lines_that_ran_again": returned,
                "prompt_tokens": prompt,
                "cached_tokens": cached,
                "hit_rate": round(cached / prompt, 4),
                "seconds": round(seconds, 1),
            },
        }

    def _answered(self) -> list[int]:
        return [engine["answered"] for engine in self.status()["engines"]]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--lines", type=int, default=800)
    parser.add_argument("--kv-tokens", type=int, default=8_192, help="of all engines together")
    parser.add_argument("--model")
    parser.add_argument("--out", type=Path, default=ROOT / "benchmark/results/two-engines.json")
    options = parser.parse_args()
    folder = Path(tempfile.mkdtemp(prefix="two-engines-"))
    model = options.model or str(tiny_model.build(folder / "tiny"))
    jobs = [folder / "job.jsonl", folder / "killed.jsonl"]
    for seed, job in enumerate(jobs):
        write_job(job, options.lines, seed)
    with Servers(folder, model, options.kv_tokens, 1) as servers:
        one = [servers.run(job) for job in jobs]
    with Servers(folder, model, options.kv_tokens // 2, 2) as servers:
        two = servers.run(jobs[0])
        killed = servers.run(jobs[1], kill_at=options.lines // 3)
        engines = servers.status()["engines"]

    def equal(mine: dict[str, Any], theirs: dict[str, Any]) -> int:
        return sum(mine["texts"].get(name) == text for name, text in theirs["texts"].items())

    result = {
        "model": options.model or "tiny, random weights",
        "lines": options.lines,
        "kv_tokens": options.kv_tokens,
        "one_engine": one[0]["figures"],
        "two_engines": two["figures"]
        | {
            "equal_to_one_engines": equal(two, one[0]),
            "hits_of_one_engines": round(
                two["figures"]["hit_rate"] / one[0]["figures"]["hit_rate"], 4
            ),
        },
        "one_of_two_killed": killed["figures"] | {"equal_to_one_engines": equal(killed, one[1])},
        "states_at_the_end": [(engine["state"], engine["losses"]) for engine in engines],
    }
    save(options.out, result)
    print(json.dumps(result, indent=1))


if __name__ == "__main__":
    main()
