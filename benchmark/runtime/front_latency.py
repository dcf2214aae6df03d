"""How long the event loops are held up while a large job is taken up and run.

    python benchmark/runtime/front_latency.py fake --requests 100000 --tokens 100
    python benchmark/runtime/front_latency.py server --requests 20000 --tokens 700

A stall monitor on the loop sleeps for a millisecond over and over, and notes by how much each
sleep was longer than that, per phase of the job. `own` is the part of a lag in which the process
was computing: on a machine that others use, the rest is time in which it did not get a core. The
job is synthetic: chat lines whose prompts share prefixes as MMLU's 5-shot prompts do (57 subjects),
words drawn at random, of open length.

fake: the real job runner, dispatcher, planning process and line client in this process, with a
FastAPI application that tokenises each line once more on the loop, as SGLang does, and a scheduler
that takes requests in steps. Prompts are read by the model's own tokenizer and chat template.
server: `blendserve serve` as it is, on the tiny random Llama of the end-to-end tests (CPU), with a
monitor in its front process and one in its engine process, where batch lines share the loop with
online requests; a client asks for the list of models meanwhile.
"""

from __future__ import annotations

import argparse
import asyncio
import gc
import json
import os
import platform
import random
import sys
import tempfile
import time
from collections import deque
from collections.abc import AsyncIterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import aclosing
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from stall_monitor import StallMonitor
from watched_server import run_server

RESULTS = Path(__file__).parents[1] / "results"
MODEL = "smollm2-135m"
SUBJECTS = 57
WORDS = (
    *("river", "stone", "window", "garden", "letter", "market", "winter", "engine", "bottle"),
    *("paper", "island", "music", "silver", "corner", "planet", "bridge", "orange", "ticket"),
    *("number", "mirror", "forest", "yellow", "doctor", "candle"),
)
MAX_OUTPUT_TOKENS = 64
STEPS_IN_FLIGHT = 4


# -- the job


def write_job(path: Path, requests: int, tokens: int, model: str) -> None:
    """Batch lines of about `tokens` prompt tokens each; a word is about a token."""
    rng = random.Random(0)

    def words(count: int) -> str:
        return " ".join(rng.choices(WORDS, k=count))

    own = min(100, tokens // 3)
    prefixes = [words(tokens - own) for _ in range(SUBJECTS)]
    with path.open("w") as file:
        for k in range(requests):
            body = {
                "model": model,
                "max_tokens": MAX_OUTPUT_TOKENS,
                "messages": [
                    {"role": "user", "content": f"{rng.choice(prefixes)} {words(own)} {k}"}
                ],
            }
            line = {
                "custom_id": str(k),
                "method": "POST",
                "url": "/v1/chat/completions",
                "body": body,
            }
            file.write(json.dumps(line) + "\n")


# -- fake: everything of ours, nothing of SGLang's


@dataclass
class Arrival:
    """One request in the fake scheduler's queues."""

    side: Any
    answer: asyncio.Future[int]


class FakeEngine:
    """Takes some requests of each side in every step, and answers them a few steps later."""

    def __init__(self, on_report: Any, per_step: int, step_seconds: float) -> None:
        from blendserve.planner import Side

        self._per_step, self._step_seconds = per_step, step_seconds

        self._on_report = on_report
        self.queues: dict[Any, deque[Arrival]] = {side: deque() for side in Side}
        self._running: deque[tuple[int, Arrival]] = deque()
        self._taken = dict.fromkeys(Side, 0)

    async def run(self) -> None:
        from blendserve.runtime.feedback import SchedulerReport

        step = 0
        while True:
            await asyncio.sleep(self._step_seconds)
            step += 1
            for side, queue in self.queues.items():
                for _ in range(min(self._per_step, len(queue))):
                    self._running.append((step + STEPS_IN_FLIGHT, queue.popleft()))
                    self._taken[side] += 1
            while self._running and self._running[0][0] <= step:
                self._running.popleft()[1].answer.set_result(1 + step % MAX_OUTPUT_TOKENS)
            taken = {side.value: count for side, count in self._taken.items()}
            self._on_report(SchedulerReport(taken=taken))


def fake_app(tokenizer: Any, engine: FakeEngine, pacer: Any) -> Any:
    from fastapi import FastAPI, Request
    from fastapi.responses import ORJSONResponse

    from blendserve.runtime.pacing import paced
    from blendserve.runtime.plan_tag import PlanTag

    app = FastAPI()

    async def generate(prompt_tokens: int, tag: Any) -> AsyncIterator[dict[str, Any]]:
        arrival = Arrival(tag.side, asyncio.get_running_loop().create_future())
        engine.queues[tag.side].append(arrival)
        tokens = await arrival.answer
        yield {"prompt_tokens": prompt_tokens, "completion_tokens": tokens}

    generate_request = paced(generate, pacer)

    @app.post("/v1/chat/completions")
    async def chat(request: Request) -> Any:
        body = await request.json()
        prompt_tokens = len(tokenizer.chat(body["messages"], None))
        tag = PlanTag.from_params(body["custom_params"])
        usage = await anext(generate_request(prompt_tokens, tag))
        message = {"role": "assistant", "content": " ".join(WORDS)}
        return ORJSONResponse({"choices": [{"message": message}], "usage": usage})

    return app


class FakeReader:
    """Tokenises as SGLang does, but needs neither SGLang nor torch."""

    def __init__(self, tokenizer: Any) -> None:
        self._tokenizer = tokenizer

    def read(self, url: str, body: dict[str, Any]) -> Any:
        from blendserve.runtime.prompts import Prompt

        ids = np.asarray(self._tokenizer.chat(body["messages"], None), dtype=np.int32)
        return Prompt(ids, body["max_tokens"], ignore_eos=False, sequences=1)


async def run_fake(
    path: Path, requests: int, answers: int, per_step: int, step_seconds: float
) -> dict[str, Any]:
    from blendserve.batch.lines import FileLineSource
    from blendserve.cli.tokenizer import ModelTokenizer
    from blendserve.planner import MODEL_SPECS, CostModel, PlannerConfig, hardware
    from blendserve.runtime.credits import Credits
    from blendserve.runtime.dispatcher import Dispatcher
    from blendserve.runtime.job_runner import JobRunner, Threads
    from blendserve.runtime.line_client import LineClient
    from blendserve.runtime.pacing import Pacer
    from blendserve.runtime.planner_process import PlannerProcess

    tokenizer = ModelTokenizer(MODEL)
    tokenizer.chat([{"role": "user", "content": "warm up"}], None)
    planner = PlannerProcess(
        CostModel(MODEL_SPECS[MODEL], hardware("cpu")), PlannerConfig(sample_fraction=0.01)
    )
    planner.start()
    pacer = Pacer(lambda: False)
    dispatcher = Dispatcher(Credits(), pacer)

    def on_report(report: Any) -> None:
        dispatcher.credits.on_report(report)
        dispatcher.wake()

    engine = FakeEngine(on_report, per_step, step_seconds)
    lines = FileLineSource(path, 1 << 20)
    runner = JobRunner(
        "job",
        lines,
        range(requests),
        reader=FakeReader(tokenizer),  # type: ignore[arg-type]
        client=LineClient(
            fake_app(tokenizer, engine, pacer), lambda rid: None, lambda rid: 7, None
        ),
        planner=planner,
        threads=Threads(ThreadPoolExecutor(1), ThreadPoolExecutor(1)),
        dispatcher=dispatcher,
    )
    monitor = StallMonitor()
    gc.freeze()  # As SGLang does once it is warm.
    tasks = [asyncio.create_task(engine.run()), asyncio.create_task(monitor.run())]
    await asyncio.sleep(2)
    answered = 0

    async def follow() -> None:
        while True:
            replanning = runner._replanning is not None
            monitor.enter("re-planning" if replanning else runner.view.phase)
            await asyncio.sleep(0.005)

    tasks.append(asyncio.create_task(follow()))
    results = runner.run()
    started = time.perf_counter()
    async with aclosing(results):
        async for _ in results:
            answered += 1
            if answered == answers:
                break
        seconds = time.perf_counter() - started
        report = monitor.report()
        for task in tasks[1:]:
            task.cancel()
        for queue in engine.queues.values():
            for arrival in queue:
                arrival.answer.cancel()
    tasks[0].cancel()
    planner.close()
    return {"phases": report, "plans": runner.view.plans, "answers": answered, "seconds": seconds}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("mode", choices=["fake", "server"])
    parser.add_argument("--requests", type=int, default=20_000)
    parser.add_argument("--tokens", type=int, default=700)
    parser.add_argument("--answers", type=int, default=4_000, help="fake: stop after so many")
    parser.add_argument("--per-step", type=int, default=8, help="fake: taken of each side")
    parser.add_argument("--step-seconds", type=float, default=0.02, help="fake")
    parser.add_argument("--running-seconds", type=float, default=30, help="server: cancel then")
    parser.add_argument("--out", type=Path, default=RESULTS / "front_latency.json")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        path = Path(name) / "job.jsonl"
        write_job(path, options.requests, options.tokens, MODEL)
        if options.mode == "fake":
            import uvloop

            engine = (options.per_step, options.step_seconds)
            result = uvloop.run(run_fake(path, options.requests, options.answers, *engine))
        else:
            result = run_server(path, Path(name), MODEL, options.running_seconds)
    result |= {
        "mode": options.mode,
        "requests": options.requests,
        "tokens": options.tokens,
        "fake_engine": {"per_step": options.per_step, "step_seconds": options.step_seconds},
        "load_average": os.getloadavg(),
        "cpus": os.cpu_count(),
        "python": platform.python_version(),
    }
    print(json.dumps(result, indent=2))
    known = json.loads(options.out.read_text()) if options.out.exists() else {}
    known[f"{options.mode}-{options.requests}x{options.tokens}"] = result
    options.out.write_text(json.dumps(known, indent=2) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
