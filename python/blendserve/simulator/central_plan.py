"""The plan of a running job: both ends dealt out to replicas, lengths learnt, planned again."""

from __future__ import annotations

from collections import deque
from collections.abc import Mapping

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

from .foresight import Foresight
from .lengths import LengthBook

# Replicas take runs of so many requests, so that those that share a prefix stay together.
LEASE_REQUESTS = 16


class CentralPlan:
    """One plan for all replicas of a job, which draw on both its ends.

    online: the sample runs first, its answers and all later ones are used when the job is planned
    again. Else the sample's lengths are known from the start and used for the one plan there is,
    which favours a policy. lengths: what to plan with, in place of all that.
    """

    def __init__(
        self,
        job: Job,
        tree: PrefixTree,
        cost_model: CostModel,
        config: PlannerConfig,
        book: LengthBook,
        replicas: int = 1,
        online: bool = True,
        lengths: Mapping[int, int] | None = None,
        foresight: Foresight | None = None,
    ) -> None:
        self._job, self._tree, self._cost_model, self._config = job, tree, cost_model, config
        self.book = book
        self._foresight = foresight
        self._lease = LEASE_REQUESTS if replicas > 1 else 1
        self._leases: list[dict[Side, deque[int]]] = [
            {side: deque() for side in Side} for _ in range(replicas)
        ]
        self._started: set[int] = set()
        self._finished: dict[int, int] = {}
        self.longest_finished = 0
        self.online = online
        self.sample: deque[int] = deque()
        if lengths is not None:
            self._finished.update(lengths)
        self._plan_again({})
        if lengths is not None:
            self._finished.clear()
        elif online:
            self.sample.extend(self.plan.sample.tolist())

    @property
    def waiting(self) -> int:
        """Requests that no replica has taken."""
        return self.scanner.remaining

    def rest(self) -> tuple[float, float]:
        """(compute after sharing, memory) seconds of what no replica has taken."""
        return self.scanner.rest

    def head(self, side: Side, replica: int) -> int | None:
        """The next request of a side for a replica; the sample comes before all else."""
        while self.sample and self.sample[0] in self._started:
            self.sample.popleft()
        if self.sample:
            return self.sample[0] if side is Side.LEFT else None
        lease = self._leases[replica][side]
        while lease and lease[0] in self._started:
            lease.popleft()
        if not lease and self._lease == 1:
            return self.scanner.head(side)
        while not lease and self.scanner.remaining:
            for _ in range(min(self._lease, self.scanner.remaining)):
                lease.append(self.scanner.take(side))
        return lease[0] if lease else None

    def density(self, request: int) -> float:
        return float(self.plan.request_density[request])

    def take(self, request: int, side: Side, replica: int) -> None:
        """A replica starts this request, its head."""
        self._started.add(request)
        if self._foresight is not None:
            self._foresight.started(request)
        if not self.scanner.remove(request):
            lease = self._leases[replica][side]
            if lease and lease[0] == request:
                lease.popleft()

    def finished(self, request: int) -> None:
        length = self.book.true_length(request)
        self._finished[request] = length
        self.longest_finished = max(self.longest_finished, length)

    def replan(self, running: Mapping[int, int]) -> None:
        """Plan what is left with what is known now; running: tokens so far."""
        if self.scanner.remaining:
            self.book.learn(self._finished, running)
            self._plan_again(running)

    def _plan_again(self, running: Mapping[int, int]) -> None:
        self.plan: Plan = make_plan(
            self._job,
            self._cost_model,
            self._config,
            observed=self._finished,
            exclude=self._started,
            tree=self._tree,
            running=running,
        )
        self.scanner = DualScanner(self.plan)
        if self._foresight is not None:
            self._foresight.follow(self.plan, self.scanner)
        for leases in self._leases:
            for lease in leases.values():
                lease.clear()
