"""Twenty jobs in a row with aborts, cancels and clients that go away: what is left afterwards.

The real engine with a tiny model. After every job: KV tokens that are not free, requests that run
or wait, and the resident memory of every process of the server. SGLang checks its own pools, too,
whenever it is idle, and ends with an error if they leak.

    python benchmark/runtime/leaks.py [--jobs 20] [--json benchmark/results/leaks.json]
"""

from __future__ import annotations

import argparse
import json
import platform
import random
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import httpx
import psutil

sys.path.insert(0, str(Path(__file__).parents[2] / "test" / "end_to_end"))

import tiny_model
from conftest import MODEL_NAME, blend_command
from jobs import finish, submit
from openai import OpenAI
from test_blended_engine import idle_after, line, reported

from blendserve.cli.server_process import free_port, running_server

COMPLETIONS = "/v1/completions"
LINES, DROPPED = 120, 5


def one_job(url: str, client: OpenAI, number: int) -> dict[str, Any]:
    rng = random.Random(number)
    server = _Url(url)
    before = reported(server)
    prompts = [[rng.randrange(300, 900) for _ in range(rng.randint(1, 400))] for _ in range(LINES)]
    lines = [line(k, prompt, rng.randint(1, 60)) for k, prompt in enumerate(prompts)]
    batch = submit(client, lines, COMPLETIONS)
    for _ in range(DROPPED):  # Streams that nobody reads to their end.
        body = {"model": MODEL_NAME, "prompt": "river stone", "max_tokens": 500, "stream": True}
        body["ignore_eos"] = True
        with httpx.stream("POST", f"{url}{COMPLETIONS}", json=body, timeout=60) as stream:
            next(stream.iter_lines())
    if number % 2:
        client.batches.cancel(batch.id)
    batch = finish(client, batch)
    after = idle_after(server, before["steps"])
    return {
        "status": batch.status,
        "answered": batch.request_counts.completed if batch.request_counts else 0,
        "kv_tokens_not_free": after["kv_total_tokens"] - after["kv_free_tokens"],
        "left_in_queues": sum((*after["running"].values(), *after["queued"].values())),
        "resident_mb": resident_mb(),
    }


class _Url:
    def __init__(self, url: str) -> None:
        self.url = url


def resident_mb() -> dict[str, float]:
    children = psutil.Process().children(recursive=True)
    found: dict[str, float] = {}
    for child in children:
        words = child.cmdline()
        named = [word for word in words if word.startswith(("sglang::", "blendserve"))]
        name = named[0] if named else Path(words[0]).name
        found[name] = found.get(name, 0.0) + child.memory_info().rss / 2**20
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--jobs", type=int, default=20)
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        model = str(tiny_model.build(Path(name) / "tiny"))
        port = free_port()
        command = blend_command(model, port, Path(name) / "batches")
        with running_server(command, port, Path(name) / "server.log") as url:
            client = OpenAI(base_url=f"{url}/v1", api_key="unused", timeout=300, max_retries=0)
            jobs = []
            for number in range(options.jobs):
                begun = time.monotonic()
                jobs.append(one_job(url, client, number))
                print(number, f"{time.monotonic() - begun:.1f} s", jobs[-1], flush=True)
    # The first jobs fill caches and pools that stay.
    warm, last = jobs[min(4, len(jobs) - 1)]["resident_mb"], jobs[-1]["resident_mb"]
    record = {
        "command": f"python benchmark/runtime/leaks.py --jobs {options.jobs}",
        "machine": platform.platform(),
        "kv_tokens_not_free_max": max(job["kv_tokens_not_free"] for job in jobs),
        "left_in_queues_max": max(job["left_in_queues"] for job in jobs),
        "resident_mb_growth_after_five_jobs": {k: last[k] - warm.get(k, 0.0) for k in last},
        "jobs": jobs,
    }
    print(json.dumps({k: v for k, v in record.items() if k != "jobs"}, indent=1))
    if options.json:
        options.json.write_text(json.dumps(record, indent=1) + "\n")


if __name__ == "__main__":
    main()
