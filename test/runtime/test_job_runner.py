"""One job against a scheduler that only takes, answers and reports: who is sent, when and once."""

from __future__ import annotations

import asyncio
import itertools
from collections import Counter, deque
from collections.abc import Callable, Sequence
from concurrent.futures import Executor, Future, ThreadPoolExecutor
from contextlib import aclosing
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from blendserve.batch.executor import BatchLine, LineResult
from blendserve.planner import (
    MODEL_SPECS,
    CostModel,
    Job,
    PlannerConfig,
    Side,
    hardware,
    make_plan,
)
from blendserve.planner.plan import PINNED_OUTPUT_TOKENS
from blendserve.runtime import job_runner, plan_worker
from blendserve.runtime.credits import Credits
from blendserve.runtime.dispatcher import Dispatcher
from blendserve.runtime.feedback import SchedulerReport
from blendserve.runtime.job_runner import JobRunner, Threads
from blendserve.runtime.pacing import Pacer
from blendserve.runtime.plan_tag import PlanTag
from blendserve.runtime.plan_worker import PlanWorker
from blendserve.runtime.planner_process import PlannerDied
from blendserve.runtime.prompts import Prompt, UnreadablePrompt

COST_MODEL = CostModel(MODEL_SPECS["smollm2-135m"], hardware("cpu"))
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
        self, line: BatchLine, tag: PlanTag | None, sequences: int
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
        async with aclosing(self.runner.run()) as results:
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


# -- every line once


@st.composite
def jobs(draw: st.DrawFn) -> tuple[list[Body], list[int]]:
    """Up to a hundred lines, and those of them that are pending."""
    count = draw(st.integers(0, 100))
    lines = draw(st.lists(bodies, min_size=count, max_size=count))
    done = draw(st.sets(st.integers(0, 99), max_size=count))
    return lines, [index for index in range(count) if index not in done]


@settings(deadline=None, database=None, max_examples=60)
@given(
    job=jobs(),
    per_step=st.integers(1, 20),
    latency=st.integers(0, 4),
    refused=st.sampled_from([0, 2, 3]),
)
def test_every_pending_line_is_sent_once_and_answered_once(job, per_step, latency, refused):
    lines, pending = job
    run = finished(
        lines,
        pending,
        per_step=per_step,
        latency=latency,
        refuses=lambda index: bool(refused) and index % refused == 0,
    )
    assert Counter(run.answered()) == Counter(pending)
    assert Counter(run.server.indexes) == Counter(pending)
    assert run.started == run.server.indexes
    assert run.server.overdrawn == []
    assert run.server.aborted == []
    assert (run.runner.view.waiting, run.runner.view.in_flight) == (0, 0)


def test_a_job_without_pending_lines_ends_at_once():
    run = finished(mixed(5), pending=[])
    assert (run.answers, run.server.sent) == ([], [])


def test_only_the_pending_lines_are_run():
    run = finished(mixed(60), pending=range(1, 60, 7))
    assert sorted(run.server.indexes) == list(range(1, 60, 7))


def test_the_answer_of_the_server_is_the_answer_of_the_line():
    run = finished(
        mixed(20), respond=lambda line: answer_400(line) if line.index == 9 else answer_200(line)
    )
    statuses = {result.index: result.status_code for result in run.answers}
    assert statuses == {index: 400 if index == 9 else 200 for index in range(20)}


# -- credits


def test_the_scheduler_never_has_more_queued_than_the_credits_allow():
    # Up to four requests a step leave the depth as it is at first.
    run = finished(mixed(200), per_step=4)
    assert run.server.longest_queue == {Side.LEFT: FIRST_DEPTH, Side.RIGHT: FIRST_DEPTH}


def test_a_scheduler_that_takes_more_is_sent_more():
    run = finished(mixed(400), per_step=12)
    assert all(run.server.longest_queue[side] > FIRST_DEPTH for side in Side)
    assert run.server.overdrawn == []


def test_a_scheduler_that_takes_nothing_is_sent_no_more():
    async def scenario() -> None:
        run = Run(mixed(200), latency=0)
        run.server.takes = lambda index: run.server.taken.total() < 5
        async with aclosing(run.runner.run()) as results:
            for _ in range(5):
                await anext(results)
            waiting = asyncio.ensure_future(anext(results))
            await let_others_run()
            assert not waiting.done()
            assert len(run.server.sent) == 2 * FIRST_DEPTH + 5
            assert run.runner.view.in_flight == 2 * FIRST_DEPTH
            assert run.runner.view.waiting == 200 - len(run.server.sent)
            run.server.resume()
            await waiting

    asyncio.run(scenario())


def test_a_line_of_several_sequences_takes_a_credit_for_each():
    run = finished(mixed(100, sequences=4), per_step=1)
    assert run.server.longest_queue == {Side.LEFT: FIRST_DEPTH, Side.RIGHT: FIRST_DEPTH}
    assert run.server.taken.total() == 400


def test_lines_that_never_reach_the_scheduler_do_not_stop_the_job():
    run = finished(mixed(150), refuses=lambda index: True)
    assert sorted(run.answered()) == list(range(150))


def test_after_refused_lines_the_queues_are_as_deep_as_without_them():
    # Some on each side, among the first that fill the queues and for a while after.
    run = finished(
        mixed(400), per_step=4, refuses=lambda index: index < 100 and index % 8 in (2, 5)
    )
    assert run.server.longest_queue == {Side.LEFT: FIRST_DEPTH, Side.RIGHT: FIRST_DEPTH}


@pytest.mark.parametrize("sequences", [1, 4])
def test_a_refused_line_gives_its_credits_back(sequences):
    credits = Credits()
    lines = mixed(200, ignore_eos=True, sequences=sequences)
    finished(lines, credits=credits, refuses=lambda index: index % 2 == 1 and index < 64)
    assert [credits.queued(side) for side in Side] == [0, 0]


def test_refused_lines_of_one_side_do_not_leave_the_rest_to_the_other():
    run = finished(mixed(400, ignore_eos=True), refuses=lambda index: index % 2 == 1 and index < 64)
    exams_on_the_right = [index for index in run.sent_on(Side.RIGHT) if index % 2]
    assert exams_on_the_right == []


@pytest.mark.parametrize("lines", [24, 100])  # some of the credits taken along, and all of them
def test_credits_that_an_aborted_job_took_along_do_not_stop_the_next(lines):
    async def scenario() -> Run:
        credits = Credits()
        aborted = Run(mixed(lines), credits=credits)
        aborted.server.takes = lambda index: aborted.server.taken.total() < 3
        await aborted.stop_after(1)
        assert all(credits.available(side) < FIRST_DEPTH for side in Side)
        following = Run(mixed(100), credits=credits)
        # One scheduler serves both, and counts on.
        following.server.taken = aborted.server.taken
        await following.finish()
        return following

    following = asyncio.run(scenario())
    assert sorted(following.answered()) == list(range(100))
    # Its queues are as deep as if there had been no other.
    assert following.server.longest_queue == {Side.LEFT: FIRST_DEPTH, Side.RIGHT: FIRST_DEPTH}


# -- plan


def test_compute_heavy_lines_go_to_the_left_and_memory_heavy_ones_to_the_right():
    run = finished(mixed(80, ignore_eos=True))
    first = run.server.sent[: 2 * FIRST_DEPTH]
    sides = {sent.index: sent.tag.side for sent in first if sent.tag}
    assert sides == {index: Side.LEFT if index % 2 else Side.RIGHT for index in sides}
    assert Counter(sides.values()) == {Side.LEFT: FIRST_DEPTH, Side.RIGHT: FIRST_DEPTH}


def test_each_side_is_numbered_in_the_order_in_which_it_is_sent():
    run = finished(mixed(120))
    for side in Side:
        ranks = [sent.tag.rank for sent in run.server.sent if sent.tag and sent.tag.side is side]
        assert ranks == list(range(len(ranks)))
        assert ranks


def test_known_lengths_need_no_sample_and_are_what_the_tags_say():
    run = finished(mixed(40, ignore_eos=True))
    assert (run.runner.view.sampled, run.runner.view.plans) == (0, 1)
    for sent in run.server.sent:
        assert sent.tag is not None
        assert sent.tag.output_tokens == (2 if sent.index % 2 else 4000)
        assert sent.tag.output_deviation == 0


def test_lines_wait_while_answers_are_not_taken(monkeypatch):
    monkeypatch.setattr(job_runner, "_MAX_UNREAD", 10)

    async def scenario() -> None:
        run = Run(mixed(400, ignore_eos=True))
        async with aclosing(run.runner.run()) as results:
            await anext(results)
            while run.server.in_flight():
                await asyncio.sleep(0)
            # Ten answers wait to be taken; what had been sent before was answered, too.
            assert len(run.server.sent) < 100
            taken = 1 + len([result async for result in results])
        assert taken == 400

    asyncio.run(scenario())


def test_a_file_that_can_no_longer_be_read_ends_the_job_with_its_error():
    class TornLines(FakeLines):
        reads = 0

        def read(self, index: int) -> BatchLine:
            self.reads += 1
            if self.reads > 150:  # all were read once, for their prompts
                raise OSError("gone")
            return super().read(index)

    async def scenario() -> None:
        run = Run(chat(100))
        run.runner._lines = TornLines(run.runner._lines.bodies)
        with pytest.raises(OSError, match="gone"):
            await run.finish()
        assert len(run.server.sent) == 50
        assert run.server.in_flight() == []

    asyncio.run(scenario())


def test_a_tag_says_how_far_a_guess_may_be_off():
    run = finished(mixed(40))
    first_story = next(sent for sent in run.server.sent if sent.index % 2 == 0)
    assert first_story.tag is not None
    assert first_story.tag.output_deviation > 10


def test_a_tag_says_what_a_prompt_shares_with_the_one_before_it_on_its_side():
    lines = mixed(120, ignore_eos=True)
    run = finished(lines)
    for side in Side:
        sent = [sent for sent in run.server.sent if sent.tag and sent.tag.side is side]
        assert sent[0].tag.shared_tokens == 0
        for before, after in itertools.pairwise(sent):
            first, second = (lines[each.index]["prompt"] for each in (before, after))
            same = itertools.takewhile(
                lambda pair: pair[0] == pair[1], zip(first, second, strict=False)
            )
            assert after.tag.shared_tokens == len(list(same))
        assert sum(each.tag.shared_tokens for each in sent) > len(sent)


def test_what_follows_a_sample_is_not_known_to_share_anything():
    lines = mixed(200)
    run = finished(lines, config=PlannerConfig(sample_fraction=0.05))
    sample = make_plan(planner_job(lines), COST_MODEL, PlannerConfig(0.05)).sample.tolist()
    for side in Side:
        tags = {
            sent.index: sent.tag for sent in run.server.sent if sent.tag and sent.tag.side is side
        }
        sampled = [index for index in tags if index in sample]
        assert {tags[index].shared_tokens for index in sampled} <= {0}
        following = list(tags)[len(sampled)]
        assert tags[following].shared_tokens == 0


# -- sample and second plan


@pytest.mark.parametrize("pending", [range(100), range(5, 400, 3), range(400)])
@pytest.mark.parametrize("fraction", [0.01, 0.25])  # the larger one has to wait for credits
def test_each_side_is_sent_its_sample_first(pending, fraction):
    lines = chat(400)
    config = PlannerConfig(sample_fraction=fraction)
    plan = make_plan(planner_job([lines[index] for index in pending]), COST_MODEL, config)
    sample: dict[Side, list[int]] = {side: [] for side in Side}
    for position in plan.sample.tolist():
        dense = plan.request_density[position] >= plan.target_density
        sample[Side.LEFT if dense else Side.RIGHT].append(pending[position])
    run = finished(lines, pending, config=config)
    assert run.runner.view.sampled == len(plan.sample)
    for side in Side:
        assert sample[side]
        assert run.sent_on(side)[: len(sample[side])] == sample[side]


def test_the_sample_takes_the_sides_that_its_densities_say():
    # Long prompts that share nothing, with limits that do not say enough about their answers.
    papers = [
        {"prompt": list(range(1000 * n, 1000 * n + 300)), "max_tokens": PINNED_OUTPUT_TOKENS + 1}
        for n in range(100)
    ]
    lines = [papers[n] if n % 2 else story(n) for n in range(100)]
    sample = make_plan(planner_job(lines), COST_MODEL).sample.tolist()
    run = finished(lines)
    sides = {sent.index: sent.tag.side for sent in run.server.sent if sent.tag}
    assert {n: sides[n] for n in sample} == {n: Side.LEFT if n % 2 else Side.RIGHT for n in sample}
    assert {sides[n] for n in sample} == set(Side)


def test_a_sample_that_waits_on_one_side_does_not_hold_up_the_other():
    lines = [exam(n) if n % 4 else story(n) for n in range(400)]
    stories = set(range(0, 400, 4))
    run = Run(lines, config=PlannerConfig(sample_fraction=1.0))
    run.server.takes = lambda index: index not in stories
    asyncio.run(asyncio.wait_for(run.stop_after(300), timeout=30))
    # The answers of exams are short whatever they say, so the stories alone are sampled.
    assert run.runner.view.sampled == len(stories)
    assert set(run.answered()) == set(range(400)) - stories
    assert len(run.sent_on(Side.RIGHT)) == FIRST_DEPTH


@pytest.mark.parametrize(
    ("limit", "sampled"), [(PINNED_OUTPUT_TOKENS, 0), (PINNED_OUTPUT_TOKENS + 1, 8)]
)
def test_lines_whose_answers_must_be_short_need_no_sample(limit, sampled):
    assert finished(chat(100, max_tokens=limit)).runner.view.sampled == sampled


def test_a_sample_larger_than_the_credits_waits_for_them():
    run = finished(chat(400), config=PlannerConfig(sample_fraction=0.25))
    assert run.runner.view.sampled == 100
    assert run.server.overdrawn == []
    assert all(length <= FIRST_DEPTH for length in run.server.longest_queue.values())


@dataclass
class Planned:
    """What one call of the planner was told."""

    observed: dict[int, int]
    exclude: set[int]
    running: dict[int, int]


@pytest.fixture
def plans(monkeypatch: pytest.MonkeyPatch) -> list[Planned]:
    """The calls of the planner, as they come."""
    calls: list[Planned] = []

    def watched(job, cost_model, config, *, observed, exclude, tree, running):
        # Only the first plan has to sort the prompts.
        assert (tree is None) == (not calls)
        calls.append(Planned(dict(observed), set(exclude), dict(running)))
        return make_plan(
            job,
            cost_model,
            config,
            observed=observed,
            exclude=exclude,
            tree=tree,
            running=running,
        )

    monkeypatch.setattr(plan_worker, "make_plan", watched)
    return calls


async def finish_after_the_second_plan(run: Run, lines: Sequence[Body]) -> None:
    """The scheduler takes the sample, and goes on when the second plan is there."""
    sample = set(make_plan(planner_job(lines), COST_MODEL).sample.tolist())
    run.server.takes = sample.__contains__
    finishing = asyncio.ensure_future(run.finish())
    while run.runner.view.plans < 2:
        await asyncio.sleep(0.001)
    run.server.resume()
    await finishing


def test_the_rest_is_planned_again_with_the_lengths_of_the_sample(plans):
    lines = chat(100)
    run = Run(lines)
    asyncio.run(finish_after_the_second_plan(run, lines))

    first, second = plans[:2]
    assert (first.observed, first.exclude) == ({}, set())
    unseen = make_plan(planner_job(lines), COST_MODEL)
    sample = unseen.sample.tolist()
    assert second.observed == dict.fromkeys(sample, ANSWER_TOKENS)
    # What had started, and so kept the engine busy, is not planned a second time.
    sent_before = run.server.indexes[: len(second.exclude)]
    assert set(sent_before) == second.exclude
    assert len(second.exclude) > len(sample)
    assert Counter(run.server.indexes) == Counter(range(100))

    for sent in run.server.sent:
        assert sent.tag is not None
        guess = unseen.estimated_output_tokens[sent.index]
        expected = guess if sent.index in second.exclude else ANSWER_TOKENS
        assert sent.tag.output_tokens == pytest.approx(expected, rel=1e-3)


def test_a_plan_is_made_whenever_there_are_twice_as_many_answers(plans):
    lines = chat(200)
    run = Run(lines, threads=Threads(Inline(), Inline()))
    asyncio.run(run.finish())
    counts = [len(plan.observed) for plan in plans]
    sample = set(make_plan(planner_job(lines), COST_MODEL).sample.tolist())
    assert counts[0] == 0
    assert sample <= plans[1].observed.keys()
    assert all(later >= 2 * before for before, later in itertools.pairwise(counts[1:]))
    assert len(counts) > 3
    assert run.runner.view.plans == len(plans)
    for before, later in itertools.pairwise(plans):
        assert before.observed.items() <= later.observed.items()
        assert before.exclude <= later.exclude


def test_a_plan_is_told_how_far_the_running_requests_have_come(plans):
    lines = chat(100)
    run = Run(lines, latency=4)
    run.server.progress = lambda index: 50 * (index % 3)
    asyncio.run(finish_after_the_second_plan(run, lines))
    second = plans[1]
    in_flight = second.exclude - second.observed.keys()
    assert second.running == {index: 50 * (index % 3) for index in in_flight if index % 3}
    assert second.running


def test_a_job_goes_on_with_its_plan_if_it_cannot_be_planned_again(caplog):
    class FailingPlanner(PlanWorker):
        def plan(self, job_id, news):
            if len(news.started):
                raise PlannerDied("out of memory")
            return super().plan(job_id, news)

    planner = FailingPlanner(COST_MODEL, PlannerConfig())
    run = Run(chat(100), planner=planner, threads=Threads(Inline(), Inline()))
    asyncio.run(run.finish())
    assert sorted(run.answered()) == list(range(100))
    assert run.runner.view.plans == 1
    assert caplog.text.count("batch-1 is not planned again") == 1
    assert "out of memory" in caplog.text


def test_a_line_that_failed_says_nothing_about_the_length_of_others(plans):
    lines = chat(100)
    run = Run(lines, respond=answer_400)
    asyncio.run(finish_after_the_second_plan(run, lines))
    assert {len(plan.observed) for plan in plans} == {0}
    unseen = make_plan(planner_job(lines), COST_MODEL).estimated_output_tokens
    assert {s.tag.output_tokens for s in run.server.sent if s.tag} == set(unseen.tolist())


def test_several_answers_to_a_line_count_as_one_of_their_mean_length(plans):
    def respond(line: BatchLine) -> LineResult:
        body = {"usage": {"completion_tokens": 90}, "choices": [{}, {}, {}]}
        return LineResult(line.index, "rid", status_code=200, body=body)

    lines = chat(100, sequences=4)
    run = Run(lines, respond=respond)
    asyncio.run(finish_after_the_second_plan(run, lines))
    assert set(plans[1].observed.values()) == {30}


def test_without_a_sample_there_is_no_second_plan(plans):
    run = finished(chat(100), config=PlannerConfig(sample_fraction=0.0))
    assert len(plans) == 1
    assert (run.runner.view.sampled, run.runner.view.plans) == (0, 1)


# -- lines that cannot be planned


def test_a_line_that_cannot_be_planned_goes_untagged_to_the_server_for_its_answer():
    lines = [*chat(30), {"unreadable": True}, *chat(30), {"unreadable": True}]
    run = finished(lines)
    untagged = [sent.index for sent in run.server.sent if sent.tag is None]
    assert untagged == [30, 61]
    assert run.server.indexes[:2] == untagged  # they need no place in the plan
    statuses = {result.index: result.status_code for result in run.answers}
    assert statuses == {index: 400 if index in untagged else 200 for index in range(62)}


def test_a_job_of_such_lines_alone_is_answered():
    run = finished([{"unreadable": True}] * 40)
    assert sorted(run.answered()) == list(range(40))
    assert {sent.tag for sent in run.server.sent} == {None}


# -- several jobs at once


def test_jobs_beside_each_other_share_the_queues_and_are_all_answered():
    async def scenario() -> tuple[Run, Run]:
        exams = Run([exam(n, ignore_eos=True) for n in range(150)])
        stories = Run([story(n, ignore_eos=True) for n in range(90)], beside=exams)
        exams.server.takes = lambda index: False
        running = asyncio.gather(exams.finish(), stories.finish())
        while not exams.runner.view.phase == stories.runner.view.phase == "running":
            await asyncio.sleep(0.001)
        exams.server.resume()
        await running
        return exams, stories

    exams, stories = asyncio.run(scenario())
    assert sorted(exams.answered()) == list(range(150))
    assert sorted(stories.answered()) == list(range(90))
    sent = exams.server.sent
    assert exams.server.overdrawn == []
    for side in Side:
        ranks = [each.tag.rank for each in sent if each.tag and each.tag.side is side]
        assert ranks == list(range(len(ranks)))
    # What filled the queues before the second job was there is one job's; then they are blended.
    both = sent[2 * FIRST_DEPTH :][:100]
    sides = {(len(each.prompt) > 100, each.tag.side) for each in both if each.tag}
    assert sides == {(True, Side.LEFT), (False, Side.RIGHT)}


# -- endings before the end


@pytest.mark.parametrize("answers", [1, 20, 60])
def test_closing_it_aborts_what_is_in_flight_and_sends_no_more(answers):
    async def scenario() -> None:
        run = Run(chat(100), latency=3)
        results = run.runner.run()
        for _ in range(answers):
            await anext(results)
        in_flight, sent = run.server.in_flight(), len(run.server.sent)
        assert in_flight
        await results.aclose()
        assert run.server.aborted == in_flight
        await let_others_run()
        assert len(run.server.sent) == sent

    asyncio.run(scenario())


def test_cancelling_it_aborts_what_is_in_flight():
    async def scenario() -> None:
        run = Run(chat(100))
        run.server.takes = lambda index: run.server.taken.total() < 10
        task = asyncio.ensure_future(run.finish())
        while len(run.answers) < 10:
            await asyncio.sleep(0)
        in_flight = run.server.in_flight()
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        assert in_flight
        assert run.server.aborted == in_flight

    asyncio.run(scenario())


def test_an_engine_that_dies_ends_the_job_with_its_error_and_all_that_was_in_flight():
    def respond(line: BatchLine) -> LineResult:
        if line.index == 40:
            raise ConnectionError("the engine died")
        return answer_200(line)

    async def scenario() -> None:
        run = Run(chat(100), respond=respond)
        with pytest.raises(ConnectionError, match="the engine died"):
            await run.finish()
        assert 40 not in run.answered()
        assert run.server.in_flight() == []
        assert run.server.aborted

    asyncio.run(scenario())


# -- what an operator sees


def test_the_view_counts_the_jobs_tokens_and_ends_with_all_its_work_done():
    lines = mixed(40, ignore_eos=True)
    run = finished(
        lines,
        respond=lambda line: LineResult(
            line.index,
            "rid",
            status_code=200,
            body={"usage": {"completion_tokens": lines[line.index]["max_tokens"]}},
        ),
    )
    view = run.runner.view
    plan = make_plan(planner_job(lines), COST_MODEL)
    assert view.phase == "running"
    assert view.prompt_tokens == sum(len(line["prompt"]) for line in lines) == plan.prompt_tokens
    assert view.unique_tokens == plan.unique_tokens < view.prompt_tokens
    assert (view.left_density, view.right_density) == (None, None)
    assert view.done_work_tokens == pytest.approx(view.total_work_tokens)
