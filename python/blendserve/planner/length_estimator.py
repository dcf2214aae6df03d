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


def choose_sample(
    tree: PrefixTree,
    fraction: float,
    seed: int,
    min_requests: int,
    candidates: NDArray[np.bool_] | None = None,
) -> Ints:
    """Request indices to run first, in tree order.

    max(min_requests, fraction of n) requests, but never more than a quarter of the candidates, at
    equal distances along the sorted leaves with a seeded start: every subtree gets its share, to
    within one request. candidates: (n,) by request index, false where the length is known anyway.
    Raises ValueError for a fraction outside [0, 1] or a negative min_requests.
    """
    if not 0.0 <= fraction <= 1.0:
        raise ValueError(f"fraction must be between 0 and 1, not {fraction}")
    if min_requests < 0:
        raise ValueError(f"min_requests must not be negative, not {min_requests}")
    pool = tree.requests
    if candidates is not None:
        pool = pool[candidates[pool]]
    wanted = max(min_requests, math.ceil(fraction * len(pool))) if fraction else 0
    count = min(wanted, len(pool) if fraction == 1.0 else len(pool) // 4)
    if count == 0:
        return np.empty(0, dtype=np.int64)
    step = len(pool) / count
    start = np.random.default_rng(seed).random() * step
    picks = np.floor(start + step * np.arange(count)).astype(np.int64)
    sample: Ints = pool[np.minimum(picks, len(pool) - 1)]
    return sample


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
