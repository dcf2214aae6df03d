"""What the planning process keeps of the jobs: their prompts, trees and lengths.

Knows neither torch nor SGLang. The engine process sends the prompts once and then only news, and
gets back what it needs to walk a plan.
"""

from __future__ import annotations

from array import array
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from blendserve.planner import (
    MODEL_SPECS,
    CostModel,
    DualScanner,
    Job,
    MediaRuns,
    NextUse,
    Plan,
    PlannerConfig,
    PrefixTree,
    ProgressCurve,
    Side,
    Timetable,
    hardware,
    make_plan,
    make_timetable,
    progress_curve,
)
from blendserve.runtime.plan_tag import UseTag

Ints = NDArray[np.int64]
Floats = NDArray[np.float64]


def _no_positions() -> Ints:
    return np.empty(0, dtype=np.int64)


@dataclass(frozen=True, eq=False)
class PromptBatch:
    """k more requests of a job, in the order of their positions.

    Attributes:
        tokens: int32 [sum of lengths], the prompts end to end.
        lengths: int64 [k], prompt tokens.
        max_output_tokens: int64 [k].
        ignore_eos: bool [k], true where the output is as long as its limit.
        media: the pictures in them; requests are numbered within the batch.
    """

    tokens: NDArray[np.int32]
    lengths: Ints
    max_output_tokens: Ints
    ignore_eos: NDArray[np.bool_]
    media: MediaRuns = field(default_factory=MediaRuns.none)


def _positions(values: array[int]) -> Ints:
    return np.frombuffer(values, dtype=np.int64) if values else _no_positions()


@dataclass(frozen=True, eq=False)
class News:
    """What became of a job's requests since its last plan; positions, each with its tokens.

    Attributes:
        started: int64, requests that are not to be planned any more.
        finished, finished_tokens: int64, true output lengths.
        running, running_tokens: int64, output tokens so far of all that have not ended.
    """

    started: Ints = field(default_factory=_no_positions)
    finished: Ints = field(default_factory=_no_positions)
    finished_tokens: Ints = field(default_factory=_no_positions)
    running: Ints = field(default_factory=_no_positions)
    running_tokens: Ints = field(default_factory=_no_positions)


class UntoldNews:
    """What the planner has not been told yet of a job.

    Attributes:
        started: positions.
    """

    def __init__(self) -> None:
        self.started = array("q")
        self._finished = array("q")
        self._finished_tokens = array("q")

    def ended(self, position: int, output_tokens: int) -> None:
        self._finished.append(position)
        self._finished_tokens.append(output_tokens)

    def take(self, running: Sequence[tuple[int, int]]) -> News:
        """All of it, and the output tokens so far of what is in flight, by position."""
        news = self.peek(running)
        self.started, self._finished, self._finished_tokens = array("q"), array("q"), array("q")
        return news

    def peek(self, running: Sequence[tuple[int, int]]) -> News:
        """The same, and it stays untold."""
        return News(
            # Copies: an array that others look into cannot grow.
            started=_positions(self.started).copy(),
            finished=_positions(self._finished).copy(),
            finished_tokens=_positions(self._finished_tokens).copy(),
            running=np.array([position for position, _ in running], dtype=np.int64),
            running_tokens=np.array([tokens for _, tokens in running], dtype=np.int64),
        )


@dataclass(frozen=True, eq=False)
class JobPlan:
    """A plan as the engine process walks it. Arrays are [requests] by position.

    Attributes:
        scanner: the walk, which has what the news said had started behind it.
        timetable: when each request is expected to be sent, and who needs its prefixes next.
        sample: positions to run first on each side; a large sample comes in two parts, the second
            with the plan that knows the answers of the first.
        density: compute density; nan where the request is not planned.
        output_tokens, likely_output_tokens: estimated output length; (requests, k) lengths that it
            may have, see `Plan`.
        guessed: whether nothing tells yet how long it gets.
        prefill_tokens: prompt tokens that the plan does not find in the cache, and
        compute_seconds, memory_seconds: by the cost model, after sharing; all three as of the last
            plan that had the request in it.
        bound_seconds: what the planned requests take at least, by the cost model: all compute that
            the best sharing leaves, or all memory traffic, whichever is longer. 0 where the
            device's figures are a guess.
        total_work_tokens: prefill and output tokens of all requests, ended ones included.
        prompt_tokens, unique_tokens, sharing_best, sharing_planned: see `Plan`.
        latest_due: the highest number that a request of each side was sent with.
        curve: how the work of what has not ended goes on with time; None: not known.
    """

    scanner: DualScanner
    timetable: Timetable
    sample: dict[Side, Ints]
    density: Floats
    output_tokens: Floats
    likely_output_tokens: Floats
    guessed: NDArray[np.bool_]
    prefill_tokens: Ints
    compute_seconds: Floats
    memory_seconds: Floats
    bound_seconds: float
    total_work_tokens: float
    prompt_tokens: int
    unique_tokens: int
    sharing_best: float
    sharing_planned: float
    latest_due: dict[Side, int]
    curve: ProgressCurve | None = None

    def use_tag(self, job: str, side: Side, position: int) -> UseTag:
        """What the radix cache is told when a side sends a request; the scanner has taken it.

        An end that is ahead does not stop where the timetable has the two meet. For what it takes
        from there on, the timetable has foreseen the other direction: the last of those that share
        a prefix comes first. So its numbers go on from its own latest, and who comes next on this
        side is who needs the prefix next. After the last request of all, that can only be one that
        the other scan end has sent, and that may wait yet.
        """
        times = self.timetable
        foreseen = times.side(position) is side
        due = times.due(position) if foreseen else self.latest_due[side] + 1
        shared = self.scanner.shared_tokens(side)
        next_uses: tuple[NextUse, ...]
        if self.scanner.exhausted:
            other = side.other
            next_uses = (NextUse(shared, self.latest_due[other], other),) if shared else ()
        elif foreseen:
            next_uses = tuple(times.next_uses(position))
        else:
            next_uses = (NextUse(shared, due + 1, side),) if shared else ()
        self.latest_due[side] = max(self.latest_due[side], due)
        return UseTag(job, side, due, times.first_due, next_uses)


def no_plan() -> JobPlan:
    """The plan of a job that has no request to plan."""
    worker = PlanWorker(CostModel(MODEL_SPECS["smollm2-135m"], hardware("cpu")), PlannerConfig())
    worker.append(
        "",
        PromptBatch(
            tokens=np.empty(0, dtype=np.int32),
            lengths=_no_positions(),
            max_output_tokens=_no_positions(),
            ignore_eos=np.empty(0, dtype=np.bool_),
        ),
    )
    return worker.plan("", News())


class Planner(Protocol):
    """Plans jobs by id. Calls block; they may come from any thread, for one job in order."""

    def append(self, job_id: str, batch: PromptBatch) -> None:
        """Add requests to a job, which begins with its first batch."""
        ...

    def plan(self, job_id: str, news: News) -> JobPlan:
        """Plan what has not started; no more requests may be added. Raises KeyError for a job
        without requests."""
        ...

    def forecast(self, job_id: str, news: News) -> ProgressCurve | None:
        """How a planned job goes on from here; news: with all that is in flight as running. Changes
        nothing. None: not known."""
        ...

    def forget(self, job_id: str) -> None:
        """Drop a job, known or not."""
        ...


class PlanWorker:
    """The planner itself. Not safe to call from several threads at once."""

    def __init__(self, cost_model: CostModel, config: PlannerConfig) -> None:
        self._cost_model = cost_model
        self._config = config
        self._jobs: dict[str, _PlannedJob] = {}

    def append(self, job_id: str, batch: PromptBatch) -> None:
        self._jobs.setdefault(job_id, _PlannedJob()).append(batch)

    def plan(self, job_id: str, news: News) -> JobPlan:
        return self._jobs[job_id].plan(news, self._cost_model, self._config)

    def forecast(self, job_id: str, news: News) -> ProgressCurve | None:
        return self._jobs[job_id].forecast(news, self._cost_model, self._config)

    def forget(self, job_id: str) -> None:
        self._jobs.pop(job_id, None)


class _PlannedJob:
    def __init__(self) -> None:
        self._tokens = array("i")
        self._lengths = array("q")
        self._limits = array("q")
        self._exact = array("b")
        self._media = {name: array("q") for name in ("request", "end", "patches")}
        self._job: Job | None = None
        self._tree: PrefixTree | None = None
        self._started: set[int] = set()
        self._observed: dict[int, int] = {}
        self._sampled: set[int] = set()
        self._timetable: Timetable | None = None

    def append(self, batch: PromptBatch) -> None:
        media = replace(batch.media, request=batch.media.request + len(self._lengths))
        for name, values in self._media.items():
            values.frombytes(np.asarray(getattr(media, name), dtype=np.int64).tobytes())
        self._tokens.frombytes(batch.tokens.astype(np.int32, copy=False).tobytes())
        self._lengths.frombytes(batch.lengths.astype(np.int64, copy=False).tobytes())
        self._limits.frombytes(batch.max_output_tokens.astype(np.int64, copy=False).tobytes())
        self._exact.frombytes(batch.ignore_eos.astype(np.int8).tobytes())

    def plan(self, news: News, cost_model: CostModel, config: PlannerConfig) -> JobPlan:
        self._started.update(news.started.tolist())
        observed = zip(news.finished.tolist(), news.finished_tokens.tolist(), strict=True)
        self._observed.update(observed)
        in_flight = dict(zip(news.running.tolist(), news.running_tokens.tolist(), strict=True))
        job = self._job or self._gathered()
        plan = make_plan(
            job,
            cost_model,
            config,
            observed=self._observed,
            exclude=self._started,
            tree=self._tree,
            running=_with_tokens(in_flight),
            sampled=self._sampled,
        )
        self._sampled.update(plan.sample.tolist())
        if self._tree is None:
            self._remember(plan)
        walked = self._as_walked(plan, cost_model, news.started)
        curve = progress_curve(plan, cost_model, config.kv_tokens, in_flight, self._prefill)
        return replace(walked, curve=curve)

    def forecast(
        self, news: News, cost_model: CostModel, config: PlannerConfig
    ) -> ProgressCurve | None:
        if self._job is None or self._tree is None:
            return None
        finished = zip(news.finished.tolist(), news.finished_tokens.tolist(), strict=True)
        in_flight = dict(zip(news.running.tolist(), news.running_tokens.tolist(), strict=True))
        plan = make_plan(
            self._job,
            cost_model,
            config,
            observed=self._observed | dict(finished),
            exclude=self._started.union(news.started.tolist()),
            tree=self._tree,
            running=_with_tokens(in_flight),
            sampled=self._sampled,
        )
        return progress_curve(plan, cost_model, config.kv_tokens, in_flight, self._prefill)

    def _gathered(self) -> Job:
        offsets = np.concatenate(([0], np.cumsum(_view(self._lengths, np.int64))))
        limits = _view(self._limits, np.int64)
        exact = _view(self._exact, np.int8).astype(bool)
        return Job.from_flat(
            _view(self._tokens, np.int32),
            offsets,
            limits,
            np.where(exact, limits, -1),
            self._runs(),
        )

    def _runs(self) -> MediaRuns:
        return MediaRuns(**{name: _view(values, np.int64) for name, values in self._media.items()})

    def _remember(self, plan: Plan) -> None:
        """Keep the tree, which does not change, and let go of the prompts, which it stands for."""
        n = len(self._lengths)
        limits = _view(self._limits, np.int64)
        exact = _view(self._exact, np.int8).astype(bool)
        self._job = Job.from_flat(
            np.empty(0, dtype=np.int32),
            np.zeros(n + 1, dtype=np.int64),
            limits,
            np.where(exact, limits, -1),
            self._runs(),
        )
        self._tree = plan.tree
        self._tokens = array("i")
        self._prefill = np.zeros(n, dtype=np.int64)
        self._compute, self._memory = np.zeros(n), np.zeros(n)

    def _as_walked(self, plan: Plan, cost_model: CostModel, started: Ints) -> JobPlan:
        lengths = _view(self._lengths, np.int64)
        self._prefill[plan.order] = lengths[plan.order] - plan.shared_with_previous
        self._compute[plan.order] = plan.compute_seconds
        self._memory[plan.order] = plan.memory_seconds
        dense = plan.request_density[plan.sample] >= plan.target_density
        # Numbers go on behind what was sent, and not behind what was only planned. One beyond
        # its own part has counted up by one for each request.
        first_due = 0
        if self._timetable is not None:
            first_due = self._timetable.due_after(started) + len(started)
        self._timetable = timetable = make_timetable(plan, plan.sample, first_due)
        return JobPlan(
            scanner=DualScanner(plan),
            timetable=timetable,
            sample={Side.LEFT: plan.sample[dense], Side.RIGHT: plan.sample[~dense]},
            density=plan.request_density,
            output_tokens=plan.estimated_output_tokens,
            likely_output_tokens=plan.likely_output_tokens,
            guessed=plan.guessed,
            prefill_tokens=self._prefill.copy(),
            compute_seconds=self._compute.copy(),
            memory_seconds=self._memory.copy(),
            bound_seconds=_bound_seconds(plan, cost_model),
            total_work_tokens=float(self._prefill.sum() + plan.estimated_output_tokens.sum()),
            prompt_tokens=plan.prompt_tokens,
            unique_tokens=plan.unique_tokens,
            sharing_best=plan.sharing_best,
            sharing_planned=plan.sharing_planned,
            latest_due=dict.fromkeys(Side, first_due),
        )


def _with_tokens(in_flight: Mapping[int, int]) -> dict[int, int]:
    return {position: tokens for position, tokens in in_flight.items() if tokens}


def _bound_seconds(plan: Plan, cost_model: CostModel) -> float:
    if cost_model.hardware.guess:
        return 0.0
    rest = plan.tree.subset(~np.isnan(plan.request_density[plan.tree.requests]))
    output = plan.estimated_output_tokens[rest.requests]
    compute = plan.encoder.compute_seconds(cost_model, rest.requests, rest.length, output)
    compute = compute - plan.encoder.saved_seconds(cost_model, rest.requests, rest.shared)
    return float(max(compute.sum(), cost_model.memory_seconds(rest.length, output).sum()))


def _view(values: array[Any], dtype: type) -> NDArray[Any]:
    return np.frombuffer(values, dtype=dtype) if values else np.empty(0, dtype=dtype)
