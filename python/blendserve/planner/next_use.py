"""When each prompt's prefixes are needed again, along an order: what a cache must know for Belady.

A prefix of length c of a request is next needed by the first later request that shares c tokens
with it. As a function of c that is a staircase: the longer the prefix, the later. Its corners are
all that is kept, a few pairs (prefix tokens, later request) for each request.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from .dual_scanner import Side
from .plan import Plan
from .prediction import dual_scan_sequence
from .prefix_tree import Ints, PrefixTree


@dataclass(frozen=True, eq=False)
class NextUses:
    """The corners of k requests in sequence, those of request j at offsets[j] : offsets[j + 1].

    offsets: (k + 1,). prefix_tokens: (c,) ascending within a request, > 0. user: (c,) index in the
    sequence, ascending within a request and > j. Tokens beyond the last corner are not used again.
    """

    offsets: Ints
    prefix_tokens: Ints
    user: Ints


def next_uses(tree: PrefixTree, leaves: Ints) -> NextUses:
    """Next uses along a sequence of leaves of the tree, shape (k,), each at most once.

    Time: O(m + k log k) for m inner nodes, however deep the tree. Going backwards, each request
    paints its path from the root with its index; what it paints over is what it leaves behind for
    its successors. A heavy path (a node, its child with most leaves, and so on) keeps its colours
    as a stack of runs, so painting costs one entry for each of the at most log2 k heavy paths that
    a path crosses, besides the runs that it removes for good.
    """
    head = _heavy_path_heads(tree).tolist()
    parent, depth = tree.parent.tolist(), tree.depth.tolist()
    start = tree.leaf_parent[leaves].tolist()
    # Of each heavy path: runs (last node of the run, colour), the shallowest on top. Node numbers
    # grow along a path.
    runs: dict[int, list[tuple[int, int]]] = {}
    counts = np.zeros(len(start), dtype=np.int64)
    prefixes: list[int] = []
    users: list[int] = []
    for index in range(len(start) - 1, -1, -1):
        node = start[index]
        corners: list[tuple[int, int]] = []  # deepest first
        while node > 0:
            stack = runs.setdefault(head[node], [])
            painted = []
            while stack and stack[-1][0] <= node:
                painted.append(stack.pop())
            if stack and (not painted or painted[-1][0] < node):
                painted.append((node, stack[-1][1]))
            for last, user in reversed(painted):
                # The same user painted the next heavy path above too: one corner, the deepest.
                if not corners or corners[-1][1] != user:
                    corners.append((depth[last], user))
            stack.append((node, index))
            node = parent[head[node]]
        counts[index] = len(corners)
        for prefix, user in corners:
            prefixes.append(prefix)
            users.append(user)
    # Collected from the last request and the deepest corner on.
    return NextUses(
        offsets=np.concatenate(([0], np.cumsum(counts))),
        prefix_tokens=np.array(prefixes[::-1], dtype=np.int64),
        user=np.array(users[::-1], dtype=np.int64),
    )


def _heavy_path_heads(tree: PrefixTree) -> Ints:
    """(m,) the topmost node of the heavy path that each inner node is on. The root has a path of
    its own: nobody needs its empty prefix."""
    weight = tree.end - tree.first
    by_weight = np.lexsort((weight[1:], tree.parent[1:])) + 1
    heavy = np.full(tree.num_nodes, -1, dtype=np.int64)
    heavy[tree.parent[by_weight]] = by_weight  # Of equal indices the last, heaviest, stays.
    head = np.arange(tree.num_nodes)
    for nodes in tree.levels[2:]:
        above = tree.parent[nodes]
        continues = heavy[above] == nodes
        head[nodes[continues]] = head[above[continues]]
    return head


class NextUse(NamedTuple):
    """The next planned request that shares a prefix.

    prefix_tokens: length of the prefix. due: number of that request in the timetable. side: the
    scanner that is predicted to take it.
    """

    prefix_tokens: int
    due: int
    side: Side


@dataclass(frozen=True, eq=False)
class Timetable:
    """The predicted order in time of what two scanners will take, and the next uses along it.

    order: (k,) request indices. left: (k,) taken by the left scanner. index: (n,) place of each
    request of the job in the order, -1 where it is not planned. first_due: number of the first
    request; one is added from each request to the next.
    """

    order: Ints
    left: NDArray[np.bool_]
    index: Ints
    uses: NextUses
    first_due: int

    def due(self, request: int) -> int:
        """Number of a request. Raises KeyError when it is not in the timetable."""
        return self.first_due + self._place(request)

    def side(self, request: int) -> Side:
        """The scanner that is predicted to take a request. Raises KeyError as `due`."""
        return self._side(self._place(request))

    def next_uses(self, request: int) -> list[NextUse]:
        """Corners of a request, shortest prefix and soonest use first. Raises KeyError as `due`."""
        place = self._place(request)
        corners = slice(*self.uses.offsets[place : place + 2].tolist())
        return [
            NextUse(prefix, self.first_due + user, self._side(user))
            for prefix, user in zip(
                self.uses.prefix_tokens[corners].tolist(),
                self.uses.user[corners].tolist(),
                strict=True,
            )
        ]

    def due_after(self, sent: Ints) -> int:
        """Where the numbers of the job's next timetable should start, when these requests (some
        of them perhaps not in this one) have been sent."""
        return self.first_due + int(self.index[sent].max(initial=-1)) + 1

    def _side(self, place: int) -> Side:
        return Side.LEFT if self.left[place] else Side.RIGHT

    def _place(self, request: int) -> int:
        place = int(self.index[request])
        if place < 0:
            raise KeyError(request)
        return place


def make_timetable(plan: Plan, first: Sequence[int] | Ints = (), first_due: int = 0) -> Timetable:
    """Predicts when each request of a plan will be taken: those of `first` (the sample) in their
    order, then the rest as `dual_scan_sequence` takes them.

    first: request indices, each of the plan. first_due: number of the first request; of several
    plans of a job each goes on where the one before stopped (`Timetable.due_after`).
    """
    scanned, from_left = dual_scan_sequence(plan)
    ahead = np.asarray(first, dtype=np.int64)
    later = ~np.isin(scanned, ahead)
    order = np.concatenate((ahead, scanned[later]))
    dense = plan.request_density[ahead] >= plan.target_density
    leaf = np.empty(plan.tree.num_leaves, dtype=np.int64)
    leaf[plan.tree.requests] = np.arange(plan.tree.num_leaves)
    index = np.full(len(leaf), -1, dtype=np.int64)
    index[order] = np.arange(len(order))
    return Timetable(
        order=order,
        left=np.concatenate((dense, from_left[later])),
        index=index,
        uses=next_uses(plan.tree, leaf[order]),
        first_due=first_due,
    )
