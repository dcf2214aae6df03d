"""Credits: how many requests the engine process may send to each queue of the scheduler."""

from __future__ import annotations

import math
from collections import Counter

from blendserve.planner import Side
from blendserve.runtime.feedback import SchedulerReport

_MIN_DEPTH = 16
_MAX_DEPTH = 1024
_DEPTH_PER_STEP = 4
# Of what a job has left, a queue holds no more than this part: the rest stays with the scan end
# that reaches it first. Else the last requests of a small job would all wait on one side.
_DEPTH_PER_REMAINING = 0.25
# With its prefix a request follows those before it to their replica, until that has so much more to
# do than the one with the least: this part of what it has, and so many requests at least.
_UNEVEN_PART = 0.25
_UNEVEN_REQUESTS = 16
# A request that has not shown up in a queue after so many reports never will.
_LOST_AFTER_REPORTS = 64
_NOTHING: Counter[Side] = Counter()


class Credits:
    """Keeps each queue of the scheduler a few steps deep, and no deeper.

    What is queued can no longer be re-planned, and what is not queued cannot be admitted; so the
    depth follows the most requests that one report said were admitted, times a margin for the
    way there, and is less towards the end.

    Replicas are numbers, and a report's ``dp_rank`` is one of them. They may come and go.

    Args:
        replicas: schedulers that are there from the beginning, each with queues of its own: 0, 1
            and so on. 0: all of them `join` later.
    """

    def __init__(self, replicas: int = 1) -> None:
        # Where there is only ever one, there is no choice to make.
        self._alone = replicas == 1
        self._next = replicas
        # To each replica, as far as it was chosen here; and the latest choice.
        self._sent_to = {replica: Counter[Side]() for replica in range(replicas)}
        self._latest: dict[Side, int | None] = dict.fromkeys(Side)
        # Sent to each replica, as far as it was chosen here, and not answered.
        self._unanswered = dict.fromkeys(range(replicas), 0)
        self._sent: Counter[Side] = Counter()
        self._taken: dict[int, Counter[Side]] = {}
        self._depth: dict[Side, int] = dict.fromkeys(Side, _MIN_DEPTH)
        self._waiting: dict[int, dict[str, int]] = {}
        self._quiet_reports = dict.fromkeys(Side, 0)

    def join(self) -> int:
        """One more replica, which has nothing to do; its number, which no other one has had."""
        replica, self._next = self._next, self._next + 1
        self._alone = False
        self._sent_to[replica] = Counter()
        self._unanswered[replica] = 0
        return replica

    def leave(self, replica: int) -> None:
        """Forget a replica, and what it has in its queues. Raises KeyError if it is not there."""
        sent, taken = self._sent_to.pop(replica), self._taken.pop(replica, Counter())
        del self._unanswered[replica]
        self._waiting.pop(replica, None)
        for side in Side:
            # What was sent but not taken here; of what has been written off there is none.
            others = self._sent[side] - sum(each[side] for each in self._taken.values())
            queued = max(sent[side] - taken[side], 0)
            self._sent[side] -= taken[side] + min(queued, max(others - taken[side], 0))
            if self._latest[side] == replica:
                self._latest[side] = None

    @property
    def replicas(self) -> int:
        """Schedulers that are there now."""
        return len(self._sent_to)

    def sent(self, side: Side, sequences: int) -> None:
        """Record that ``sequences`` engine requests went to a side."""
        self._sent[side] += sequences
        self._quiet_reports[side] = 0

    def replica(self, side: Side, sequences: int, shares: bool) -> int | None:
        """The replica that a request of a side should go to; None where there is only ever one.

        It is the one of the request before if `shares`, that is, if it finds a prefix there, while
        that replica's queue is not full and it has not much more to do than others: what starts at
        once leaves no queue, and the others would be idle. Else it is the one with the least to do
        of those whose queues are not full. So a slow one, whose requests are answered later, is
        given fewer.
        """
        if self._alone:
            return None
        queued = {k: sent[side] - self._taken_by(k)[side] for k, sent in self._sent_to.items()}
        full = {k: count >= self._depth[side] for k, count in queued.items()}
        latest, busy = self._latest[side], self._unanswered
        if latest is None or not shares or full[latest] or self._is_ahead(latest):
            latest = min(queued, key=lambda k: (full[k], busy[k], queued[k]))
            self._latest[side] = latest
        self._sent_to[latest][side] += sequences
        busy[latest] += sequences
        return latest

    def _is_ahead(self, replica: int) -> bool:
        busy = self._unanswered[replica]
        return busy - min(self._unanswered.values()) >= max(_UNEVEN_PART * busy, _UNEVEN_REQUESTS)

    def _taken_by(self, replica: int) -> Counter[Side]:
        return self._taken.get(replica, _NOTHING)

    def answered(self, replica: int | None, sequences: int) -> None:
        """Record that a request of this replica has ended, however it did."""
        if replica is not None and replica in self._unanswered:
            self._unanswered[replica] -= sequences

    def refused(self, side: Side, sequences: int, replica: int | None = None) -> None:
        """Take ``sent`` back: the server answered with an error, before any queue. Of a replica
        that has left, all has been taken back."""
        if replica is not None:
            if replica not in self._sent_to:
                return
            self._sent_to[replica][side] -= sequences
        self._sent[side] -= sequences

    def on_report(self, report: SchedulerReport) -> None:
        before = self._taken_by(report.dp_rank)
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
                for replica, sent in self._sent_to.items():
                    sent[side] = self._taken_by(replica)[side]

    def queued(self, side: Side) -> int:
        """Requests sent to a side that the scheduler has not yet taken from its queue."""
        return self._sent[side] - sum(taken[side] for taken in self._taken.values())

    def available(self, side: Side, remaining: float = math.inf) -> int:
        """Requests that may be sent to a side now, where so many have not been sent."""
        replicas = self.replicas
        if not replicas:
            return 0
        enough = max(_DEPTH_PER_REMAINING * remaining / replicas, _MIN_DEPTH)
        return int(min(self._depth[side], enough)) * replicas - self.queued(side)

    def settle(self) -> None:
        """Nothing is in flight: forget any difference between what was sent and counted."""
        self._unanswered = dict.fromkeys(self._unanswered, 0)
        for side in Side:
            self._sent[side] -= self.queued(side)
            for replica, sent in self._sent_to.items():
                sent[side] = self._taken_by(replica)[side]
