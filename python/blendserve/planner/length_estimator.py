"""Output lengths: which requests to run first as a sample, and what their answers say about the
rest (BlendServe, section 5.1)."""

from __future__ import annotations

import math
from collections.abc import Mapping

import numpy as np
from numpy.typing import NDArray

from .prefix_tree import Floats, Ints, PrefixTree

# Used only until the first answer is in. Mean outputs of public chat traces lie between 200 and
# 330 tokens (LMSYS-Chat 207, Azure conversations 211, ShareGPT 324).
DEFAULT_OUTPUT_TOKENS = 256.0

# Requests of a subtree vary in length at least as if this part of their prompts were their own.
MIN_OWN_PART = 0.1


def choose_sample(
    tree: PrefixTree,
    fraction: float,
    seed: int,
    min_requests: int,
    candidates: NDArray[np.bool_] | None = None,
) -> Ints:
    """Request indices to run first, in tree order.

    max(min_requests, fraction of n) requests, but never more than a quarter of the candidates.
    Each subtree large enough to expect one gets its share: at least one, and the more, the less of
    their prompts its requests have in common (a few-shot exam is answered alike, a chat is not).
    Within such a subtree every request is as likely as any other, and the choice is spread evenly
    over prompt lengths.
    candidates: (n,) by request index, false where the length is known anyway.
    Raises ValueError for a fraction outside [0, 1] or a negative min_requests.
    """
    if not 0.0 <= fraction <= 1.0:
        raise ValueError(f"fraction must be between 0 and 1, not {fraction}")
    if min_requests < 0:
        raise ValueError(f"min_requests must not be negative, not {min_requests}")
    leaves = np.arange(tree.num_leaves)
    if candidates is not None:
        leaves = leaves[candidates[tree.requests]]
    wanted = max(min_requests, math.ceil(fraction * len(leaves))) if fraction else 0
    count = min(wanted, len(leaves) if fraction == 1.0 else len(leaves) // 4)
    if count == 0:
        return np.empty(0, dtype=np.int64)
    stratum = _strata(tree, leaves, len(leaves) / count)
    length = tree.length[leaves]
    common = np.divide(tree.depth[stratum], length, out=np.zeros(len(leaves)), where=length > 0)
    _, stratum = np.unique(stratum, return_inverse=True)
    size = np.bincount(stratum)
    own_part = np.maximum(1 - np.bincount(stratum, weights=common) / size, MIN_OWN_PART)
    random = np.random.default_rng(seed)
    # Rounded at random so that a share of 1 or more never becomes 0.
    ends = np.cumsum(_shares(size, own_part, count))
    drawn = np.searchsorted(ends, random.random() + np.arange(count), side="right")
    drawn = np.minimum(drawn, len(size) - 1)
    number = np.bincount(drawn, minlength=len(size))
    # One from each of as many equal stretches of the stratum, by prompt length. Equal steps would
    # be as even, but how good they are would hang on the one start.
    nth = np.arange(count) - (np.cumsum(number) - number)[drawn]
    within = (nth + random.random(count)) * (size / np.maximum(number, 1))[drawn]
    picks = (np.cumsum(size) - size)[drawn] + within.astype(np.int64)
    ranked = np.lexsort((leaves, length, stratum))
    picks = _distinct(picks, len(leaves) - 1)
    sample: Ints = tree.requests[np.sort(leaves[ranked[picks]])]
    return sample


def _strata(tree: PrefixTree, leaves: Ints, least: float) -> Ints:
    """(k,) the smallest subtree around each leaf with at least `least` of the given leaves."""
    counted = np.zeros(tree.num_leaves + 1, dtype=np.int64)
    counted[leaves + 1] = 1
    counted = np.cumsum(counted)
    large = counted[tree.end] - counted[tree.first] >= least
    deepest = np.zeros(tree.num_nodes, dtype=np.int64)
    for nodes in tree.levels[1:]:
        deepest[nodes] = np.where(large[nodes], nodes, deepest[tree.parent[nodes]])
    return deepest[tree.leaf_parent[leaves]]


def _shares(size: Ints, weight: Floats, count: int) -> Floats:
    """How many of `count` requests each stratum gives, in fractions: in proportion to size *
    weight, but one at least (or its share by size, if that is less) and `size` at most."""
    low = np.minimum(1.0, count * size / size.sum())
    lowest, highest = 0.0, 2.0 * size.max() * count / float((size * weight).min())
    for _ in range(60):  # The factor with which the clipped shares add up to count.
        factor = (lowest + highest) / 2
        shares = np.clip(factor * size * weight, low, size)
        if shares.sum() < count:
            lowest = factor
        else:
            highest = factor
    shares = np.clip(highest * size * weight, low, size)
    return np.asarray(shares * (count / shares.sum()))


def _distinct(picks: Ints, last: int) -> Ints:
    """Ascending indices up to `last`, with any that rounding made equal moved apart."""
    steps = np.arange(len(picks))
    forward = np.maximum.accumulate(picks - steps) + steps
    return np.minimum(forward, last - steps[::-1])


def estimate(
    tree: PrefixTree,
    observed: Mapping[int, int],
    max_output: Ints,
    exact: NDArray[np.bool_],
) -> Floats:
    """Expected output tokens of each request, shape (n,) by request index.

    An observed request has its true length, an `exact` one its max_output (ignore_eos, or a length
    known beforehand). Any other takes the mean of the observed requests in the smallest subtree
    around it that has one: its own, else its siblings' (which are what its parent then averages),
    else the nearest ancestor's. Without any observation: `DEFAULT_OUTPUT_TOKENS`. max_output (n,)
    caps all of them. Exact requests are not evidence for others: their length was imposed.
    """
    n = tree.num_leaves
    values = np.full(n, np.nan)
    for request, tokens in observed.items():
        if not 0 <= request < n:
            raise ValueError(f"observed request {request} is not in this job of {n} requests")
        values[request] = tokens
    evidence = ~np.isnan(values) & ~exact
    leaf_values = np.where(evidence, values, 0.0)[tree.requests]
    total = tree.subtree_sum(leaf_values)
    count = tree.subtree_sum(evidence[tree.requests].astype(np.float64))
    mean = np.full(tree.num_nodes, DEFAULT_OUTPUT_TOKENS)
    for nodes in tree.levels:
        above = mean[np.maximum(tree.parent[nodes], 0)]
        mean[nodes] = np.where(count[nodes] > 0, total[nodes] / np.maximum(count[nodes], 1), above)
    result = np.empty(n)
    result[tree.requests] = mean[tree.leaf_parent]
    result = np.where(np.isnan(values), result, values)
    result = np.where(exact & np.isnan(values), max_output, result)
    return np.minimum(result, max_output)
