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

        It is the one of the request before if `shares`, that is, if it finds a prefix there, and if
        that replica's queue is not full; else the one with the shortest queue.
        """
        if self._replicas == 1:
            return None
        sent = self._sent_to[side]
        queued = [sent[k] - self._taken.get(k, Counter())[side] for k in range(self._replicas)]
        latest = self._latest[side]
        if not shares or queued[latest] >= self._depth[side]:
            latest = self._latest[side] = queued.index(min(queued))
        sent[latest] += sequences
        return latest

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
        for side in Side:
            self._sent[side] -= self.queued(side)
            for replica, taken in self._taken.items():
                self._sent_to[side][replica] = taken[side]
