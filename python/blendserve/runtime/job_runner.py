"""Runs one job: plans it, walks the plan from both ends, and streams both fronts to the scheduler.

The job and its tree stay in the front process; the scheduler only ever sees the next few requests
of each side. A small sample runs first; when its answers are in, the rest is planned again with
the lengths that it showed, while requests of the first plan keep the engine busy.
"""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import AsyncGenerator, Callable, Sequence
from dataclasses import dataclass, field
from functools import cached_property

import numpy as np
from numpy.typing import NDArray

from blendserve.batch.executor import BatchLine, LineResult, LineSource
from blendserve.batch.progress import usage_of
from blendserve.planner import (
    CostModel,
    DualScanner,
    Job,
    Plan,
    PlannerConfig,
    PrefixTree,
    Side,
    make_plan,
)
from blendserve.runtime.credits import Credits
from blendserve.runtime.line_client import LineClient
from blendserve.runtime.plan_tag import PlanTag
from blendserve.runtime.prompts import Prompt, PromptReader, UnreadablePrompt

# Lines without a plan that may be with the server at a time; no credits bound them.
_MAX_UNPLANNED = 64


@dataclass
class JobView:
    """What of a running job is shown to an operator.

    Attributes:
        phase: "reading prompts", "planning" or "running".
        prompt_tokens, unique_tokens: of the lines that were left when this server took it up;
            the prompt tokens that a cache without end would have to compute.
        best_sharing, planned_sharing: shares of the prompt tokens that a DFS order and the plan's
            order find in the cache.
        target_density: compute density of what is left.
        left_density, right_density: at the two scanners; None when the plan is used up.
        waiting, in_flight: lines not yet sent, and lines sent and not yet answered.
        sampled, replanned: lines that run first, and whether their lengths have been used.
        bound_seconds: nothing could run the lines that were left faster: all compute that the best
            sharing leaves, or all memory traffic, whichever takes longer.
        total_work_tokens, done_work_tokens: prefill tokens that sharing leaves plus expected output
            tokens, of all lines and of the answered ones.
    """

    job_id: str
    phase: str = "reading prompts"
    prompt_tokens: int = 0
    unique_tokens: int = 0
    best_sharing: float = 0.0
    planned_sharing: float = 0.0
    target_density: float = 0.0
    left_density: float | None = None
    right_density: float | None = None
    waiting: int = 0
    in_flight: int = 0
    sampled: int = 0
    replanned: bool = False
    bound_seconds: float = 0.0
    total_work_tokens: float = 0.0
    done_work_tokens: float = 0.0


@dataclass
class _Work:
    """The plannable lines of a job; positions index all lists, `lines` maps them to the file."""

    lines: list[int] = field(default_factory=list)
    prompts: list[Prompt] = field(default_factory=list)
    unplannable: deque[int] = field(default_factory=deque)

    @cached_property
    def prompt_tokens(self) -> NDArray[np.int64]:
        return np.array([len(prompt.token_ids) for prompt in self.prompts], dtype=np.int64)


class JobRunner:
    """One job, from prompts to the last answer.

    Args:
        job_id: id of the batch.
        lines: the lines of its file.
        pending: indexes of the lines to run.
        reader, client: the way into the server.
        credits: what the scheduler will take; shared by all jobs of a server.
        cost_model: seconds of compute and of memory traffic of a request.
        config: the planner's settings.
        on_start: called with a line's index when it is sent.
    """

    def __init__(
        self,
        job_id: str,
        lines: LineSource,
        pending: Sequence[int],
        *,
        reader: PromptReader,
        client: LineClient,
        credits: Credits,
        cost_model: CostModel,
        config: PlannerConfig,
        on_start: Callable[[int], None] = lambda _: None,
    ) -> None:
        self._on_start = on_start
        self.view = JobView(job_id)
        self._lines = lines
        self._pending = pending
        self._reader = reader
        self._client = client
        self._credits = credits
        self._cost_model = cost_model
        self._config = config
        # Ended lines with their position in the work, or None: something else changed.
        self._events: asyncio.Queue[tuple[asyncio.Task[LineResult], int | None] | None] = (
            asyncio.Queue()
        )
        self._observed: dict[int, int] = {}
        self._started: set[int] = set()
        self._unplanned = 0
        self._tree: PrefixTree | None = None
        self._ranks = dict.fromkeys(Side, 0)
        self._sides: dict[int, Side] = {}

    def wake(self) -> None:
        """The scheduler took requests from its queues, or a new plan is ready."""
        self._events.put_nowait(None)

    async def run(self) -> AsyncGenerator[LineResult, None]:
        """Yield one result per pending line, as they come. Closing it aborts what is in flight."""
        work = await asyncio.to_thread(self._read_prompts)
        self.view.phase = "planning"
        self._prefill_work = np.zeros(len(work.prompts), dtype=np.int64)
        plan, scanner = await self._plan(work)
        self._adopt(work, plan, scanner)
        # Samples go first and their answers count like any other.
        sample = self._sample_by_side(plan)
        unseen = {position for queue in sample.values() for position in queue}
        self.view.sampled = len(unseen)
        replan: asyncio.Task[tuple[Plan, DualScanner]] | None = None
        self.view.phase = "running"
        # Nothing of this server's batches is in flight now, so nothing can be in the queues.
        self._credits.settle()
        try:
            while True:
                if replan is None and self.view.sampled and not unseen:
                    replan = asyncio.create_task(self._plan(work))
                    replan.add_done_callback(lambda _: self.wake())
                if replan is not None and replan.done() and not self.view.replanned:
                    self._adopt(work, *replan.result())
                    self.view.replanned = True
                self._dispatch(work, plan, sample)
                self.view.waiting = self._scanner.remaining + len(work.unplannable)
                if not self.view.in_flight:
                    if not self.view.waiting:
                        return
                    self._credits.settle()
                    continue
                event = await self._events.get()
                if event is None:
                    continue
                task, position = event
                self.view.in_flight -= 1
                result = task.result()
                if position is None:
                    self._unplanned -= 1
                else:
                    unseen.discard(position)
                    self._observe(work, position, result)
                yield result
        finally:
            if replan is not None:
                replan.cancel()
            await self._client.abort_all()

    # -- planning, in a worker thread -----------------------------------------------------------

    def _read_prompts(self) -> _Work:
        work = _Work()
        for index in self._pending:
            line = self._lines.read(index)
            try:
                prompt = self._reader.read(line.url, line.body)
            except UnreadablePrompt:
                # The server answers it, with the error that an online client would get.
                work.unplannable.append(index)
                continue
            work.lines.append(index)
            work.prompts.append(prompt)
        return work

    async def _plan(self, work: _Work) -> tuple[Plan, DualScanner]:
        # Copies: both go on changing on the event loop while the worker thread plans.
        observed, started = dict(self._observed), set(self._started)
        return await asyncio.to_thread(self._make_plan, work, observed, started)

    def _make_plan(
        self, work: _Work, observed: dict[int, int], started: set[int]
    ) -> tuple[Plan, DualScanner]:
        limits = np.array([prompt.max_output_tokens for prompt in work.prompts], dtype=np.int64)
        exact = np.array([prompt.ignore_eos for prompt in work.prompts], dtype=bool)
        job = Job(
            token_ids=[prompt.token_ids for prompt in work.prompts],
            max_output_tokens=limits,
            known_output_tokens=np.where(exact, limits, -1),
        )
        plan = make_plan(
            job,
            self._cost_model,
            self._config,
            observed=observed,
            exclude=started,
            # The prompts do not change between two plans, so neither does their tree.
            tree=self._tree,
        )
        self._tree = plan.tree
        return plan, DualScanner(plan)

    def _adopt(self, work: _Work, plan: Plan, scanner: DualScanner) -> None:
        """Walk this plan from now on; what started while it was made must not start again."""
        for position in self._started:
            scanner.remove(position)
        self._scanner = scanner
        self._estimates = plan.estimated_output_tokens
        # Prefill work as this plan shares it; a line that it leaves out keeps its last figure.
        self._prefill_work[plan.order] = work.prompt_tokens[plan.order] - plan.shared_with_previous
        self.view.total_work_tokens = float(self._prefill_work.sum() + self._estimates.sum())
        if not self.view.prompt_tokens:
            self.view.prompt_tokens = plan.prompt_tokens
            self.view.unique_tokens = plan.unique_tokens
            self.view.best_sharing = plan.sharing_best
            self.view.bound_seconds = self._bound_seconds(plan)
        self.view.planned_sharing = plan.sharing_planned

    def _bound_seconds(self, plan: Plan) -> float:
        tree, model = plan.tree, self._cost_model
        output = self._estimates[tree.requests]
        compute = model.compute_seconds(tree.length, output)
        compute = compute - model.prefill_seconds_saved(tree.shared)
        return float(max(compute.sum(), model.memory_seconds(tree.length, output).sum()))

    # -- dispatch, on the event loop -----------------------------------------------------------

    @staticmethod
    def _sample_by_side(plan: Plan) -> dict[Side, deque[int]]:
        """The sample, each request on the side of the target that its density is on."""
        sample: dict[Side, deque[int]] = {side: deque() for side in Side}
        for position in map(int, plan.sample):
            dense = plan.request_density[position] >= plan.target_density
            sample[Side.LEFT if dense else Side.RIGHT].append(position)
        return sample

    def _dispatch(self, work: _Work, plan: Plan, sample: dict[Side, deque[int]]) -> None:
        """Send as much as the credits allow: on each side the sample first, then the front."""
        scanner = self._scanner
        while work.unplannable and self._unplanned < _MAX_UNPLANNED:
            self._unplanned += 1
            line = self._lines.read(work.unplannable.popleft())
            self._start(line, None, 1, None)
        for side in Side:
            while sample[side] and self._credits.available(side) > 0:
                position = sample[side].popleft()
                if scanner.remove(position):
                    density = float(plan.request_density[position])
                    self._send(work, position, side, density)
            while not scanner.exhausted and self._credits.available(side) > 0:
                density = scanner.density(side) or 0.0
                self._send(work, scanner.take(side), side, density)
        self.view.target_density = scanner.target_density
        self.view.left_density = scanner.density(Side.LEFT)
        self.view.right_density = scanner.density(Side.RIGHT)

    def _send(self, work: _Work, position: int, side: Side, density: float) -> None:
        line = self._lines.read(work.lines[position])
        sequences = work.prompts[position].sequences
        tag = PlanTag(
            side=side,
            rank=self._ranks[side],
            density=density,
            target_density=self._scanner.target_density,
            output_tokens=float(self._estimates[position]),
        )
        self._ranks[side] += 1
        self._started.add(position)
        self._sides[position] = side
        self._credits.sent(side, sequences)
        self._start(line, tag, sequences, position)

    def _start(
        self, line: BatchLine, tag: PlanTag | None, sequences: int, position: int | None
    ) -> None:
        self._on_start(line.index)
        task = self._client.start(line, tag, sequences)
        task.add_done_callback(lambda done: self._events.put_nowait((done, position)))
        self.view.in_flight += 1

    def _observe(self, work: _Work, position: int, result: LineResult) -> None:
        produced = usage_of(result.body).output_tokens
        if result.status_code == 200:
            self._observed[position] = produced
        elif result.status_code is not None and result.status_code < 500:
            # The client's fault is found before any queue; the engine's may be found after.
            self._credits.refused(self._sides.pop(position), work.prompts[position].sequences)
        self.view.done_work_tokens += int(self._prefill_work[position]) + produced
