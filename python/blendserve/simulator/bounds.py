"""Certified lower bounds of a job's time, from the very terms that the engine charges.

With f the overlap model, a step takes f(c, m, t) and a fixed time. f is a maximum of planes through
the origin: it is convex and scales with its arguments, so the sum of f over steps is at least f of
the sums. No sequence of steps, on k replicas, is shorter than f(C, M, T) / k, with every unit of
work at the best rate that any step attains (`StepCosts.least`):

- C: GEMMs and prefill attention of every distinct prompt token once (no cache finds more than an
  endless one), GEMMs of every output token but the last of each request, logits of every output
  token;
- M: decode attention of every request at its true context in each of its steps, in layers with a
  window no further than that; where what requests have in common is read once a step for all, each
  shared stretch in as many steps at least as its longest decode takes;
- T: the KV that these decodes read, through the memory's full bandwidth, and in as many steps as
  there are at least the weights that a lone token needs. At least as many steps as the longest
  request has tokens, or as the prompts have chunks; each takes the fixed time of a step, too.

And no run is shorter than its longest request alone: each of its decode steps takes the GEMMs of a
lone token and its own context at least. With the `interference` model this is the practical
optimum, with `ideal` the ideal optimum.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from blendserve.planner import PrefixTree, StepCosts
from blendserve.planner.annotation import prompt_tokens_read
from blendserve.planner.cost_model import window_reads

from .step_time import OverlapModel

Ints = NDArray[np.int64]
Floats = NDArray[np.float64]


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
    chunk_tokens: int | None = None,
) -> Bound:
    """output: (n,) true output tokens by request index, at least 1 each. chunk_tokens: most prompt
    tokens of a step."""
    least = costs.least
    length = tree.length.astype(np.float64)
    shared = tree.shared.astype(np.float64)
    tokens = output[tree.requests].astype(np.float64)
    steps = tokens - 1.0
    prompts = float((length - shared).sum())
    compute = (prompts + float(steps.sum())) * least.token + float(tokens.sum()) * least.sampled
    compute += float((length**2 - shared**2).sum()) * least.pair
    read = prompt_tokens_read(tree, steps, math.inf) if shared_decode else length
    reads = float((read * steps + steps * (steps + 1) / 2).sum())
    memory = reads * least.context + float(steps.sum()) * least.state
    traffic = reads * costs.context
    if least.window:
        pairs = _window_pairs(length, least.window) - _window_pairs(shared, least.window)
        compute += float(pairs.sum()) * least.window_pair
        if not shared_decode:  # Else it may be that none of these reads is a request's own.
            near = float(window_reads(length, steps, least.window).sum())
            memory += near * least.window_context
            traffic += near * costs.window_context
    fewest = max(float(tokens.max(initial=0)), prompts / chunk_tokens if chunk_tokens else 0.0)
    traffic += fewest * float(costs.weights[1])
    seconds = overlap.seconds(compute, memory, traffic) + fewest * costs.step
    longest = _longest_alone(tree, output, costs, overlap)
    return Bound(
        compute_seconds=compute,
        memory_seconds=memory,
        longest_seconds=longest,
        seconds=max(seconds / replicas, longest),
    )


def _window_pairs(length: Floats, window: int) -> Floats:
    """Prefill attention of so many tokens from the start, in units of L^2 without a window."""
    near = np.minimum(length, window)
    return np.asarray(near**2 + 2 * window * (length - near))


def _longest_alone(
    tree: PrefixTree, output: Ints, costs: StepCosts, overlap: OverlapModel, looked_at: int = 8
) -> float:
    """Of the requests with the longest outputs; any of them bounds the time."""
    most = np.argsort(-output[tree.requests], kind="stable")[:looked_at]
    floor = float(costs.tokens[1:].min()) + costs.least.sampled
    found = 0.0
    for leaf in most.tolist():
        steps = int(output[tree.requests[leaf]]) - 1
        contexts = float(tree.length[leaf]) + 1.0 + np.arange(steps)
        memory = contexts * costs.least.context + costs.least.state
        traffic = contexts * costs.context + float(costs.weights[1])
        each = overlap.seconds_each(floor, memory, traffic)
        found = max(found, float(each.sum()) + steps * costs.step)
    return found
