"""Which requests to run first, as a sample of the output lengths (BlendServe, section 5.1).

The sample is drawn in two parts. The first covers the tree; its answers show where lengths vary,
and the second goes there.
"""

from __future__ import annotations

import math

import numpy as np

from .length_factors import Bools
from .prefix_tree import Floats, Ints, PrefixTree

# The first part of a sample. A smaller one leaves more for the second, a larger one tells better
# where lengths vary.
FIRST_PART = 0.3
# A sample smaller than this is drawn at once: a third of it would not show much.
TWO_PART_REQUESTS = 128
# Requests of a subtree vary in length at least as if this part of their prompts were their own.
MIN_OWN_PART = 0.1
# A subtree too small to expect a request in the first part gets one all the same, if it has this
# many, with more of their prompts their own than shared (which turns of a conversation have not): a
# few requests of their own kind, such as videos among chats, can hold most of a job's work. The
# largest such subtrees come first, and get no more than this part of the sample.
COVERED_REQUESTS = 10
COVERED_OWN_PART = 0.5
COVERING_PART = 0.25
# No stratum is taken to vary less than this part of the one that varies most.
LEAST_SPREAD = 1e-3


def sample_size(candidates: int, fraction: float, min_requests: int) -> int:
    """Both parts together: max(min_requests, fraction of the candidates), but never more than a
    quarter of them, unless all are asked for.

    Raises ValueError for a fraction outside [0, 1] or a negative min_requests.
    """
    if not 0.0 <= fraction <= 1.0:
        raise ValueError(f"fraction must be between 0 and 1, not {fraction}")
    if min_requests < 0:
        raise ValueError(f"min_requests must not be negative, not {min_requests}")
    wanted = max(min_requests, math.ceil(fraction * candidates)) if fraction else 0
    return min(wanted, candidates if fraction == 1.0 else candidates // 4)


def first_part(size: int) -> int:
    """How many of a sample of this size are drawn first: all of a small one."""
    return math.ceil(FIRST_PART * size) if size >= TWO_PART_REQUESTS else size


def choose_sample(tree: PrefixTree, count: int, seed: int, candidates: Bools | None = None) -> Ints:
    """`count` request indices, in tree order, all over the tree.

    Each subtree large enough to expect one gets its share: at least one, and the more, the less of
    their prompts its requests have in common (a few-shot exam is answered alike, a chat is not).
    Smaller ones with COVERED_REQUESTS or more of their own kind have one in the sample. Within a
    subtree every request is as likely as any other, and the choice is spread evenly over prompt
    lengths.
    candidates: (n,) by request index, false where the length is known anyway; at least `count`.
    """
    leaves = _leaves(tree, candidates)
    if count == 0:
        return np.empty(0, dtype=np.int64)
    node, covered = _with_small_strata(tree, leaves, count)
    length = tree.length[leaves]
    common = np.divide(tree.depth[node], length, out=np.zeros(len(leaves)), where=length > 0)
    nodes, stratum = np.unique(node, return_inverse=True)
    members = np.bincount(stratum)
    own_part = np.maximum(1 - np.bincount(stratum, weights=common) / members, MIN_OWN_PART)
    weight = members * own_part
    small = np.isin(nodes, covered)
    others = max(int(members[~small].sum()), 1)
    low = np.where(small, 1.0, np.minimum(1.0, (count - len(covered)) * members / others))
    shares = _shares(weight, low, members.astype(np.float64), count)
    return _draw(tree, leaves, stratum, shares, length, np.random.default_rng((seed, 1)))


def choose_second_sample(
    tree: PrefixTree,
    size: int,
    seed: int,
    sampled: Bools,
    deviation: Floats,
    expected: Floats,
    candidates: Bools | None = None,
) -> Ints:
    """Request indices of the second part, in tree order: what is missing to `size`.

    Both parts together come as near as they can to Neyman's allocation, by which a stratum of N
    requests with deviation S is given a number in proportion to N S.
    All (n,) by request index. sampled: true for the first part. deviation, expected: of each
    length, as the first part's answers let expect them; within a stratum the choice is spread over
    the latter. candidates: false where the length is known or the request has started.
    """
    leaves = _leaves(tree, candidates)
    count = min(size - int(sampled.sum()), len(leaves))
    if count <= 0:
        return np.empty(0, dtype=np.int64)
    open_leaves = np.union1d(leaves, np.flatnonzero(sampled[tree.requests]))
    node = _strata(tree, open_leaves, len(open_leaves) / size)
    _, stratum = np.unique(node, return_inverse=True)
    requests = tree.requests[open_leaves]
    members = np.bincount(stratum)
    variance = np.bincount(stratum, weights=deviation[requests] ** 2) / members
    taken: Floats = np.bincount(stratum, weights=sampled[requests]).astype(np.float64)
    spread = np.sqrt(variance)
    weight = members * np.maximum(spread, LEAST_SPREAD * spread.max()) if spread.any() else members
    # Where the first part took more than its share, it stays so.
    shares = _shares(weight, taken, members.astype(np.float64), int(taken.sum()) + count) - taken
    waiting = ~sampled[requests]
    return _draw(
        tree,
        open_leaves[waiting],
        stratum[waiting],
        shares,
        expected[requests[waiting]],
        np.random.default_rng((seed, 2)),
    )


def _leaves(tree: PrefixTree, candidates: Bools | None) -> Ints:
    leaves = np.arange(tree.num_leaves)
    return leaves if candidates is None else leaves[candidates[tree.requests]]


def _strata(tree: PrefixTree, leaves: Ints, least: float) -> Ints:
    """(k,) the smallest subtree around each leaf with at least `least` of the given leaves."""
    return _deepest(tree, _members(tree, leaves) >= least)[tree.leaf_parent[leaves]]


def _with_small_strata(tree: PrefixTree, leaves: Ints, count: int) -> tuple[Ints, Ints]:
    """The strata that expect one of `count` samples, with the largest subtrees right below them as
    strata of their own; and the nodes of those."""
    members = _members(tree, leaves)
    large = members >= len(leaves) / count
    large[0] = True
    below = np.flatnonzero(~large & (members >= COVERED_REQUESTS))
    below = below[large[tree.parent[below]]]
    length, shared = tree.length.astype(np.float64), tree.shared.astype(np.float64)
    unique = tree.subtree_sum(length - shared)[below] + shared[tree.first[below]]
    below = below[unique > COVERED_OWN_PART * tree.subtree_sum(length)[below]]
    covered = below[np.argsort(-members[below], kind="stable")][: int(COVERING_PART * count)]
    large[covered] = True
    return _deepest(tree, large)[tree.leaf_parent[leaves]], covered


def _members(tree: PrefixTree, leaves: Ints) -> Ints:
    """(m,) how many of the given leaves are below each node."""
    counted = np.zeros(tree.num_leaves + 1, dtype=np.int64)
    counted[leaves + 1] = 1
    counted = np.cumsum(counted)
    return np.asarray(counted[tree.end] - counted[tree.first])


def _deepest(tree: PrefixTree, marked: Bools) -> Ints:
    """(m,) the deepest marked node on the path to each node; the root, if there is none."""
    deepest = np.zeros(tree.num_nodes, dtype=np.int64)
    for nodes in tree.levels[1:]:
        deepest[nodes] = np.where(marked[nodes], nodes, deepest[tree.parent[nodes]])
    return deepest


def _shares(weight: Floats | Ints, low: Floats, high: Floats, count: int) -> Floats:
    """How many of `count` requests each stratum gives, in fractions: in proportion to its weight,
    but `low` at least and `high` at most."""
    least, most = 0.0, float(high.max()) / float(weight[weight > 0].min())
    for _ in range(80):  # The factor with which the clipped shares add up to count.
        factor = (least + most) / 2
        if np.clip(factor * weight, low, high).sum() < count:
            least = factor
        else:
            most = factor
    shares = np.clip(most * weight, low, high)
    return np.asarray(shares * (count / shares.sum()))


def _draw(
    tree: PrefixTree,
    leaves: Ints,
    stratum: Ints,
    shares: Floats,
    key: Floats | Ints,
    random: np.random.Generator,
) -> Ints:
    """Request indices, `shares` (in fractions, summing to a whole number) from each stratum, spread
    over the key. leaves, stratum, key: (k,)."""
    members = np.bincount(stratum, minlength=len(shares))
    shares = np.clip(shares, 0.0, members)
    count = round(float(shares.sum()))
    # Rounded at random so that a share of 1 or more never becomes 0.
    ends = np.cumsum(shares)
    drawn = np.searchsorted(ends, random.random() + np.arange(count), side="right")
    drawn = np.minimum(drawn, len(shares) - 1)
    number = np.bincount(drawn, minlength=len(shares))
    # One from each of as many equal stretches of the stratum, by the key. Equal steps would be as
    # even, but how good they are would hang on the one start.
    nth = np.arange(count) - (np.cumsum(number) - number)[drawn]
    within = (nth + random.random(count)) * (members / np.maximum(number, 1))[drawn]
    picks = (np.cumsum(members) - members)[drawn] + within.astype(np.int64)
    ranked = np.lexsort((leaves, key, stratum))
    picks = _distinct(picks, len(leaves) - 1)
    sample: Ints = tree.requests[np.sort(leaves[ranked[picks]])]
    return sample


def _distinct(picks: Ints, last: int) -> Ints:
    """Ascending indices up to `last`, with any that rounding made equal moved apart."""
    steps = np.arange(len(picks))
    forward = np.maximum.accumulate(picks - steps) + steps
    return np.minimum(forward, last - steps[::-1])
