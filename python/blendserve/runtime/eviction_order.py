"""Which leaf of the radix tree goes next: Belady for what the plan knows, SGLang's policy else.

Every leaf has a distance to its next use, in requests. For a planned leaf it is the number of the
request that needs it less the number that this request's end has reached; infinite if none does.
A scan end that has not moved for longer than that is as far away as it has been idle. For a leaf
that online requests use, the distance is taken to be the time since its last use, which is what
LRU assumes; among themselves these keep the order of SGLang's policy. A leaf of both kinds has the
shorter distance. The leaf with the longest distance goes first.

Every decision depends on counters only, no clock: the ranks of a tensor-parallel group agree.
"""

from __future__ import annotations

import heapq
import math
from collections.abc import Callable, Collection
from dataclasses import dataclass
from typing import Any

from blendserve.planner import Side

NEVER = math.inf
# A heap with more entries than this is swept of outdated ones whenever it has doubled.
_SWEEP_FROM = 1024
# Scan ends to know by name. A job that comes back after it was forgotten only starts anew.
_MOST_SCAN_ENDS = 256


@dataclass(slots=True)
class NodeFuture:
    """What is known of the next use of a node's tokens.

    Attributes:
        due: number of the next planned request that needs them; NEVER if none does; None if no
            planned request has used them, or the one that should have did not come.
        scan_end: where that request comes from; None without one.
        as_of: number of the planned request that said so.
        used_at: tick of the last use by any request.
        online: a request without a plan has used them.
        entry: heap, key and serial number of its one valid entry in the order.
    """

    due: float | None = None
    scan_end: ScanEnd | None = None
    as_of: int = -1
    used_at: int = 0
    online: bool = False
    entry: tuple[_LazyHeap, Any, int] | None = None

    def copy(self) -> NodeFuture:
        """For a node split off; it has no entry yet."""
        return NodeFuture(self.due, self.scan_end, self.as_of, self.used_at, self.online)


class _LazyHeap:
    """Entries (key, serial, leaf) of which only those whose serial is the leaf's own count."""

    def __init__(self) -> None:
        self.entries: list[tuple[Any, int, Any]] = []
        self._sweep_at = _SWEEP_FROM

    def push(self, key: Any, serial: int, leaf: Any) -> None:
        heapq.heappush(self.entries, (key, serial, leaf))
        if len(self.entries) > self._sweep_at:
            # In place: a caller may hold the list.
            self.entries[:] = [item for item in self.entries if self.counts(item)]
            heapq.heapify(self.entries)
            self._sweep_at = max(_SWEEP_FROM, 2 * len(self.entries))

    @staticmethod
    def counts(item: tuple[Any, int, Any]) -> bool:
        entry = item[2].blend_future.entry
        return entry is not None and entry[2] == item[1]


class ScanEnd:
    """One scanner of one job, as far as it has come, and the leaves that wait for it.

    Attributes:
        job, side: which.
        reached: number of its latest request.
        moved_at: tick at which that came.
    """

    def __init__(self, job: str, side: Side, tick: int) -> None:
        self.job = job
        self.side = side
        self.reached = 0
        self.moved_at = tick
        self.latest_first = _LazyHeap()
        self.soonest_first = _LazyHeap()

    def move(self, number: int, tick: int) -> None:
        self.reached, self.moved_at = max(self.reached, number), tick


class EvictionOrder:
    """The leaves that may be evicted, in order of eviction; O(log leaves + scan ends), amortised.

    Args:
        leaves: the evictable leaves; what is not in it is passed over. Each has ``blend_future``,
            a NodeFuture.
        policy_key: SGLang's own policy: the leaf with the smallest key goes first. The key of a
            node must not fall.

    Attributes:
        ticks: requests that have ended, with and without a plan.
    """

    def __init__(self, leaves: Collection[Any], policy_key: Callable[[Any], Any]) -> None:
        self.ticks = 0
        self._leaves = leaves
        self._policy_key = policy_key
        self._serial = 0
        self._never = _LazyHeap()
        self._online = _LazyHeap()
        self._scan_ends: dict[tuple[str, Side], ScanEnd] = {}
        # Those for which leaves wait, in the order in which the first came.
        self._awaited: dict[ScanEnd, None] = {}

    # -- what becomes known ----------------------------------------------------------------------

    def scan_end(self, job: str, side: Side) -> ScanEnd:
        found = self._scan_ends.get((job, side))
        if found is None:
            while len(self._scan_ends) >= _MOST_SCAN_ENDS:
                del self._scan_ends[
                    min(self._scan_ends, key=lambda name: self._scan_ends[name].moved_at)
                ]
            found = self._scan_ends[job, side] = ScanEnd(job, side, self.ticks)
        return found

    def advance(self, job: str, side: Side, due: int, since: int) -> None:
        """A planned request came; all of the job's that is numbered below `since` was sent."""
        for each in Side:
            scan_end = self.scan_end(job, each)
            if scan_end.reached < since:
                scan_end.move(since, self.ticks)
        self.scan_end(job, side).move(due, self.ticks)

    def learn(self, future: NodeFuture, due: float, scan_end: ScanEnd, as_of: int) -> None:
        """A planned request says who needs a node next.

        What a later request of the same job has said stands, and so does an earlier use by
        another job that is still to come.
        """
        before = future.scan_end
        if before is not None and future.due is not None:
            if before.job == scan_end.job:
                stands = as_of < future.as_of
            else:
                here, there = self._planned(future.due, before), self._planned(due, scan_end)
                stands = future.due >= before.reached and here < there
            if stands:
                return
        future.due, future.scan_end, future.as_of = due, scan_end, as_of

    # -- the order -------------------------------------------------------------------------------

    def add(self, leaf: Any) -> None:
        """A node became an evictable leaf, or more is known of one."""
        future: NodeFuture = leaf.blend_future
        heap, key = self._place(leaf)
        entry = future.entry
        if entry is not None and entry[0] is heap and entry[1] == key:
            return
        self._serial += 1
        future.entry = (heap, key, self._serial)
        heap.push(key, self._serial, leaf)
        scan_end = future.scan_end
        if scan_end is not None and heap is scan_end.latest_first:
            scan_end.soonest_first.push(future.due, self._serial, leaf)
            self._awaited[scan_end] = None

    def forget(self, leaf: Any) -> None:
        """A leaf was evicted."""
        leaf.blend_future.entry = None

    def first(self) -> Any | None:
        """The leaf to evict next; None if there is none."""
        never = self._top(self._never)
        if never is not None:
            return never
        candidates = []
        for scan_end in list(self._awaited):
            self._expire(scan_end)
            leaf = self._top(scan_end.latest_first)
            if leaf is None:
                del self._awaited[scan_end]
            else:
                candidates.append(leaf)
        # Last, so that on a tie a planned one goes: nobody waits for a single request of a job.
        online = self._top(self._online)
        if online is not None:
            candidates.append(online)
        return max(candidates, key=self.distance, default=None)

    def distance(self, leaf: Any) -> float:
        """Expected number of requests until a node's tokens are used again."""
        future: NodeFuture = leaf.blend_future
        age = self.ticks - future.used_at
        if future.due is None or future.scan_end is None:
            return age
        planned = self._planned(future.due, future.scan_end)
        return min(planned, age) if future.online else planned

    def _planned(self, due: float, scan_end: ScanEnd) -> float:
        return max(due - scan_end.reached, self.ticks - scan_end.moved_at)

    def _place(self, leaf: Any) -> tuple[_LazyHeap, Any]:
        """The heap that a leaf belongs into now, and its key there."""
        future: NodeFuture = leaf.blend_future
        due, scan_end = future.due, future.scan_end
        if due is None or scan_end is None or due < scan_end.reached:
            # In the last case the request that was due failed, or is planned anew.
            future.due = None
        elif not future.online or self.ticks - future.used_at > self._planned(due, scan_end):
            return (self._never, 0) if due == NEVER else (scan_end.latest_first, -due)
        return self._online, self._policy_key(leaf)

    def _top(self, heap: _LazyHeap) -> Any | None:
        """The first leaf of a heap, after putting right what has changed meanwhile."""
        entries = heap.entries
        while entries:
            leaf = entries[0][2]
            if not heap.counts(entries[0]):
                heapq.heappop(entries)
            elif leaf not in self._leaves:
                heapq.heappop(entries)
                leaf.blend_future.entry = None
            elif self._place(leaf) != leaf.blend_future.entry[:2]:
                heapq.heappop(entries)
                self.add(leaf)
            else:
                return leaf
        return None

    def _expire(self, scan_end: ScanEnd) -> None:
        """Leaves whose request has not come leave the heap in which they would stand last."""
        entries = scan_end.soonest_first.entries
        while entries and entries[0][0] < scan_end.reached:
            item = heapq.heappop(entries)
            if not _LazyHeap.counts(item):
                continue
            if item[2] in self._leaves:
                self.add(item[2])
            else:
                item[2].blend_future.entry = None
