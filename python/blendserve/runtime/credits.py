"""Credits: how many requests the front process may send to each queue of the scheduler."""

from __future__ import annotations

from collections import Counter

from blendserve.planner import Side
from blendserve.runtime.feedback import SchedulerReport

_MIN_DEPTH = 16
_MAX_DEPTH = 1024
_DEPTH_PER_STEP = 4
# A request that has not shown up in a queue after so many reports never will.
_LOST_AFTER_REPORTS = 64


class Credits:
    """Keeps each queue of the scheduler a few steps deep, and no deeper.

    What is queued can no longer be re-planned, and what is not queued cannot be admitted; so the
    depth follows the most requests that one report said were admitted, times a margin for the
    way there.
    """

    def __init__(self) -> None:
        self._sent: Counter[Side] = Counter()
        self._taken: dict[int, Counter[Side]] = {}
        self._depth: dict[Side, int] = dict.fromkeys(Side, _MIN_DEPTH)
        self._waiting: dict[int, dict[str, int]] = {}
        self._quiet_reports = dict.fromkeys(Side, 0)

    def sent(self, side: Side, sequences: int) -> None:
        """Record that ``sequences`` engine requests went to a side."""
        self._sent[side] += sequences
        self._quiet_reports[side] = 0

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

    def available(self, side: Side) -> int:
        return self._depth[side] - self.queued(side)

    def settle(self) -> None:
        """Nothing is in flight: forget any difference between what was sent and counted."""
        for side in Side:
            self._sent[side] -= self.queued(side)
