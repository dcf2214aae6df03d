"""What the front's extra hop costs an online request: fake engine directly, and through the front.

python benchmark/batch/proxy_hop.py --json benchmark/results/batch-proxy.json
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import httpx

sys.path.insert(0, str(Path(__file__).parents[2] / "test" / "batch"))

from front_server import FrontServer

from blendserve.cli.engine_process import WatchSettings

PATH = "/v1/chat/completions"
BODY = {"model": "fake-model", "messages": [{"role": "user", "content": "x" * 1_000}]}


async def measure(url: str, headers: dict[str, str], requests: int, at_once: int) -> dict[str, Any]:
    """Latency one by one, and requests per second with several at once."""
    async with httpx.AsyncClient(base_url=url, headers=headers, timeout=60) as client:

        async def one() -> float:
            began = time.perf_counter()
            answer = await client.post(PATH, json=BODY)
            answer.raise_for_status()
            return time.perf_counter() - began

        for _ in range(50):
            await one()
        alone = [await one() for _ in range(requests // 4)]
        gate = asyncio.Semaphore(at_once)

        async def gated() -> float:
            async with gate:
                return await one()

        began = time.perf_counter()
        await asyncio.gather(*(gated() for _ in range(requests)))
        seconds = time.perf_counter() - began
    return {
        "median_ms": 1_000 * statistics.median(alone),
        "p95_ms": 1_000 * statistics.quantiles(alone, n=20)[-1],
        "requests_per_second": requests / seconds,
    }


def serve(folder: str) -> None:
    """A front and its engine; prints how to reach both, and serves until stdin is closed."""
    with FrontServer(Path(folder), watch=WatchSettings()) as server:
        server.wait_until_up()
        address = server.front.executor.address
        assert address is not None
        ways = {"engine": (address.url, address.headers), "front": (server.url, {})}
        print(json.dumps(ways), flush=True)
        sys.stdin.read()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--requests", type=int, default=2_000)
    parser.add_argument("--at-once", type=int, default=32)
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    result: dict[str, Any] = {
        "requests": options.requests,
        "at_once": options.at_once,
        "load_average": os.getloadavg(),
    }
    with tempfile.TemporaryDirectory() as name:
        # A process of its own, as it is where it serves: client and front share no interpreter.
        front = subprocess.Popen(
            [sys.executable, __file__, "serve", name],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        assert front.stdin is not None
        assert front.stdout is not None
        try:
            ways = json.loads(front.stdout.readline())
            for way, (url, headers) in ways.items():
                result[way] = asyncio.run(measure(url, headers, options.requests, options.at_once))
        finally:
            front.stdin.close()
            front.wait()
    text = json.dumps(result, indent=2)
    print(text)
    if options.json:
        options.json.write_text(text + "\n")


if __name__ == "__main__":
    if sys.argv[1:2] == ["serve"]:
        serve(sys.argv[2])
    else:
        main()
