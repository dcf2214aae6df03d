"""From tree order to density order at a bounded price in prefix sharing (BlendServe, section 5.2).

A unit is a subtree, or a single request, that hangs from the root and stays together. At first
the units are the root's children. Splitting a node hangs its children from the root instead, so
that each can stand where its density belongs; the price is that its prefix is computed again
wherever they no longer stand side by side.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from .annotation import Annotation, SavedSeconds, amortised_compute, annotate
from .cost_model import density
from .prefix_tree import Floats, Ints, PrefixTree

Bools = NDArray[np.bool_]

# A request is out of place in its unit when its density is off by more than this factor.
OUTLIER_FACTOR = 2.0


@dataclass(frozen=True, eq=False)
class Transformed:
    """The planned order of a tree's n leaves and how it came about.

    order: (n,) leaf numbers, compute end first.
    unit: (n,) number of the unit at each position of order, counted from the left.
    unit_density: (units,) density of each unit on its own, non-increasing.
    shared: (n,) tokens in common with the predecessor in order.
    split_nodes: (m,) inner nodes that were split.
    alone: (n,) by leaf: hangs from the root by itself since a split.
    threshold: log of the budget t of recomputed prefix tokens; -inf when nothing may be split.
    split_cost: (m,) log of what the budget must cover for a node to be split: prefix tokens times
        children, times the children of every ancestor, as the budget is divided on the way down.
    """

    order: Ints
    unit: Ints
    unit_density: Floats
    shared: Ints
    split_nodes: Bools
    alone: Bools
    threshold: float
    split_cost: Floats


def transform(
    tree: PrefixTree,
    compute: Floats,
    memory: Floats,
    saved: SavedSeconds,
    sharing_preserved: float,
) -> Transformed:
    """Sorts, splits within the budget, and sorts again.

    compute, memory: (n,) seconds in leaf order, without sharing. sharing_preserved: the fraction
    of the shared tokens of a depth-first order that the result keeps at least.
    Raises ValueError unless 0 <= sharing_preserved <= 1.
    """
    if not 0.0 <= sharing_preserved <= 1.0:
        raise ValueError(f"sharing_preserved must be between 0 and 1, not {sharing_preserved}")
    common = CommonPrefix(tree.shared)
    marks = annotate(tree, compute, memory, saved)
    needed = int(np.ceil(sharing_preserved * int(tree.shared.sum()) - 1e-9))
    cost = split_costs(tree)
    none = np.zeros(tree.num_leaves, dtype=bool)

    def finish(threshold: float, detached: Bools) -> Transformed:
        split = cost <= threshold
        split[0] = True
        order, unit, unit_density = _lay_out(tree, marks, compute, memory, saved, split, detached)
        return Transformed(
            order=order,
            unit=unit,
            unit_density=unit_density,
            shared=common.along(order),
            split_nodes=split & (np.arange(tree.num_nodes) > 0),
            alone=detached | (split[tree.leaf_parent] & (tree.leaf_parent > 0)),
            threshold=threshold,
            split_cost=cost,
        )

    result = finish(-np.inf, none)
    if tree.num_leaves <= 1 or _non_increasing(marks.leaf_density[result.order]):
        return result
    threshold = _largest_threshold(tree, marks, cost, common, needed)
    result = finish(threshold, none)
    outliers = _outliers(tree, compute, memory, saved, result)
    price = np.cumsum(tree.depth[tree.leaf_parent[outliers]])
    count = int(np.searchsorted(price, int(result.shared.sum()) - needed, side="right"))
    while count:
        detached = none.copy()
        detached[outliers[:count]] = True
        candidate = finish(threshold, detached)
        if int(candidate.shared.sum()) >= needed:
            return candidate
        count //= 2
    return result


def split_costs(tree: PrefixTree) -> Floats:
    """(m,) log of the smallest budget with which the top-down split reaches and splits each node.

    split(node, t) asks for prefix tokens * children <= t and passes t / children on, so a node
    needs t >= prefix * children * (children of all its ancestors), and its ancestors' needs met
    as well: the largest of these along its path. -inf for the root, whose prefix is empty.
    """
    with np.errstate(divide="ignore"):
        log_children = np.log(np.maximum(tree.num_children, 1))
        own = np.log(tree.depth) + log_children
    divided = np.zeros(tree.num_nodes)
    cost = own.copy()
    for nodes in tree.levels[1:]:
        above = tree.parent[nodes]
        divided[nodes] = divided[above] + log_children[above]
        cost[nodes] = np.maximum(cost[above], own[nodes] + divided[nodes])
    return cost


class CommonPrefix:
    """Common prefix of any two leaves in O(1): a sparse table of range minima over the LCPs."""

    def __init__(self, shared: Ints) -> None:
        row = shared.astype(np.int32)
        self._table = [row]
        width = 1
        while 2 * width <= len(shared):
            row = np.minimum(row[:-width], row[width:])
            self._table.append(row)
            width *= 2

    def between(self, a: Ints, b: Ints) -> Ints:
        """Tokens that leaves a and b have in common; a != b elementwise, shape (k,)."""
        low, high = np.minimum(a, b) + 1, np.maximum(a, b)
        exponent = np.frexp(high - low + 1)[1] - 1  # floor(log2(number of LCPs to look at))
        out = np.zeros(len(low), dtype=np.int64)
        for power, row in enumerate(self._table):
            at = np.flatnonzero(exponent == power)
            out[at] = np.minimum(row[low[at]], row[high[at] - (1 << power) + 1])
        return out

    def along(self, order: Ints) -> Ints:
        """(n,) tokens in common with the predecessor in `order`; 0 for the first."""
        out = np.zeros(len(order), dtype=np.int64)
        if len(order) > 1:
            out[1:] = self.between(order[:-1], order[1:])
        return out


def _non_increasing(values: Floats) -> bool:
    return bool(np.all(values[1:] <= values[:-1]))


def _largest_threshold(
    tree: PrefixTree, marks: Annotation, cost: Floats, common: CommonPrefix, needed: int
) -> float:
    """Binary search for a threshold that keeps the needed shared tokens, the next one not.

    What counts is the sharing of the order that results: parts of a split node that end up side
    by side again still share its prefix.
    """
    inside = tree.saved_in_subtree(tree.depth.astype(np.float64))  # Shared tokens, exact.
    steps = np.unique(cost[np.isfinite(cost)])

    def kept(threshold: float) -> int:
        split = cost <= threshold
        split[0] = True
        nodes = np.flatnonzero(~split & split[np.maximum(tree.parent, 0)])
        leaves = np.flatnonzero(split[tree.leaf_parent])
        first = np.concatenate((tree.first[nodes], leaves))
        rho = np.concatenate((marks.density[nodes], marks.leaf_density[leaves]))
        order = first[np.lexsort((first, -rho))]
        return round(float(inside[nodes].sum())) + int(common.along(order).sum())

    low, high = 0, len(steps)  # steps[:low] is known to be affordable, steps[high:] is not.
    while low < high:
        middle = (low + high) // 2
        if kept(float(steps[middle])) >= needed:
            low = middle + 1
        else:
            high = middle
    return float(steps[low - 1]) if low else -np.inf


def _outliers(
    tree: PrefixTree, compute: Floats, memory: Floats, saved: SavedSeconds, result: Transformed
) -> Ints:
    """Leaves that would stand elsewhere on their own, worst first.

    Ranked by how far off they stand (log of the density ratio to their unit's) times the seconds
    they stand for, per prefix token that moving them costs.
    """
    order = result.order
    planned = PrefixTree.from_lcp(tree.requests[order], tree.length[order], result.shared)
    own_compute = amortised_compute(planned, compute[order], saved)
    unit = result.unit_density[result.unit]
    in_place = density(own_compute, memory[order])
    alone = density(compute, memory)[order]
    prefix = tree.depth[tree.leaf_parent[order]].astype(np.float64)
    sizes = np.bincount(result.unit)[result.unit]
    too_low = (in_place * OUTLIER_FACTOR < unit) & (alone < unit)
    too_high = in_place > unit * OUTLIER_FACTOR
    at = np.flatnonzero((too_low | too_high) & (sizes > 1) & (prefix > 0))
    limit = np.log(1e6)
    with np.errstate(divide="ignore", invalid="ignore"):
        distance = np.abs(np.log(in_place[at]) - np.log(unit[at]))
    distance = np.where(np.isnan(distance), limit, np.minimum(distance, limit))
    gain = distance * (own_compute[at] + memory[order[at]]) / prefix[at]
    ranked: Ints = order[at][np.lexsort((order[at], -gain))]
    return ranked


def _lay_out(
    tree: PrefixTree,
    marks: Annotation,
    compute: Floats,
    memory: Floats,
    saved: SavedSeconds,
    split: Bools,
    detached: Bools,
) -> tuple[Ints, Ints, Floats]:
    """Layer-wise sort of the forest that splitting leaves: (order, unit of each position, density
    of each unit). Children of every node by density, ties by content (tree order)."""
    m, n = tree.num_nodes, tree.num_leaves
    parent = np.where(split[np.maximum(tree.parent, 0)], 0, tree.parent)
    parent[0] = -1
    leaf_parent = np.where(split[tree.leaf_parent] | detached, 0, tree.leaf_parent)
    inner = np.arange(1, m)
    inner = inner[~split[inner]]  # Split nodes are gone; node 0 stays as the root.

    size = np.bincount(leaf_parent, minlength=m)
    compute_sum, memory_sum = np.zeros(m), np.zeros(m)
    np.add.at(compute_sum, leaf_parent, compute)
    np.add.at(memory_sum, leaf_parent, memory)
    children = size.copy()
    alive = np.zeros(m, dtype=bool)
    levels = [nodes[~split[nodes]] for nodes in tree.levels]
    prefix = saved(tree)
    for nodes in reversed(levels[1:]):
        nodes = nodes[size[nodes] > 0]
        alive[nodes] = True
        # What the node's children find of its prefix, all but the first of them.
        compute_sum[nodes] -= (children[nodes] - 1) * prefix[nodes]
        for total in (size, compute_sum, memory_sum):
            np.add.at(total, parent[nodes], total[nodes])
        np.add.at(children, parent[nodes], 1)
    nodes = inner[alive[inner]]
    if detached.any():
        node_density = density(np.maximum(compute_sum[nodes], 0.0), memory_sum[nodes])
    else:
        node_density = marks.density[nodes]  # The very figures that the threshold was found with.

    # All children of all nodes, grouped by parent, in planned order.
    child_parent = np.concatenate((parent[nodes], leaf_parent))
    child_size = np.concatenate((size[nodes], np.ones(n, dtype=np.int64)))
    child_first = np.concatenate((tree.first[nodes], np.arange(n)))
    rho = np.concatenate((node_density, marks.leaf_density))
    ranked = np.lexsort((child_first, -rho, child_parent))
    before = np.cumsum(child_size[ranked]) - child_size[ranked]
    group = child_parent[ranked]
    starts = np.flatnonzero(np.r_[True, group[1:] != group[:-1]]) if len(group) else group
    group_base = np.repeat(before[starts], np.diff(np.r_[starts, len(group)]))
    offset = np.empty(len(ranked), dtype=np.int64)
    offset[ranked] = before - group_base
    start = np.zeros(m, dtype=np.int64)
    relative = np.zeros(m, dtype=np.int64)
    relative[nodes] = offset[: len(nodes)]
    for layer in levels[1:]:
        start[layer] = start[parent[layer]] + relative[layer]
    position = start[leaf_parent] + offset[len(nodes) :]
    order = np.empty(n, dtype=np.int64)
    order[position] = np.arange(n)

    tops = ranked[group == 0]
    unit = np.repeat(np.arange(len(tops)), child_size[tops])
    return order, unit, rho[tops]
