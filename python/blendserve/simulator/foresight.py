"""When a plan needs each cached prefix next, for Belady's eviction."""

from __future__ import annotations

import math

import numpy as np

from blendserve.planner import DualScanner, Plan, PrefixTree


class Foresight:
    """Of each inner node of a job's tree, how far away its next planned use is.

    A plan is walked from both ends, so the next use of a prefix is as many requests away as its
    nearest waiting request is from either cursor. Requests that have started are not waiting.
    """

    def __init__(self, tree: PrefixTree) -> None:
        n = tree.num_leaves
        self._leaf = np.empty(n, dtype=np.int64)
        self._leaf[tree.requests] = np.arange(n)
        self._first: list[int] = tree.first.tolist()
        self._end: list[int] = tree.end.tolist()
        self._parent: list[int] = tree.parent.tolist()
        self._node: list[int] = tree.leaf_parent.tolist()
        self._waiting: list[int] = (tree.end - tree.first).tolist()
        self._started = np.zeros(n, dtype=bool)
        self._place = np.full(n, -1, dtype=np.int64)
        self._scanner: DualScanner | None = None

    def follow(self, plan: Plan, scanner: DualScanner) -> None:
        """From now on, this plan and its cursors count."""
        self._place[:] = -1
        self._place[self._leaf[plan.order]] = np.arange(len(plan.order))
        self._place[self._started] = -1
        self._scanner = scanner

    def started(self, request: int) -> None:
        leaf = int(self._leaf[request])
        self._started[leaf] = True
        self._place[leaf] = -1
        node = self._node[leaf]
        while node >= 0:
            self._waiting[node] -= 1
            node = self._parent[node]

    def waiting(self, node: int) -> int:
        """Requests below a node that have not started."""
        return self._waiting[node]

    def distance(self, node: int) -> float:
        """Requests between the cursors and the node's next use; inf if there is none."""
        if self._scanner is None or not self._waiting[node]:
            return math.inf
        places = self._place[self._first[node] : self._end[node]]
        places = places[places >= 0]
        if not len(places):
            return 0.0  # Taken by a replica, but not started yet: the very next.
        low, high = self._scanner.cursors
        return float(min(int(places.min()) - low, high - int(places.max())))
