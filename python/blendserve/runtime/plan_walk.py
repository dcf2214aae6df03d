"""A job's plan as it is walked: from both ends, the sample of each side first."""

from __future__ import annotations

from collections import deque
from collections.abc import Container, Iterable, Mapping
from dataclasses import dataclass

from blendserve.planner import DualScanner, Side
from blendserve.runtime.dispatcher import Turn
from blendserve.runtime.plan_tag import LengthUpdate, PlanTag, likely_tokens
from blendserve.runtime.plan_worker import JobPlan


@dataclass(frozen=True)
class Step:
    """A request whose turn it is.

    Attributes:
        position: its place in the work.
        density: of what it stands for.
        shares: it shares a prefix with the one before it on its side.
    """

    position: int
    density: float
    shares: bool


# Requests that come back from an engine that is gone, by side, the first to go again first.
Returned = Mapping[Side, deque[Step]]


class PlanWalk:
    """One plan, and how far it has been walked.

    Args:
        plan: its requests become this walk's to take.
        started: positions that started while it was made, and must not start again.
        sent: positions of requests that are on their way.
        returned: what goes before all else on its side, of this plan or of one before.

    Attributes:
        sampled: requests of the sample.
    """

    def __init__(
        self, plan: JobPlan, started: Iterable[int], sent: Container[int], returned: Returned
    ) -> None:
        for position in started:
            plan.scanner.remove(position)
        self.plan = plan
        self._returned = returned
        # Samples go first and their answers count like any other. Some may have started, or even
        # ended, while the plan that names them was made.
        self._sample = {side: deque(plan.sample[side].tolist()) for side in Side}
        named = [position for queue in self._sample.values() for position in queue]
        self._unseen = {p for p in named if p in plan.scanner or p in sent}
        self._sample_was_out = bool(self._unseen)
        self.sampled = len(named)

    @property
    def scanner(self) -> DualScanner:
        return self.plan.scanner

    @property
    def sample_is_in(self) -> bool:
        """There was a sample, and all of it has been answered."""
        return self._sample_was_out and not self._unseen

    def answered(self, position: int) -> None:
        self._unseen.discard(position)

    def density(self, side: Side) -> float | None:
        """Of the next request of a side; None if there is none."""
        if self._returned[side]:
            return self._returned[side][0].density
        sample = self._next_sampled(side)
        return self.scanner.density(side) if sample is None else self._density_of(sample)

    def take(self, side: Side) -> Step:
        """The next request of a side, which has one."""
        if self._returned[side]:
            return self._returned[side].popleft()
        sample = self._next_sampled(side)
        if sample is not None:
            density = self._density_of(sample)
            self.scanner.remove(sample)
            self._sample[side].popleft()
            return Step(sample, density, False)
        shares = self.scanner.shared_tokens(side) > 0
        density = self.scanner.density(side) or 0.0
        return Step(self.scanner.take(side), density, shares)

    def tag(
        self, job_id: str, step: Step, turn: Turn, updates: tuple[LengthUpdate, ...]
    ) -> PlanTag:
        """What the scheduler is told of a request, and by it of others."""
        plan, position = self.plan, step.position
        compute = float(plan.compute_seconds[position])
        memory = float(plan.memory_seconds[position])
        rest_compute, rest_memory = turn.waiting_seconds
        return PlanTag(
            side=turn.side,
            rank=turn.rank,
            density=step.density,
            output_tokens=float(plan.output_tokens[position]),
            likely_output_tokens=likely_tokens(plan.likely_output_tokens[position]),
            guessed=bool(plan.guessed[position]),
            compute_seconds=compute,
            memory_seconds=memory,
            rest_compute_seconds=max(rest_compute - compute, 0.0),
            rest_memory_seconds=max(rest_memory - memory, 0.0),
            # Of one that has come back, a later plan does not say who shares with it.
            use=plan.use_tag(job_id, turn.side, position) if self._is_foreseen(position) else None,
            updates=updates,
        )

    def _next_sampled(self, side: Side) -> int | None:
        """The next request of the sample on a side; the scan may have taken it before its turn."""
        queue = self._sample[side]
        while queue and queue[0] not in self.scanner:
            queue.popleft()
        return queue[0] if queue else None

    def _is_foreseen(self, position: int) -> bool:
        return bool(self.plan.timetable.index[position] >= 0)

    def _density_of(self, position: int) -> float:
        return float(self.plan.density[position])
