"""Which leaf of the radix tree goes next: Belady for what the plan knows, SGLang's policy else.

Every leaf has a distance to its next use, in requests. For a planned leaf it is the number of the
request that needs it less the number that its side has reached; infinite if none does. For one
that online requests use it is taken to be as long as the time since its last use, which is what
LRU assumes; among themselves these keep the order of SGLang's policy. A leaf of both kinds has the
shorter distance. The leaf with the longest distance goes first.

Every decision depends on counters only, no clock: the ranks of a tensor-parallel group agree.
"""

from __future__ import annotations

import heapq
import math
from collections.abc import Callable, Collection
from dataclasses import dataclass
from enum import IntEnum
from typing import Any

from blendserve.planner import Side

NEVER = math.inf


class _Heap(IntEnum):
    NEVER = 0
    LEFT = 1
    RIGHT = 2
    ONLINE = 3


_HEAP_OF_SIDE = {Side.LEFT: _Heap.LEFT, Side.RIGHT: _Heap.RIGHT}
_SIDE_OF_HEAP = {heap: side for side, heap in _HEAP_OF_SIDE.items()}
# A heap with more entries than this is swept of outdated ones whenever it has doubled.
_SWEEP_FROM = 1024


@dataclass(slots=True)
class NodeFuture:
    """What is known of the next use of a node's tokens.

    Attributes:
        due: number of the next planned request that needs them; NEVER if none does; None if no
            planned request has used them, or the one that should have did not come.
        side: of that request.
        as_of: number of the planned request that said so.
        used_at: tick of the last use by any request.
        online: a request without a plan has used them.
        entry: heap, key and serial number of its one valid entry in the order.
    """

    due: float | None = None
    side: Side = Side.LEFT
    as_of: int = -1
    used_at: int = 0
    online: bool = False
    entry: tuple[_Heap, Any, int] | None = None

    def copy(self) -> NodeFuture:
        """For a node split off; it has no entry yet."""
        return NodeFuture(self.due, self.side, self.as_of, self.used_at, self.online)

    def learn(self, due: float, side: Side, as_of: int) -> None:
        """A planned request says who is next; what a later one has said stands."""
        if as_of >= self.as_of:
            self.due, self.side, self.as_of = due, side, as_of


class _LazyHeap:
    """Entries (key, serial, leaf) of which only those whose serial is the leaf's own count."""

    def __init__(self) -> None:
        self.entries: list[tuple[Any, int, Any]] = []
        self._sweep_at = _SWEEP_FROM

    def push(self, key: Any, serial: int, leaf: Any) -> None:
        heapq.heappush(self.entries, (key, serial, leaf))
        if len(self.entries) > self._sweep_at:
            self.entries = [item for item in self.entries if self.counts(item)]
            heapq.heapify(self.entries)
            self._sweep_at = max(_SWEEP_FROM, 2 * len(self.entries))

    @staticmethod
    def counts(item: tuple[Any, int, Any]) -> bool:
        entry = item[2].blend_future.entry
        return entry is not None and entry[2] == item[1]


class EvictionOrder:
    """The leaves that may be evicted, in order of eviction; O(log leaves) amortised.

    Args:
        leaves: the evictable leaves; what is not in it is passed over. Each has ``blend_future``,
            a NodeFuture.
        policy_key: SGLang's own policy: the leaf with the smallest key goes first. The key of a
            node must not fall.

    Attributes:
        ticks: requests without and with a plan that have ended.
        reached: on each side, number of the planned request that came last.
    """

    def __init__(self, leaves: Collection[Any], policy_key: Callable[[Any], Any]) -> None:
        self.ticks = 0
        self.reached = dict.fromkeys(Side, 0)
        self._leaves = leaves
        self._policy_key = policy_key
        self._serial = 0
        self._heaps = {heap: _LazyHeap() for heap in _Heap}
        # By due, the soonest on top: finds the leaves whose time has passed.
        self._passing = {heap: _LazyHeap() for heap in _SIDE_OF_HEAP}

    def advance(self, side: Side, due: int, since: int) -> None:
        """A planned request came; all of what is numbered below `since` has been sent."""
        reached = self.reached
        for each in Side:
            reached[each] = max(reached[each], since)
        reached[side] = max(reached[side], due)

    def add(self, leaf: Any) -> None:
        """A node became an evictable leaf, or more is known of one."""
        future: NodeFuture = leaf.blend_future
        heap, key = self._place(leaf)
        if future.entry is not None and future.entry[:2] == (heap, key):
            return
        self._serial += 1
        future.entry = (heap, key, self._serial)
        self._heaps[heap].push(key, self._serial, leaf)
        if heap in self._passing:
            self._passing[heap].push(future.due, self._serial, leaf)

    def forget(self, leaf: Any) -> None:
        """A leaf was evicted."""
        leaf.blend_future.entry = None

    def first(self) -> Any | None:
        """The leaf to evict next; None if there is none."""
        self._expire()
        never = self._top(_Heap.NEVER)
        if never is not None:
            return never
        best, longest = None, -math.inf
        # On a tie the planned one goes: nobody waits for a single request of a job.
        for heap in (_Heap.RIGHT, _Heap.LEFT, _Heap.ONLINE):
            leaf = self._top(heap)
            if leaf is not None and (best is None or self.distance(leaf) > longest):
                best, longest = leaf, self.distance(leaf)
        return best

    def distance(self, leaf: Any) -> float:
        """Expected number of requests until a node's tokens are used again."""
        future: NodeFuture = leaf.blend_future
        age = self.ticks - future.used_at
        if future.due is None:
            return age
        planned = future.due - self.reached[future.side]
        return min(planned, age) if future.online else planned

    def _place(self, leaf: Any) -> tuple[_Heap, Any]:
        """The heap that a leaf belongs into now, and its key there."""
        future: NodeFuture = leaf.blend_future
        if future.due is not None and future.due < self.reached[future.side]:
            # The request that was due failed, was cancelled, or is planned anew.
            future.due = None
        if future.due is None or (
            future.online and self.ticks - future.used_at <= future.due - self.reached[future.side]
        ):
            return _Heap.ONLINE, self._policy_key(leaf)
        if future.due == NEVER:
            return _Heap.NEVER, 0
        return _HEAP_OF_SIDE[future.side], -future.due

    def _top(self, heap: _Heap) -> Any | None:
        """The first leaf of a heap, after putting right what has changed meanwhile."""
        entries = self._heaps[heap].entries
        while entries:
            leaf = entries[0][2]
            entry = leaf.blend_future.entry
            if not _LazyHeap.counts(entries[0]):
                heapq.heappop(entries)
            elif leaf not in self._leaves:
                heapq.heappop(entries)
                leaf.blend_future.entry = None
            elif self._place(leaf) != entry[:2]:
                heapq.heappop(entries)
                self.add(leaf)
                entries = self._heaps[heap].entries
            else:
                return leaf
        return None

    def _expire(self) -> None:
        """Leaves whose due request has not come leave the heap in which they would come last."""
        for heap, side in _SIDE_OF_HEAP.items():
            entries = self._passing[heap].entries
            while entries and entries[0][0] < self.reached[side]:
                item = heapq.heappop(entries)
                if not _LazyHeap.counts(item):
                    continue
                if item[2] in self._leaves:
                    self.add(item[2])
                else:
                    item[2].blend_future.entry = None
