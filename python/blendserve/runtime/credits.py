"""Credits: how many requests the front process may send to each queue of the scheduler."""

from __future__ import annotations

import math
from collections import Counter

from blendserve.planner import Side
from blendserve.runtime.feedback import SchedulerReport

_MIN_DEPTH = 16
_MAX_DEPTH = 1024
_DEPTH_PER_STEP = 4
# Of what a job has left, a queue holds no more than this part: the rest stays with the front that
# reaches it first. Else the last requests of a small job would all wait on one side.
_DEPTH_PER_REMAINING = 0.25
# With its prefix a request follows those before it to their replica, until that has so much more to
# do than the one with the least: this part of what it has, and so many requests at least.
_UNEVEN_PART = 0.25
_UNEVEN_REQUESTS = 16
# A request that has not shown up in a queue after so many reports never will.
_LOST_AFTER_REPORTS = 64


class Credits:
    """Keeps each queue of the scheduler a few steps deep, and no deeper.

    What is queued can no longer be re-planned, and what is not queued cannot be admitted; so the
    depth follows the most requests that one report said were admitted, times a margin for the
    way there, and is less towards the end.

    Args:
        replicas: data-parallel schedulers, each with queues of its own.
    """

    def __init__(self, replicas: int = 1) -> None:
        self._replicas = replicas
        # To each replica, as far as it was chosen here; and the latest choice.
        self._sent_to = {side: [0] * replicas for side in Side}
        self._latest = dict.fromkeys(Side, 0)
        # Sent to each replica, as far as it was chosen here, and not answered.
        self._unanswered = [0] * replicas
        self._sent: Counter[Side] = Counter()
        self._taken: dict[int, Counter[Side]] = {}
        self._depth: dict[Side, int] = dict.fromkeys(Side, _MIN_DEPTH)
        self._waiting: dict[int, dict[str, int]] = {}
        self._quiet_reports = dict.fromkeys(Side, 0)

    def sent(self, side: Side, sequences: int) -> None:
        """Record that ``sequences`` engine requests went to a side."""
        self._sent[side] += sequences
        self._quiet_reports[side] = 0

    def replica(self, side: Side, sequences: int, shares: bool) -> int | None:
        """The replica that a request of a side should go to; None where there is only one.

        It is the one of the request before if `shares`, that is, if it finds a prefix there, while
        that replica's queue is not full and it has not much more to do than others: what starts at
        once leaves no queue, and the others would be idle. Else it is the one with the least to do
        of those whose queues are not full.
        """
        if self._replicas == 1:
            return None
        sent = self._sent_to[side]
        queued = [sent[k] - self._taken.get(k, Counter())[side] for k in range(self._replicas)]
        full = [count >= self._depth[side] for count in queued]
        latest, busy = self._latest[side], self._unanswered
        uneven = busy[latest] - min(busy) >= max(_UNEVEN_PART * busy[latest], _UNEVEN_REQUESTS)
        if not shares or full[latest] or uneven:
            latest = min(range(self._replicas), key=lambda k: (full[k], busy[k], queued[k]))
            self._latest[side] = latest
        sent[latest] += sequences
        busy[latest] += sequences
        return latest

    def answered(self, replica: int | None, sequences: int) -> None:
        """Record that a request of this replica has ended, however it did."""
        if replica is not None:
            self._unanswered[replica] -= sequences

    def refused(self, side: Side, sequences: int) -> None:
        """Take ``sent`` back: the server answered with an error, before any queue."""
        self._sent[side] -= sequences

    def on_report(self, report: SchedulerReport) -> None:
        before = self._taken.get(report.dp_rank, Counter())
        taken = Counter({side: report.taken[side.value] for side in Side})
        self._taken[report.dp_rank] = taken
        for side in Side:
            admitted = taken[side] - before[side]
            self._depth[side] = min(max(self._depth[side], _DEPTH_PER_STEP * admitted), _MAX_DEPTH)
            if self.queued(side) < 0:
                # More was taken than is known to be sent: a report came after `settle`.
                self._sent[side] -= self.queued(side)
        self._waiting[report.dp_rank] = report.queued
        self._write_off_the_lost()

    def _write_off_the_lost(self) -> None:
        """Requests that ended on their way, as those of a cancelled job can, must not take credits
        for ever while other jobs go on."""
        for side in Side:
            empty = not any(waiting[side.value] for waiting in self._waiting.values())
            self._quiet_reports[side] = self._quiet_reports[side] + 1 if empty else 0
            if self._quiet_reports[side] >= _LOST_AFTER_REPORTS:
                self._sent[side] -= self.queued(side)

    def queued(self, side: Side) -> int:
        """Requests sent to a side that the scheduler has not yet taken from its queue."""
        return self._sent[side] - sum(taken[side] for taken in self._taken.values())

    def available(self, side: Side, remaining: float = math.inf) -> int:
        """Requests that may be sent to a side now, where so many have not been sent."""
        enough = max(_DEPTH_PER_REMAINING * remaining / self._replicas, _MIN_DEPTH)
        return int(min(self._depth[side], enough)) * self._replicas - self.queued(side)

    def settle(self) -> None:
        """Nothing is in flight: forget any difference between what was sent and counted."""
        self._unanswered = [0] * self._replicas
        for side in Side:
            self._sent[side] -= self.queued(side)
            for replica, taken in self._taken.items():
                self._sent_to[side][replica] = taken[side]
