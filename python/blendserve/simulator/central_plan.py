"""The plan of a running job: both ends dealt out to replicas, lengths learnt, planned again."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator, Mapping

import numpy as np
from numpy.typing import NDArray

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
from blendserve.policy import Replanning

from .foresight import Foresight
from .lengths import LengthBook

Ints = NDArray[np.int64]
Floats = NDArray[np.float64]

# Replicas take runs of so many requests, so that those that share a prefix stay together; fewer
# where they are large, up to a thousandth of a replica's part of what is left, so that all replicas
# end together.
LEASE_REQUESTS = 16
LEASE_PART = 0.001


class CentralPlan:
    """One plan for all replicas of a job, which draw on both its ends.

    true: (n,) output tokens, told as requests end. book: what is known of lengths beforehand; None
    where the job itself shows them: its sample runs first, and it is planned again whenever
    `replan_due`. lengths: (n,) to plan with in place of the book's. likely: whether a request may
    be expected to have one of several lengths.
    """

    def __init__(
        self,
        job: Job,
        tree: PrefixTree,
        cost_model: CostModel,
        config: PlannerConfig,
        true: Ints,
        book: LengthBook | None = None,
        replicas: int = 1,
        lengths: Floats | None = None,
        foresight: Foresight | None = None,
        likely: bool = True,
    ) -> None:
        self._job, self._tree, self._cost_model, self._config = job, tree, cost_model, config
        self._true, self._book, self._likely = true, book, likely
        self._foresight = foresight
        self._lease = LEASE_REQUESTS if replicas > 1 else 1
        self._leases: list[dict[Side, deque[int]]] = [
            {side: deque() for side in Side} for _ in range(replicas)
        ]
        self._returned: deque[int] = deque()
        self._running_work = np.zeros((2, replicas))
        self._started: set[int] = set()
        self._finished: dict[int, int] = {}
        self._sampled: set[int] = set()
        self._sample: dict[Side, deque[int]] = {side: deque() for side in Side}
        self._unseen: set[int] = set()  # Of the latest sample, those that have not been answered.
        self._sample_was_out = False
        # (n,) of the last plan with the request in it.
        self._compute, self._memory = np.zeros(tree.num_leaves), np.zeros(tree.num_leaves)
        self._density = np.zeros(tree.num_leaves)
        if book is not None:
            known = np.rint(book.means() if lengths is None else lengths).astype(np.int64)
            job = Job(job.token_ids, job.max_output_tokens, known)
        self._adopt(make_plan(job, cost_model, config, tree=tree))
        self._replanning = Replanning(len(self._sampled))

    @property
    def waiting(self) -> int:
        """Requests that no replica has taken."""
        return self.scanner.remaining + len(self._returned)

    # -- what is known of a request -------------------------------------------------------------

    def density(self, request: int) -> float:
        return float(self._density[request])

    def compute_seconds(self, request: int) -> float:
        """After sharing."""
        return float(self._compute[request])

    def memory_seconds(self, request: int) -> float:
        return float(self._memory[request])

    def limit(self, request: int) -> float:
        """Output tokens that it may not exceed."""
        return float(self._job.max_output_tokens[request])

    def guessed(self, request: int) -> bool:
        """Whether nothing tells yet how long it gets."""
        return self._book is None and bool(self.plan.guessed[request])

    def expected(self, request: int) -> tuple[float, list[float]]:
        """(mean, likely) output tokens; see `Candidate`."""
        if self._book is not None:
            mean, likely = self._book.mean(request), self._book.outcomes(request)
        else:
            mean = float(self.plan.estimated_output_tokens[request])
            likely = self.plan.likely_output_tokens[request].tolist()
        varies = self._likely and likely[0] < likely[-1]
        return mean, likely if varies else []

    # -- replicas ---------------------------------------------------------------------------------

    def runs(self, replica: int, compute: float, memory: float) -> None:
        """What a replica's running requests have yet to do, in seconds."""
        self._running_work[:, replica] = compute, memory

    def rest(self, replica: int) -> tuple[float, float]:
        """A replica's part of what none has taken, (compute after sharing, memory) seconds, such
        that all end together."""
        waiting_compute, waiting_memory = self.scanner.remaining_seconds
        if len(self._leases) == 1:
            return waiting_compute, waiting_memory
        running_compute, load = self._running_work
        parts = _even_shares(waiting_memory, load)
        even = _even_shares(waiting_compute, load + parts + running_compute)
        return float(even[replica]), float(parts[replica])

    def right_part(self, replica: int) -> float:
        """The same of the memory seconds at the memory end alone. Long decodes that no replica has
        started can bring all of them level only while this is not zero; what is shorter can make
        up for work, but not for steps."""
        low, high = self.scanner.cursors
        waiting = float(self._right[high + 1] - self._right[min(low, high + 1)])
        if waiting <= 0:
            waiting = self.scanner.remaining_seconds[1]
        return float(_even_shares(waiting, self._running_work[1])[replica])

    def give_back(self, replica: int) -> None:
        """What a replica has been given of the memory end and has not started is for others."""
        lease = self._leases[replica][Side.RIGHT]
        self._returned.extend(lease)
        lease.clear()

    def upcoming(self, side: Side, replica: int) -> Iterator[int]:
        """The requests that come next on a side for a replica; its sample comes before all else."""
        sample = self._sample[side]
        while sample and sample[0] in self._started:
            sample.popleft()
        yield from sample
        if self._lease == 1:
            first = set(sample)
            yield from (request for request in self.scanner.upcoming(side) if request not in first)
            return
        if sample:
            return
        lease = self._leases[replica][side]
        if not lease and side is Side.RIGHT and self._returned:
            lease.append(self._returned.popleft())
        elif not lease:
            self._extend(lease, side)
        yield from lease

    def head(self, side: Side, replica: int) -> int | None:
        """The next of them."""
        return next(self.upcoming(side, replica), None)

    def _extend(self, lease: deque[int], side: Side) -> None:
        before = sum(self.scanner.remaining_seconds)
        most = before * LEASE_PART / len(self._leases)
        while self.scanner.remaining and len(lease) < self._lease:
            lease.append(self.scanner.take(side))
            if before - sum(self.scanner.remaining_seconds) > most:
                break

    def take(self, request: int, side: Side, replica: int) -> None:
        """A replica starts this request, one of its next."""
        self._started.add(request)
        if self._foresight is not None:
            self._foresight.started(request)
        if not self.scanner.remove(request):
            self._leases[replica][side].remove(request)

    def finished(self, request: int) -> None:
        self._finished[request] = int(self._true[request])
        self._unseen.discard(request)

    # -- plans ------------------------------------------------------------------------------------

    @property
    def replan_due(self) -> bool:
        """Whether it is time for `replan`."""
        sample_is_in = self._sample_was_out and not self._unseen
        return (
            self._book is None
            and self.waiting > 0
            and self._replanning.due(len(self._finished), sample_is_in)
        )

    def replan(self, running: Mapping[int, int]) -> None:
        """Plan what is left with what is known now; running: tokens so far."""
        self._replanning.begins(len(self._finished), len(self._sampled))
        plan = make_plan(
            self._job,
            self._cost_model,
            self._config,
            observed=self._finished,
            exclude=self._started,
            tree=self._tree,
            running=running,
            sampled=self._sampled,
        )
        self._adopt(plan)

    def _adopt(self, plan: Plan) -> None:
        self.plan = plan
        self.scanner = DualScanner(plan)
        sample = plan.sample.tolist()
        self._sampled.update(sample)
        dense = plan.request_density[plan.sample] >= plan.target_density
        self._sample = {
            Side.LEFT: deque(plan.sample[dense].tolist()),
            Side.RIGHT: deque(plan.sample[~dense].tolist()),
        }
        self._unseen, self._sample_was_out = set(sample), bool(sample)
        self._compute[plan.order] = plan.compute_seconds
        self._memory[plan.order] = plan.memory_seconds
        self._density[plan.order] = plan.density
        # (n + 1,) running sum of the memory seconds of requests below the job's density.
        right = plan.density < plan.target_density
        memory = np.where(right, plan.memory_seconds, 0.0)
        self._right = np.concatenate(([0.0], np.cumsum(memory)))
        for leases in self._leases:
            for lease in leases.values():
                lease.clear()
        self._returned.clear()
        if self._foresight is not None:
            self._foresight.follow(plan, self.scanner)


def _even_shares(work: float, load: Floats) -> Floats:
    """(k,) parts of `work` that bring replicas with these loads as near together as may be."""
    ascending = np.sort(load)
    count = np.arange(1, len(load) + 1)
    # The level that so many of the least loaded reach together.
    level = (max(work, 0.0) + np.cumsum(ascending)) / count
    reached = int(np.flatnonzero(level >= ascending)[-1])
    return np.asarray(np.maximum(level[reached] - load, 0.0))
