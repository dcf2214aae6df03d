"""A file, a tokenizer and a server, as far as a job sees them; jobs to run on it."""

from __future__ import annotations

import asyncio
from collections import Counter, deque
from collections.abc import Callable, Sequence
from concurrent.futures import Executor, Future, ThreadPoolExecutor
from contextlib import aclosing
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
from hypothesis import strategies as st

from blendserve.batch.executor import BatchLine, LineResult
from blendserve.planner import (
    MODEL_SPECS,
    CostModel,
    Job,
    PlannerConfig,
    Side,
    hardware,
)
from blendserve.runtime.credits import Credits
from blendserve.runtime.dispatcher import Dispatcher
from blendserve.runtime.feedback import SchedulerReport
from blendserve.runtime.job_runner import JobRunner, Threads
from blendserve.runtime.pacing import Pacer
from blendserve.runtime.plan_tag import PlanTag
from blendserve.runtime.plan_worker import PlanWorker
from blendserve.runtime.prompts import Prompt, UnreadablePrompt

COST_MODEL = CostModel(MODEL_SPECS["smollm2-135m"], hardware("cpu"))
# For a job that takes one second.
_MOST_SECONDS = 60.0
THREADS = Threads(ThreadPoolExecutor(1), ThreadPoolExecutor(1))
FIRST_DEPTH = 16
ANSWER_TOKENS = 7

Body = dict[str, Any]


# -- a file, a tokenizer and a server, as far as a job sees them


class Inline(Executor):
    """Does at once what it is given."""

    def submit(self, function, *args):
        future: Future[Any] = Future()
        try:
            future.set_result(function(*args))
        except Exception as error:
            future.set_exception(error)
        return future


class FakeLines:
    def __init__(self, bodies: Sequence[Body]) -> None:
        self.bodies = bodies

    def __len__(self) -> int:
        return len(self.bodies)

    def read(self, index: int) -> BatchLine:
        return BatchLine(index, f"line-{index}", "/v1/completions", dict(self.bodies[index]))


class FakeReader:
    """The body says everything: tokens, limit, and whether it can be read at all."""

    def read(self, url: str, body: Body) -> Prompt:
        if body.get("unreadable"):
            raise UnreadablePrompt("not a prompt")
        return Prompt(
            token_ids=np.array(body["prompt"], dtype=np.int32),
            max_output_tokens=body["max_tokens"],
            ignore_eos=body.get("ignore_eos", False),
            sequences=body.get("sequences", 1),
        )


@dataclass
class Sent:
    """One line on its way through the server."""

    index: int
    tag: PlanTag | None
    sequences: int
    prompt: list[int]
    answer: asyncio.Future[LineResult]
    task: asyncio.Task[LineResult] | None = None


def answer_200(line: BatchLine) -> LineResult:
    usage = {"completion_tokens": ANSWER_TOKENS}
    return LineResult(line.index, "rid", status_code=200, body={"usage": usage})


def answer_400(line: BatchLine) -> LineResult:
    return LineResult(line.index, "rid", status_code=400, body={"error": {"message": "no"}})


class FakeServer:
    """The line client, the server's routes and its scheduler in one.

    A step of the scheduler takes the heads of both queues, reports what it took, and answers what
    it took `latency` steps ago. Steps follow each other while there is something to do. `takes`
    tells which lines it may take, so that a test can make it pause.
    """

    def __init__(
        self,
        credits: Credits,
        *,
        per_step: int = 2,
        latency: int = 1,
        respond: Callable[[BatchLine], LineResult] = answer_200,
        refuses: Callable[[int], bool] = lambda index: False,
    ) -> None:
        self.credits = credits
        self.per_step = per_step
        self.latency = latency
        self.respond = respond
        self.refuses = refuses
        self.takes: Callable[[int], bool] = lambda index: True
        self.progress: Callable[[int], int] = lambda index: 0
        self.on_report: Callable[[], None] = lambda: None
        self.sent: list[Sent] = []
        self.queues: dict[Side, deque[tuple[Sent, BatchLine]]] = {s: deque() for s in Side}
        self.running: deque[tuple[int, Sent, BatchLine]] = deque()
        self.taken: Counter[Side] = Counter()
        self.longest_queue: Counter[Side] = Counter()
        self.overdrawn: list[int] = []
        self.aborted: list[int] = []
        self._steps = 0
        self._scheduled = False

    @property
    def indexes(self) -> list[int]:
        return [sent.index for sent in self.sent]

    def queued(self, side: Side) -> int:
        return sum(sent.sequences for sent, _ in self.queues[side])

    def in_flight(self) -> list[int]:
        return [sent.index for sent in self.sent if not sent.answer.done()]

    # -- what JobRunner calls

    def start(
        self, line: BatchLine, tag: PlanTag | None, sequences: int, replica: int | None = None
    ) -> asyncio.Task[LineResult]:
        loop = asyncio.get_running_loop()
        sent = Sent(line.index, tag, sequences, line.body.get("prompt", []), loop.create_future())
        self.sent.append(sent)
        if tag is None or self.refuses(line.index):
            loop.call_soon(self._end, sent, answer_400(line))
        else:
            self.queues[tag.side].append((sent, line))
            self.longest_queue[tag.side] = max(self.longest_queue[tag.side], self.queued(tag.side))
            if self.credits.available(tag.side) < 0:
                self.overdrawn.append(line.index)
            self._schedule()
        sent.task = asyncio.ensure_future(self._answer_of(sent))
        return sent.task

    def tokens_so_far(self, task: asyncio.Task[LineResult]) -> int:
        index = next(sent.index for sent in self.sent if sent.task is task)
        return self.progress(index)

    async def abort_all(self) -> None:
        for sent in self.sent:
            if not sent.answer.done():
                self.aborted.append(sent.index)
                sent.answer.set_result(LineResult(sent.index, "rid", status_code=499, body={}))
        for queue in self.queues.values():
            queue.clear()
        self.running.clear()

    # -- its scheduler

    def resume(self) -> None:
        self.takes = lambda index: True
        self._schedule()

    async def _answer_of(self, sent: Sent) -> LineResult:
        return await sent.answer

    def _schedule(self) -> None:
        if not self._scheduled:
            self._scheduled = True
            asyncio.get_running_loop().call_soon(self._tick, -1)

    def _tick(self, sent: int) -> None:
        # A step takes longer than to send what the credits allow.
        step = self._step if sent == len(self.sent) else partial(self._tick, len(self.sent))
        asyncio.get_running_loop().call_soon(step)

    def _step(self) -> None:
        self._scheduled = False
        self._steps += 1
        for side, queue in self.queues.items():
            for _ in range(self.per_step):
                if not queue or not self.takes(queue[0][0].index):
                    break
                sent, line = queue.popleft()
                self.taken[side] += sent.sequences
                self.running.append((self._steps + self.latency, sent, line))
        taken = {side.value: self.taken[side] for side in Side}
        queued = {side.value: self.queued(side) for side in Side}
        self.credits.on_report(SchedulerReport(taken=taken, queued=queued))
        self.on_report()
        while self.running and self.running[0][0] <= self._steps:
            _, sent, line = self.running.popleft()
            try:
                self._end(sent, self.respond(line))
            except ConnectionError as error:
                sent.answer.set_exception(error)
        heads = [queue[0][0].index for queue in self.queues.values() if queue]
        if self.running or any(map(self.takes, heads)):
            self._schedule()

    def _end(self, sent: Sent, result: LineResult) -> None:
        if not sent.answer.done():
            sent.answer.set_result(result)


class Run:
    """A job on a fresh server. `answers` fills as results come."""

    def __init__(
        self,
        bodies: Sequence[Body],
        pending: Sequence[int] | None = None,
        *,
        credits: Credits | None = None,
        config: PlannerConfig | None = None,
        planner: PlanWorker | None = None,
        threads: Threads = THREADS,
        beside: Run | None = None,
        **server: Any,
    ) -> None:
        self.server = beside.server if beside else FakeServer(credits or Credits(), **server)
        self.pending = list(range(len(bodies))) if pending is None else pending
        self.answers: list[LineResult] = []
        self.started: list[int] = []
        self.dispatcher = (
            beside.dispatcher if beside else Dispatcher(self.server.credits, Pacer(lambda: False))
        )
        self.runner = JobRunner(
            "batch-1",
            FakeLines(bodies),
            self.pending,
            on_start=self.started.append,
            reader=FakeReader(),  # type: ignore[arg-type]
            client=self.server,  # type: ignore[arg-type]
            planner=planner or PlanWorker(COST_MODEL, config or PlannerConfig()),
            threads=threads,
            dispatcher=self.dispatcher,
        )
        self.server.on_report = self.dispatcher.wake

    def sent_on(self, side: Side) -> list[int]:
        return [sent.index for sent in self.server.sent if sent.tag and sent.tag.side is side]

    async def finish(self) -> None:
        """TimeoutError: something waits for what never comes."""
        async with asyncio.timeout(_MOST_SECONDS), aclosing(self.runner.run()) as results:
            async for result in results:
                self.answers.append(result)

    async def stop_after(self, count: int) -> None:
        async with aclosing(self.runner.run()) as results:
            async for result in results:
                self.answers.append(result)
                if len(self.answers) == count:
                    break

    def answered(self) -> list[int]:
        return [result.index for result in self.answers]


async def let_others_run() -> None:
    """Long enough for everything that needs no thread and no clock."""
    for _ in range(50):
        await asyncio.sleep(0)


def finished(*args: Any, **kwargs: Any) -> Run:
    run = Run(*args, **kwargs)
    asyncio.run(run.finish())
    return run


# -- jobs


def exam(number: int, **more: Any) -> Body:
    """A long shared prompt and an answer of a word: compute."""
    return {"prompt": [1, *range(500, 740), 10_000 + number], "max_tokens": 2, **more}


def story(number: int, **more: Any) -> Body:
    """A short prompt and a long answer: memory."""
    return {"prompt": [2, 3, 20_000 + number], "max_tokens": 4000, **more}


def mixed(count: int, **more: Any) -> list[Body]:
    return [exam(n, **more) if n % 2 else story(n, **more) for n in range(count)]


def chat(count: int, **more: Any) -> list[Body]:
    """Lines that differ in their prompt's length only; 500 tokens may be answered."""
    return [
        {"prompt": [n % 5, *range(30_000, 30_000 + 3 * n), n], "max_tokens": 500, **more}
        for n in range(count)
    ]


def planner_job(bodies: Sequence[Body]) -> Job:
    return Job(
        [np.array(body["prompt"], dtype=np.int32) for body in bodies],
        np.array([body["max_tokens"] for body in bodies]),
    )


bodies = st.builds(
    lambda make, number, more: make(number, **more),
    st.sampled_from([exam, story]),
    st.integers(0, 30),  # so that some prompts are equal
    st.sampled_from([{}, {}, {}, {"unreadable": True}, {"ignore_eos": True}]),
)
