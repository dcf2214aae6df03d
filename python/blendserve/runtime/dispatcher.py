"""Shares the scheduler's two queues between the jobs of a server, and blends across them.

Each side goes to the job whose scan end lies furthest out: on the left the one with the highest
compute density, on the right the one with the lowest, so that the left end of one job runs with
the right end of another. A job that may miss its deadline goes first on both sides.
"""

from __future__ import annotations

import asyncio
import math
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

from blendserve.planner import Side
from blendserve.runtime.credits import Credits
from blendserve.runtime.pacing import Pacer

# A deadline is in danger when less than this much more than the predicted time is left.
_DEADLINE_MARGIN = 1.25
# A side stays with a job until another's scan end lies further out by this factor: requests that
# share a prefix with the one before are cheapest right behind it.
_SWITCH = 1.25
# The cost model's seconds count as a pace measured over this long, until a measured one outweighs.
_PRIOR_PACE_SECONDS = 10.0


@dataclass(frozen=True)
class Turn:
    """A job's leave to send one request.

    Attributes:
        side, rank: the queue, and the request's number in it.
        waiting_seconds: (compute, memory) of what all jobs have left to send, this one included.
    """

    side: Side
    rank: int
    waiting_seconds: tuple[float, float]


@dataclass(frozen=True)
class DispatchView:
    """What of the dispatcher is shown to an operator.

    Attributes:
        target_density: of what all jobs have left to send; inf where nothing of it decodes.
        densities: of the outermost scan end of each side ("left", "right"); None when nothing is
            left.
        queued, available: requests of each side that the scheduler has not taken from its queue,
            and how many more may be sent to it now.
        pace: see `Dispatcher.pace`.
        urgent: ids of the jobs that go first for their deadlines.
    """

    target_density: float
    densities: dict[str, float | None]
    queued: dict[str, int]
    available: dict[str, int]
    pace: float
    urgent: list[str]


class DispatchedJob(Protocol):
    """A job as the dispatcher sees it. Everything is O(1) and runs on the event loop."""

    @property
    def job_id(self) -> str: ...

    @property
    def deadline(self) -> float | None:
        """Unix seconds, None for a job without haste."""
        ...

    @property
    def in_flight(self) -> int: ...

    @property
    def unsent(self) -> int:
        """Planned requests that have not been sent."""
        ...

    @property
    def work_seconds_left(self) -> float:
        """Compute and memory seconds of what has not ended, by the cost model."""
        ...

    @property
    def work_seconds_done(self) -> float: ...

    @property
    def waiting_seconds(self) -> tuple[float, float]:
        """Compute and memory seconds of what has not been sent."""
        ...

    def density(self, side: Side) -> float | None:
        """Of the request that `send` would send; None while there is none."""
        ...

    def send(self, turn: Turn) -> None: ...

    def send_unplanned(self) -> bool:
        """Send a line that has no place in the plan; False when there is none, or no room."""
        ...


class Dispatcher:
    """Sends the lines of all running jobs, as credits allow. Use it in one event loop.

    Args:
        credits: what the scheduler will take.
        pacer: gives each line its turn on the event loop.
        clock: unix seconds.
    """

    def __init__(
        self, credits: Credits, pacer: Pacer, clock: Callable[[], float] = time.time
    ) -> None:
        self.credits = credits
        self._pacer = pacer
        self._clock = clock
        self._jobs: list[DispatchedJob] = []
        self._wake = asyncio.Event()
        self._task: asyncio.Task[None] | None = None
        self._ranks = dict.fromkeys(Side, 0)
        self._last: dict[Side, DispatchedJob | None] = dict.fromkeys(Side)
        self._busy_since = 0.0
        self._done_by_former_jobs = 0.0

    def join(self, job: DispatchedJob) -> None:
        """Begin to send the lines of a job."""
        if not self._jobs:
            self._busy_since, self._done_by_former_jobs = self._clock(), 0.0
            self._task = asyncio.create_task(self._run())
        self._jobs.append(job)
        self.wake()

    def leave(self, job: DispatchedJob) -> None:
        """Forget a job that has nothing in flight any more."""
        self._jobs.remove(job)
        self._done_by_former_jobs += job.work_seconds_done
        for side in Side:
            if self._last[side] is job:
                self._last[side] = None
        if not self._jobs and self._task is not None:
            self._task.cancel()
            self._task = None
        self.wake()

    def wake(self) -> None:
        """There may be something to send: a report, an answer or a plan came."""
        self._wake.set()

    @property
    def target_density(self) -> float:
        """Of what has not been sent, of all jobs together; inf where nothing of it decodes."""
        compute, memory = self.waiting_seconds
        return compute / memory if memory > 0 else math.inf

    @property
    def waiting_seconds(self) -> tuple[float, float]:
        """Compute and memory seconds of what has not been sent, of all jobs together."""
        seconds = [job.waiting_seconds for job in self._jobs]
        return sum(compute for compute, _ in seconds), sum(memory for _, memory in seconds)

    @property
    def pace(self) -> float:
        """Seconds of the cost model (compute and memory) that pass in a second, since the first of
        the jobs that overlap with those of now."""
        done = self._done_by_former_jobs + sum(job.work_seconds_done for job in self._jobs)
        elapsed = max(self._clock() - self._busy_since, 0.0)
        return (done + _PRIOR_PACE_SECONDS) / (elapsed + _PRIOR_PACE_SECONDS)

    def urgent(self) -> list[DispatchedJob]:
        """The jobs that must go first for every deadline to be kept, the most urgent first.

        Run one after the other by deadline, the jobs end as early as their deadlines allow; the
        last one that is late that way, or nearly so, and all before it may not share.
        """
        now, pace = self._clock(), self.pace
        due = [(job.deadline, job) for job in self._jobs if job.deadline is not None]
        due.sort(key=lambda item: item[0])  # Stable: equal deadlines by submission.
        seconds, pressed = 0.0, 0
        for count, (deadline, job) in enumerate(due, start=1):
            seconds += job.work_seconds_left / pace
            if now + _DEADLINE_MARGIN * seconds >= deadline:
                pressed = count
        return [job for _, job in due[:pressed]]

    def view(self) -> DispatchView:
        """For the operator."""
        left = [density for job in self._jobs if (density := job.density(Side.LEFT)) is not None]
        right = [density for job in self._jobs if (density := job.density(Side.RIGHT)) is not None]
        return DispatchView(
            target_density=self.target_density,
            densities={"left": max(left, default=None), "right": min(right, default=None)},
            queued={side.value: self.credits.queued(side) for side in Side},
            available={side.value: self._available(side) for side in Side},
            pace=self.pace,
            urgent=[job.job_id for job in self.urgent()],
        )

    # -- sending -------------------------------------------------------------------------------

    async def _run(self) -> None:
        while True:
            await self._wake.wait()
            self._wake.clear()
            if not any(job.in_flight for job in self._jobs):
                # Nothing of this server's batches can be in the queues.
                self.credits.settle()
            while self._send_next():
                await self._pacer.turn()

    def _send_next(self) -> bool:
        """Send one line; False when none may go."""
        if not self.credits.replicas:
            return False
        if any(job.send_unplanned() for job in self._jobs):
            return True
        for side in sorted(Side, key=self._available, reverse=True):
            if self._available(side) > 0 and (job := self._choose(side)) is not None:
                turn = Turn(side, self._ranks[side], self.waiting_seconds)
                self._ranks[side] += 1
                self._last[side] = job
                job.send(turn)
                return True
        return False

    def _available(self, side: Side) -> int:
        return self.credits.available(side, sum(job.unsent for job in self._jobs))

    def _choose(self, side: Side) -> DispatchedJob | None:
        """The job whose next request goes to this side; None when no job has one."""
        urgent = self.urgent()
        for job in urgent:
            if job.density(side) is not None:
                return job
        heads = [(density, job) for job in self._jobs if (density := job.density(side)) is not None]
        # The first of equal ones is the one submitted first.
        furthest = max if side is Side.LEFT else min
        best, chosen = furthest(heads, key=lambda head: head[0], default=(0.0, None))
        for density, job in heads:
            if job is self._last[side]:
                near = density * _SWITCH >= best if side is Side.LEFT else density <= best * _SWITCH
                return job if near else chosen
        return chosen
