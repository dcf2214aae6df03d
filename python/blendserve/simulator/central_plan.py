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
    choose_second_sample,
    make_plan,
    sample_size,
)
from blendserve.planner.length_sample import COVERED_REQUESTS
from blendserve.policy.pacing import UNCERTAIN_GROWTH, UNCERTAIN_TOKENS

from .foresight import Foresight
from .lengths import LengthBook

Ints = NDArray[np.int64]
Floats = NDArray[np.float64]

# Replicas take runs of so many requests, so that those that share a prefix stay together; fewer
# where they are large, up to a thousandth of a replica's part of what is left, so that all replicas
# end together.
LEASE_REQUESTS = 16
LEASE_PART = 0.001
# A family is what stands under one node right below the root, if it has as many requests as the
# sample covers; all others are one family. Its lengths are known once so many of it have ended.
KNOWN_ANSWERS = 4


class CentralPlan:
    """One plan for all replicas of a job, which draw on both its ends.

    book: what is known of lengths. online: its knowledge comes from the job as it runs, sample
    first, and the job is planned again whenever `replan` is called; else there is one plan, with
    what the book knows. lengths: (n,) to plan with in place of the book's.
    """

    def __init__(
        self,
        job: Job,
        tree: PrefixTree,
        cost_model: CostModel,
        config: PlannerConfig,
        book: LengthBook,
        online: bool,
        replicas: int = 1,
        lengths: Ints | None = None,
        foresight: Foresight | None = None,
    ) -> None:
        self._job, self._tree, self._cost_model, self._config = job, tree, cost_model, config
        self.book = book
        self.online = online
        self.informed = not online  # Whether the plan rests on any lengths.
        self._foresight = foresight
        self._lease = LEASE_REQUESTS if replicas > 1 else 1
        self._leases: list[dict[Side, deque[int]]] = [
            {side: deque() for side in Side} for _ in range(replicas)
        ]
        self._returned: deque[int] = deque()
        self._running_work = np.zeros((2, replicas))
        self._started: set[int] = set()
        self._finished: dict[int, int] = {}
        self._family = _families(tree)
        self._ended = [0] * tree.num_nodes  # Requests of each family.
        if not online:
            job = self._with_lengths(book.means() if lengths is None else lengths)
        self._sampled: set[int] = set()
        self.sample: deque[int] = deque()
        # (n,) memory seconds of each request that its mean length does not show; of all that wait.
        self._spread = np.zeros(tree.num_leaves)
        self._spread_left = 0.0
        self._adopt(make_plan(job, cost_model, config, tree=tree))

    @property
    def waiting(self) -> int:
        """Requests that no replica has taken."""
        return self.scanner.remaining + len(self._returned)

    def rest(self, replica: int, compute: float, memory: float) -> tuple[float, float]:
        """A replica's part of what none has taken, (compute after sharing, memory) seconds, such
        that all end together. compute, memory: what its running requests have yet to do."""
        self._running_work[:, replica] = compute, memory
        waiting_compute, waiting_memory = self.scanner.remaining_seconds
        running_compute, load = self._running_work
        parts = _even_shares(waiting_memory + self._spread_left, load)
        even = _even_shares(waiting_compute, load + parts + running_compute)
        return float(even[replica]), float(parts[replica])

    def right_part(self, replica: int) -> float:
        """The same of the memory seconds at the memory end alone. Long decodes that no replica has
        started can bring all of them level only while this is not zero; what is shorter can make
        up for work, but not for steps."""
        low, high = self.scanner.cursors
        waiting = float(self._right[high + 1] - self._right[min(low, high + 1)])
        if waiting <= 0:
            waiting = self.scanner.remaining_seconds[1] + self._spread_left
        return float(_even_shares(waiting, self._running_work[1])[replica])

    def give_back(self, replica: int) -> None:
        """What a replica has been given of the memory end and has not started is for others."""
        lease = self._leases[replica][Side.RIGHT]
        self._returned.extend(lease)
        lease.clear()

    def upcoming(self, side: Side, replica: int) -> Iterator[int]:
        """The requests that come next on a side for a replica; the sample comes before all else."""
        while self.sample and self.sample[0] in self._started:
            self.sample.popleft()
        if self.sample:
            return iter((self.sample[0],) if side is Side.LEFT else ())
        if self._lease == 1:
            return self.scanner.upcoming(side)
        lease = self._leases[replica][side]
        if not lease and side is Side.RIGHT and self._returned:
            lease.append(self._returned.popleft())
        elif not lease:
            self._extend(lease, side)
        return iter(lease)

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

    def density(self, request: int) -> float:
        return float(self.plan.request_density[request])

    def take(self, request: int, side: Side, replica: int) -> None:
        """A replica starts this request, one of its next."""
        self._started.add(request)
        self._spread_left -= self._spread[request]
        if self._foresight is not None:
            self._foresight.started(request)
        if not self.scanner.remove(request):
            self._leases[replica][side].remove(request)

    def finished(self, request: int) -> None:
        length = self.book.true_length(request)
        self._finished[request] = length
        self._ended[self._family[request]] += 1

    def unknown(self, request: int) -> bool:
        """Whether too few of a request's family have ended to tell how long it may get."""
        return self.online and self._ended[self._family[request]] < KNOWN_ANSWERS

    def replan(self, running: Mapping[int, int]) -> None:
        """Plan what is left with what is known now; running: tokens so far."""
        if not self.waiting:
            return
        self.book.learn(self._finished, running)
        self.informed = True
        job = self._with_lengths(self._cautious(running))
        self._draw_second_part()
        plan = make_plan(
            job, self._cost_model, self._config, exclude=self._started, tree=self._tree
        )
        # The mean of a square is the square of the mean, and the variance.
        self._spread = self._cost_model.memory_seconds(0, self.book.deviations())
        self._spread_left = float(self._spread[plan.order].sum())
        self._adopt(plan)

    def _cautious(self, running: Mapping[int, int]) -> NDArray[np.float64]:
        """(n,) expected lengths; of families of which nothing is known yet, so long that they stand
        at the memory end: short ones would lose little there, long ones all at the other."""
        family = np.array(self._family)
        longest = np.zeros(self._tree.num_nodes)
        for request, tokens in running.items():
            at = self._family[request]
            longest[at] = max(longest[at], tokens)
        unknown = np.array(self._ended) < KNOWN_ANSWERS
        least = np.where(unknown, UNCERTAIN_GROWTH * np.maximum(longest, UNCERTAIN_TOKENS), 0.0)
        return np.asarray(np.maximum(self.book.means(), least[family]))

    def _draw_second_part(self) -> None:
        """More of the sample, once the first part has shown where lengths vary."""
        n = self._tree.num_leaves
        size = sample_size(n, self._config.sample_fraction, self._config.min_sample)
        if len(self._sampled) >= size:
            return
        sampled, free = np.zeros(n, dtype=bool), np.ones(n, dtype=bool)
        sampled[list(self._sampled)] = True
        free[list(self._started)] = False
        more = choose_second_sample(
            self._tree,
            size,
            self._config.seed,
            sampled,
            self.book.deviations(),
            self.book.means(),
            free & ~sampled,
        )
        self._name_sample(more)

    def _name_sample(self, requests: Ints) -> None:
        self.sample.extend(requests.tolist())
        self._sampled.update(requests.tolist())

    def _with_lengths(self, lengths: NDArray[np.float64] | Ints) -> Job:
        """The job with these lengths as known ones, so that none is sampled."""
        known = np.rint(lengths).astype(np.int64)
        return Job(self._job.token_ids, self._job.max_output_tokens, known)

    def _adopt(self, plan: Plan) -> None:
        self.plan = plan
        self._name_sample(plan.sample)
        self.scanner = DualScanner(plan)
        # (n + 1,) running sum of the memory seconds of requests below the job's density.
        right = plan.density < plan.target_density
        memory = plan.memory_seconds + self._spread[plan.order]
        self._right = np.concatenate(([0.0], np.cumsum(np.where(right, memory, 0.0))))
        for leases in self._leases:
            for lease in leases.values():
                lease.clear()
        self._returned.clear()
        if self._foresight is not None:
            self._foresight.follow(plan, self.scanner)


def _families(tree: PrefixTree) -> list[int]:
    """(n,) by request: the node right below the root that it stands under; 0 for small ones."""
    top = np.zeros(tree.num_nodes, dtype=np.int64)
    for nodes in tree.levels[1:]:
        above = tree.parent[nodes]
        top[nodes] = np.where(above == 0, nodes, top[above])
    top[(tree.end - tree.first)[top] < COVERED_REQUESTS] = 0
    family = np.empty(tree.num_leaves, dtype=np.int64)
    family[tree.requests] = top[tree.leaf_parent]
    found: list[int] = family.tolist()
    return found


def _even_shares(work: float, load: Floats) -> Floats:
    """(k,) parts of `work` that bring replicas with these loads as near together as may be."""
    ascending = np.sort(load)
    count = np.arange(1, len(load) + 1)
    # The level that so many of the least loaded reach together.
    level = (max(work, 0.0) + np.cumsum(ascending)) / count
    reached = int(np.flatnonzero(level >= ascending)[-1])
    return np.asarray(np.maximum(level[reached] - load, 0.0))
