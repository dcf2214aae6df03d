"""Certified lower bounds of a job's time, from the very terms that the engine charges.

With f the overlap model, a step takes f(c, m). f is a maximum of planes through the origin: it is
convex and f(t c, t m) = t f(c, m), hence f(c1, m1) + f(c2, m2) >= f(c1 + c2, m1 + m2). So no
sequence of steps, on k replicas, is shorter than f(C, M) / k, with

- C: GEMMs and prefill attention of every distinct prompt token once (no cache finds more than an
  endless one), and GEMMs of every output token but the last of each request;
- M: decode attention of every request at its true context in each of its steps; where what requests
  have in common is read once a step for all, each shared stretch in as many steps at least as its
  longest decode takes.

And no run is shorter than its longest request alone: each of its decode steps reads the weights and
its own context at least. With the `interference` model this is the practical optimum, with
`ideal` the ideal optimum.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from blendserve.planner import PrefixTree
from blendserve.planner.annotation import prompt_tokens_read

from .step_time import OverlapModel, StepCosts

Ints = NDArray[np.int64]


@dataclass(frozen=True)
class Bound:
    """compute_seconds, memory_seconds: C and M. longest_seconds: the longest request alone.
    seconds: no run on that many replicas takes less."""

    compute_seconds: float
    memory_seconds: float
    longest_seconds: float
    seconds: float


def lower_bound(
    tree: PrefixTree,
    output: Ints,
    costs: StepCosts,
    overlap: OverlapModel,
    replicas: int = 1,
    shared_decode: bool = False,
) -> Bound:
    """output: (n,) true output tokens by request index, at least 1 each."""
    length = tree.length.astype(np.float64)
    shared = tree.shared.astype(np.float64)
    steps = output[tree.requests].astype(np.float64) - 1.0
    compute = float((length - shared + steps).sum()) * costs.token_seconds
    compute += float((length**2 - shared**2).sum()) * costs.pair_seconds
    read = prompt_tokens_read(tree, steps, math.inf) if shared_decode else length
    memory = float((read * steps + steps * (steps + 1) / 2).sum()) * costs.context_seconds
    longest = _longest_alone(tree, output, costs, overlap)
    return Bound(
        compute_seconds=compute,
        memory_seconds=memory,
        longest_seconds=longest,
        seconds=max(overlap.seconds(compute, memory) / replicas, longest),
    )


def _longest_alone(
    tree: PrefixTree, output: Ints, costs: StepCosts, overlap: OverlapModel, looked_at: int = 8
) -> float:
    """Of the requests with the longest outputs; any of them bounds the time."""
    most = np.argsort(-output[tree.requests], kind="stable")[:looked_at]
    found = 0.0
    for leaf in most.tolist():
        steps = int(output[tree.requests[leaf]]) - 1
        contexts = (float(tree.length[leaf]) + 1.0 + np.arange(steps)) * costs.context_seconds
        found = max(found, float(overlap.seconds_each(costs.weight_seconds, contexts).sum()))
    return found
