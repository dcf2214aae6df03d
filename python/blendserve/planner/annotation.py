"""What each node of the prefix tree costs: sums, sharing and compute density (BlendServe, 5.1)."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from .cost_model import density
from .prefix_tree import Floats, PrefixTree

# A tree -> for each inner node the compute seconds (m,) that finding its prefix in the cache saves.
SavedSeconds = Callable[[PrefixTree], Floats]


@dataclass(frozen=True, eq=False)
class Annotation:
    """Per inner node, arrays of shape (m,); R is the set of requests below the node.

    compute_seconds, memory_seconds: sums over R, without sharing.
    saved_seconds: compute that prefix sharing within R saves.
    density: rho(R) = (1 - s(R)) * compute / memory, with s(R) = saved / compute.
    leaf_density: (n,) compute / memory of each request on its own, in leaf order.
    """

    compute_seconds: Floats
    memory_seconds: Floats
    saved_seconds: Floats
    density: Floats
    leaf_density: Floats

    @property
    def sharing(self) -> Floats:
        """(m,) s(R); 0 where there is no compute to save."""
        out = np.zeros_like(self.compute_seconds)
        np.divide(self.saved_seconds, self.compute_seconds, out=out, where=self.compute_seconds > 0)
        return out


def annotate(tree: PrefixTree, compute: Floats, memory: Floats, saved: SavedSeconds) -> Annotation:
    """Sums and densities of every node. compute, memory: (n,) seconds in leaf order."""
    compute_sum = tree.subtree_sum(compute)
    memory_sum = tree.subtree_sum(memory)
    saved_sum = tree.saved_in_subtree(saved(tree))
    return Annotation(
        compute_seconds=compute_sum,
        memory_seconds=memory_sum,
        saved_seconds=saved_sum,
        density=density(np.maximum(compute_sum - saved_sum, 0.0), memory_sum),
        leaf_density=density(compute, memory),
    )


def amortised_compute(tree: PrefixTree, compute: Floats, saved: SavedSeconds) -> Floats:
    """(n,) compute seconds of each leaf with sharing: its own tail, and of each shared prefix
    segment above it an equal part. Sums to the compute of the whole tree after sharing.

    compute: (n,) seconds in leaf order, without sharing.
    """
    prefix = saved(tree)
    leaves_below = np.maximum(tree.end - tree.first, 1)
    path = np.zeros(tree.num_nodes)
    for nodes in tree.levels[1:]:
        above = tree.parent[nodes]
        path[nodes] = path[above] + (prefix[nodes] - prefix[above]) / leaves_below[nodes]
    own = compute - prefix[tree.leaf_parent] + path[tree.leaf_parent]
    return np.maximum(own, 0.0)


def prompt_tokens_read(tree: PrefixTree, output: Floats, kv_tokens: float) -> Floats:
    """(n,) prompt tokens that each leaf's decode steps read, where attention reads what running
    requests have in common once a step for all of them (cascade attention); at most the prompt.

    What the requests R below a node share is read in every step in which one of them decodes. In
    tree order they start one after the other, as many at once as memory holds beside the prefix:
    c = (kv_tokens - prefix) / mean tokens of their own, from 1 to |R|. Together they decode for
    max(longest output, sum of outputs / c) steps, of which each pays by its part of that sum.

    output: (n,) output tokens in leaf order. kv_tokens: size of the KV pool.
    """
    count = np.maximum(tree.end - tree.first, 1).astype(np.float64)
    outputs = tree.subtree_sum(output)
    longest = np.zeros(tree.num_nodes)
    np.maximum.at(longest, tree.leaf_parent, output)
    for nodes in reversed(tree.levels[1:]):
        np.maximum.at(longest, tree.parent[nodes], longest[nodes])
    prompts = tree.subtree_sum(tree.length.astype(np.float64))
    prompts -= tree.saved_in_subtree(tree.depth.astype(np.float64)) + tree.depth
    own = (prompts + outputs / 2) / count
    at_once = count.copy()
    np.divide(kv_tokens - tree.depth, own, out=at_once, where=own > 0)
    steps = np.maximum(longest, outputs / np.clip(at_once, 1.0, count))
    part = np.ones(tree.num_nodes)
    np.divide(steps, outputs, out=part, where=outputs > 0)
    path = np.zeros(tree.num_nodes)
    for nodes in tree.levels[1:]:
        above = tree.parent[nodes]
        path[nodes] = path[above] + (tree.depth[nodes] - tree.depth[above]) * part[nodes]
    return np.asarray(tree.length - tree.depth[tree.leaf_parent] + path[tree.leaf_parent])
