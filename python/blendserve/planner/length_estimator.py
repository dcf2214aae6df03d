"""Output lengths as the paper estimates them: the mean of what was sampled nearby (BlendServe,
section 5.1). The planner uses `LengthModel`; this is what it is measured against."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
from numpy.typing import NDArray

from .prefix_tree import Floats, Ints, PrefixTree

# Used only until the first answer is in. Mean outputs of public chat traces lie between 200 and
# 330 tokens (LMSYS-Chat 207, Azure conversations 211, ShareGPT 324).
DEFAULT_OUTPUT_TOKENS = 256.0


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
