"""vLLM's own `run-batch` on a warm-up file and then on the job, by one engine, both timed.

It runs in vLLM's environment, so it imports nothing of ours:

    python vllm_job.py WARM_UP_FILE TIMES_FILE -i INPUT -o OUTPUT --model MODEL ...
"""

from __future__ import annotations

import asyncio
import json
import sys
import time
from argparse import Namespace
from pathlib import Path

from vllm.entrypoints.launchers.api_server.entry import build_async_engine_client
from vllm.entrypoints.launchers.run_batch import parse_args, run_batch
from vllm.usage.usage_lib import UsageContext


async def main(warm_up: str, times: Path, arguments: Namespace) -> None:
    context = UsageContext.OPENAI_BATCH_RUNNER
    async with build_async_engine_client(arguments, usage_context=context) as engine:
        ready = time.monotonic()
        first = Namespace(**{**vars(arguments), "input_file": warm_up, "output_file": "/dev/null"})
        await run_batch(engine, first)
        started = time.monotonic()
        await run_batch(engine, arguments)
        # Of the clock that all processes of a machine share.
        marks = {"ready": ready, "seconds": time.monotonic() - started}
        times.write_text(json.dumps(marks))


if __name__ == "__main__":
    warm_up, times = sys.argv.pop(1), Path(sys.argv.pop(1))
    asyncio.run(main(warm_up, times, parse_args()))
