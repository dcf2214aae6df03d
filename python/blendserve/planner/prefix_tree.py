"""The prefix tree over all prompts of a job, as arrays.

Requests are sorted by token ids; the tree is the interval tree of the longest-common-prefix (LCP)
array of that order. Leaf k is the k-th request in sorted order; inner nodes are numbered in
preorder, so a parent has a smaller number than its children, and node 0 is the root (the empty
prefix). The tokens themselves are not kept.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from .flat_tokens import FlatTokens
from .prefix_sort import sort_prompts

Ints = NDArray[np.int64]
Floats = NDArray[np.float64]


@dataclass(frozen=True, eq=False)
class PrefixTree:
    """n leaves (requests) and m >= 1 inner nodes.

    requests: (n,) request index of leaf k.
    length: (n,) prompt tokens of leaf k.
    shared: (n,) tokens that leaf k has in common with leaf k - 1; shared[0] = 0.
    parent: (m,) parent of each inner node; parent[0] = -1.
    depth: (m,) prefix length in tokens at the end of the node.
    first, end: (m,) the leaves below node i are first[i] .. end[i] - 1.
    leaf_parent: (n,) the inner node that leaf k hangs from.
    level: (m,) number of proper ancestors.
    """

    requests: Ints
    length: Ints
    shared: Ints
    parent: Ints
    depth: Ints
    first: Ints
    end: Ints
    leaf_parent: Ints
    level: Ints

    @staticmethod
    def build(token_ids: Sequence[NDArray[Any]], tie_keys: Sequence[ArrayLike] = ()) -> PrefixTree:
        """Sorts the prompts and builds the tree; see `sort_prompts`.

        token_ids: arrays, which are copied into one for the time of the sort, or `FlatTokens`,
        which are not.
        tie_keys: arrays of shape (n,) that order requests with identical prompts, the most
        important first. Requests that tie in those too are interchangeable.
        Raises ValueError for a prompt that is not a 1-d array of non-negative integers.
        """
        prompts = FlatTokens.of(token_ids)
        order = np.arange(len(prompts))
        if len(prompts) and tie_keys:
            order = np.lexsort([np.asarray(key) for key in reversed(tie_keys)])
        order, shared = sort_prompts(prompts, order)
        return PrefixTree.from_lcp(order, prompts.lengths[order], shared)

    @staticmethod
    def from_lcp(requests: Ints, length: Ints, shared: Ints) -> PrefixTree:
        """The interval tree of a sequence of requests of which each shares `shared` tokens with
        its predecessor. The sequence need not be sorted: a prefix that comes back later, after
        something else, is then a second node. All arrays have shape (n,)."""
        n = len(requests)
        parent, depth, first, end, leaf_parent = _interval_tree(shared.tolist())
        # Preorder: by first leaf, the longer interval (the shallower prefix) first.
        preorder = np.lexsort((depth, first))
        rank = np.empty(len(preorder), dtype=np.int64)
        rank[preorder] = np.arange(len(preorder))
        parent = parent[preorder]
        parent[1:] = rank[parent[1:]]
        level = [0] * len(parent)
        for node, above in enumerate(parent.tolist()):
            if node:
                level[node] = level[above] + 1
        return PrefixTree(
            requests=requests,
            length=length,
            shared=shared,
            parent=parent,
            depth=depth[preorder],
            first=first[preorder],
            end=end[preorder],
            leaf_parent=rank[leaf_parent] if n else leaf_parent,
            level=np.array(level, dtype=np.int64),
        )

    def subset(self, keep: NDArray[np.bool_]) -> PrefixTree:
        """The tree of the leaves with keep[k] true (shape (n,), in leaf order)."""
        kept = np.flatnonzero(keep)
        if len(kept) == self.num_leaves:
            return self
        shared = np.zeros(len(kept), dtype=np.int64)
        if len(kept) > 1:
            # The LCP of two leaves is the minimum of the adjacent ones between them. reduceat
            # covers [kept[k - 1] + 1, kept[k]] when it starts there and ends before the next.
            stop = int(kept[-1]) + 1
            shared[1:] = np.minimum.reduceat(self.shared[:stop], kept[:-1] + 1)
        return PrefixTree.from_lcp(self.requests[kept], self.length[kept], shared)

    def paged(self, page_tokens: int) -> PrefixTree:
        """The tree of what a cache of whole pages can share."""
        if page_tokens == 1:
            return self
        shared = self.shared // page_tokens * page_tokens
        return PrefixTree.from_lcp(self.requests, self.length, shared)

    @property
    def num_leaves(self) -> int:
        return len(self.requests)

    @property
    def num_nodes(self) -> int:
        """Inner nodes, the root included."""
        return len(self.parent)

    @cached_property
    def prompt_tokens(self) -> int:
        return int(self.length.sum())

    @cached_property
    def unique_tokens(self) -> int:
        """Sum of the edge lengths: the tokens that must be computed with ideal sharing."""
        return self.prompt_tokens - int(self.shared.sum())

    @property
    def sharing_ratio(self) -> float:
        """1 - unique / prompt tokens; 0 for an empty job."""
        return 1.0 - self.unique_tokens / self.prompt_tokens if self.prompt_tokens else 0.0

    @cached_property
    def num_children(self) -> Ints:
        """(m,) children of each inner node, leaves included."""
        counts = np.bincount(self.leaf_parent, minlength=self.num_nodes)
        counts += np.bincount(self.parent[1:], minlength=self.num_nodes)
        return counts.astype(np.int64)

    @cached_property
    def levels(self) -> list[Ints]:
        """Inner nodes grouped by level, the root's first."""
        order = np.argsort(self.level, kind="stable")
        cuts = np.flatnonzero(np.diff(self.level[order])) + 1
        return list(np.split(order, cuts))

    def subtree_sum(self, leaf_values: Floats, node_values: Floats | None = None) -> Floats:
        """(m,) for each inner node the sum of `leaf_values` (n,) over the leaves below it, plus
        `node_values` (m,) of the node itself and the inner nodes below it."""
        total: Floats = np.bincount(
            self.leaf_parent, weights=leaf_values, minlength=self.num_nodes
        ).astype(np.float64)
        if node_values is not None:
            total = total + node_values
        for nodes in reversed(self.levels[1:]):
            np.add.at(total, self.parent[nodes], total[nodes])
        return total

    def saved_in_subtree(self, saved: Floats) -> Floats:
        """(m,) what the shared prefixes below each node save: with k children under node i the
        prefix of i is computed once and found k - 1 times, so sum of (k - 1) * saved[i]."""
        return self.subtree_sum(np.zeros(self.num_leaves), (self.num_children - 1) * saved)


def _interval_tree(lcp: list[int]) -> tuple[Ints, Ints, Ints, Ints, Ints]:
    """parent, depth, first, end of the LCP intervals, and the interval of each leaf.

    One pass with a stack; an interval is closed when the LCP falls below its depth.
    """
    parent, depth, first, end = [-1], [0], [0], [len(lcp)]
    leaf_parent = [0] * len(lcp)
    stack = [0]
    for k in range(1, len(lcp) + 1):
        common = lcp[k] if k < len(lcp) else 0
        start = k - 1
        if depth[stack[-1]] >= common:
            leaf_parent[k - 1] = stack[-1]
        below = -1
        while depth[stack[-1]] > common:
            below = stack.pop()
            end[below] = k
            start = first[below]
            if depth[stack[-1]] >= common:
                parent[below] = stack[-1]
        if depth[stack[-1]] < common:
            node = len(parent)
            parent.append(-1)
            depth.append(common)
            first.append(start)
            end.append(-1)
            if below >= 0:
                parent[below] = node
            else:
                leaf_parent[k - 1] = node
            stack.append(node)
    return (
        np.array(parent, dtype=np.int64),
        np.array(depth, dtype=np.int64),
        np.array(first, dtype=np.int64),
        np.array(end, dtype=np.int64),
        np.array(leaf_parent, dtype=np.int64),
    )
