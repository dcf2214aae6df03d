"""Time to first token of online requests while a batch runs, beside stock SGLang.

The job, the model and the flags are those of `engine.py`. Every second a client sends one online
chat request of its own (synthetic, 32 to 128 tokens, 8 tokens of answer) and streams the answer.
Measured: on an idle server; while the batch runs on BlendServe, four times; while stock SGLang is
given the same lines and the same online requests. A step is the time between the ends of two steps
of the batch, from the scheduler's trace.

    python benchmark/runtime/online.py --json benchmark/results/online.json

Needs the data folder and a quiet machine, as `engine.py` does.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import platform
import random
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import httpx
import numpy as np
from engine import COMMON, make_lines, prefix_tree, send_all, shared_prefix_tokens
from openai import OpenAI

from blendserve.cli.follow import openai_client
from blendserve.cli.server_process import free_port, running_server
from blendserve.runtime.default_model import MODEL_NAME, resolve_model_path

JOBS = 4  # On BlendServe: one after the other, as a percentile takes many requests.
EVERY_SECONDS, IDLE_REQUESTS, ENDED = 1.0, 20, ("completed", "failed", "expired", "cancelled")
Seconds = tuple[float, float]


async def answer_seconds(client: httpx.AsyncClient, url: str, number: int) -> Seconds:
    """Time to the first token and to the end."""
    rng = random.Random(number)
    words = " ".join(f"word{rng.randrange(1000)}" for _ in range(rng.randint(10, 40)))
    body = {"model": MODEL_NAME, "max_tokens": 8, "stream": True, "temperature": 0}
    body["messages"] = [{"role": "user", "content": words}]
    begun = time.monotonic()
    async with client.stream("POST", f"{url}/v1/chat/completions", json=body) as stream:
        stream.raise_for_status()
        first = None
        async for line in stream.aiter_lines():
            if first is None and '"content":"' in line.replace('"content":""', ""):
                first = time.monotonic() - begun
    assert first is not None, "an answer without a token"
    return first, time.monotonic() - begun


async def ask_until(url: str, ended: Callable[[], bool], least: int = 0) -> list[Seconds]:
    """One online request every EVERY_SECONDS until the batch has ended."""
    asked: list[asyncio.Task[Seconds]] = []
    async with httpx.AsyncClient(timeout=600) as client:
        while len(asked) < least or not ended():
            asked.append(asyncio.create_task(answer_seconds(client, url, len(asked))))
            await asyncio.sleep(EVERY_SECONDS)
        return list(await asyncio.gather(*asked))


def run_beside(client: OpenAI, file: str, url: str) -> list[Seconds]:
    """Run the job once; times of the online requests meanwhile."""
    batch = client.batches.create(
        input_file_id=file, endpoint="/v1/completions", completion_window="24h"
    )
    state = {"status": batch.status}

    def ended() -> bool:
        state["status"] = client.batches.retrieve(batch.id).status
        return state["status"] in ENDED

    busy = asyncio.run(ask_until(url, ended))
    assert state["status"] == "completed", state
    return busy


def run_blended(lines: list[dict[str, Any]], flags: tuple[str, ...], folder: Path) -> Any:
    port, trace = free_port(), folder / "trace.jsonl"
    command = [sys.executable, "-m", "blendserve", "serve", *flags, "--port", str(port)]
    command += ["--batch-dir", str(folder / "batches")]
    source = folder / "job.jsonl"
    source.write_text("".join(json.dumps(line) + "\n" for line in lines))
    environment = {"BLENDSERVE_TRACE_FILE": str(trace)}
    with running_server(command, port, folder / "b.log", environment) as url:
        idle = asyncio.run(ask_until(url, lambda: True, IDLE_REQUESTS))
        before = len(trace.read_text().splitlines())
        client = openai_client(url, {})
        upload = client.files.create(file=source.open("rb"), purpose="batch")
        busy: list[Seconds] = []
        seconds = []
        for _ in range(JOBS):
            httpx.post(f"{url}/flush_cache", params={"timeout": 30}).raise_for_status()
            begun = time.monotonic()
            busy += run_beside(client, upload.id, url)
            seconds.append(time.monotonic() - begun)
    steps = [json.loads(line) for line in trace.read_text().splitlines()[before:]]
    ends = np.array([step["seconds"] for step in steps])
    prefill = np.array([step["prefill_tokens"] > 0 for step in steps])[1:]
    took = np.diff(ends)
    return {
        **answers(idle, busy),
        "batch_seconds": float(np.mean(seconds)),
        "step_seconds": {**summary(took.tolist()), "prefill_mean": float(took[prefill].mean())},
    }


async def stock_and_online(url: str, lines: list[dict[str, Any]]) -> tuple[list[Seconds], float]:
    begun = time.monotonic()
    batch = asyncio.create_task(send_all(url, lines))
    busy = await ask_until(url, batch.done)
    await batch
    return busy, time.monotonic() - begun


def run_stock(lines: list[dict[str, Any]], model: str, flags: tuple[str, ...], folder: Path) -> Any:
    port = free_port()
    command = [sys.executable, "-m", "sglang.launch_server", "--model-path", model, *flags]
    command += ["--served-model-name", MODEL_NAME, "--port", str(port)]
    with running_server(command, port, folder / "s.log", {"BLENDSERVE_ENABLED": "0"}) as url:
        idle = asyncio.run(ask_until(url, lambda: True, IDLE_REQUESTS))
        busy, seconds = asyncio.run(stock_and_online(url, lines))
    return {**answers(idle, busy), "batch_seconds": seconds}


def answers(idle: list[Seconds], busy: list[Seconds]) -> dict[str, Any]:
    return {
        "idle": summary([first for first, _ in idle]),
        "during_batch": summary([first for first, _ in busy]),
        "idle_whole_answer": summary([whole for _, whole in idle]),
        "during_batch_whole_answer": summary([whole for _, whole in busy]),
    }


def summary(seconds: list[float]) -> dict[str, float]:
    quantiles = {f"p{q}": float(np.quantile(seconds, q / 100)) for q in (50, 95, 99)}
    return {"count": len(seconds), "mean": float(np.mean(seconds)), **quantiles}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--pool-share", type=float, default=0.5, help="KV pool : shared prefixes")
    parser.add_argument("--without-stock", action="store_true")
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    model = resolve_model_path(MODEL_NAME)
    lines = make_lines()
    pool = int(options.pool_share * shared_prefix_tokens(prefix_tree(lines, model)))
    flags = (*COMMON, "--max-total-tokens", str(pool))
    record: dict[str, Any] = {
        "command": "python benchmark/runtime/online.py",
        "machine": platform.platform(),
        "cores": os.cpu_count(),
        "pool_tokens": pool,
    }
    with tempfile.TemporaryDirectory() as name:
        record["blendserve"] = ours = run_blended(lines, flags, Path(name))
        extra = ours["during_batch"]["p95"] - ours["idle"]["p95"]
        record["extra_p95_in_steps"] = extra / ours["step_seconds"]["p95"]
        record["extra_p95_in_prefill_steps"] = extra / ours["step_seconds"]["prefill_mean"]
        print(json.dumps(record, indent=1), flush=True)
        if not options.without_stock:
            record["stock"] = run_stock(lines, model, flags, Path(name))
            print(json.dumps(record["stock"], indent=1), flush=True)
    if options.json:
        options.json.write_text(json.dumps(record, indent=1) + "\n")


if __name__ == "__main__":
    main()
