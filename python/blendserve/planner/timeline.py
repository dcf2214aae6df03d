"""How long a run along one order takes, without simulating its steps: requests as a fluid.

Each starts as soon as the memory that those before it hold in the mean leaves room, is prefilled
at the rate of full steps, and decodes a token a step. That gives, for a few hundred stretches of
steps, how many decode, what they attend to and what is prefilled beside them, and so what these
steps cost. Nothing overlaps, as in SGLang on one stream.
"""

from __future__ import annotations

import heapq
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from .prefix_tree import Floats, Ints
from .step_costs import RATE_STEP_TOKENS, StepCosts

# Part of the memory that requests hold in the mean where more wait for it, and part of that for the
# memory side of a paced run (`admission.LEFT_RESERVE` is kept from it).
HELD_PART, RIGHT_PART = 0.9, 0.8
# Stretches of steps that are looked at; more of them change nothing.
_STRETCHES = 400
# Of the most requests that run at once: where fewer do, the rest of a run is its tail.
TAIL_PART = 0.25
_CHUNK = RATE_STEP_TOKENS
# Beside decodes that would leave next to nothing of a step, prefill still gets so much of it.
_LEAST_PREFILL = _CHUNK / 8


@dataclass(frozen=True, eq=False)
class Work:
    """k requests in the order of a run, (k,) each. prompt: tokens. cached: those of them that are
    found. output: tokens to produce."""

    prompt: Floats
    cached: Floats
    output: Floats

    @property
    def own(self) -> Floats:
        """Prompt tokens to compute, one at least."""
        return np.maximum(self.prompt - self.cached, 1.0)


@dataclass(frozen=True, eq=False)
class Course:
    """How a run goes, in stretches of as many steps each.

    seconds, running: (s,) of each stretch; requests that decode in it. prefill, decoded: (s,)
    tokens of prompts that are computed in it, and of answers. end: (k,) number of the stretch, and
    part of it, in which each request ends.
    """

    seconds: Floats
    running: Floats
    prefill: Floats
    decoded: Floats
    end: Floats

    @property
    def total_seconds(self) -> float:
        return float(self.seconds.sum())

    def tail(self) -> tuple[float, Ints]:
        """What is left once fewer than TAIL_PART of the most requests run that ever do: part of the
        seconds; the requests, those that end last first."""
        most = self.running.max(initial=0.0)
        full = np.flatnonzero(self.running >= TAIL_PART * most)
        if not most or not len(full) or not self.total_seconds:
            return 0.0, np.zeros(0, dtype=np.int64)
        first = int(full[-1]) + 1
        late = np.flatnonzero(self.end > first)
        part = float(self.seconds[first:].sum()) / self.total_seconds
        return part, late[np.argsort(-self.end[late], kind="stable")]


def run_course(
    work: Work, costs: StepCosts, capacity: float, left: NDArray[np.bool_] | None = None
) -> Course:
    """A run in `capacity` tokens of KV memory. left: (k,) where steps are paced, which requests are
    of the compute side: these are prefilled evenly beside the others."""
    if not len(work.prompt):
        nothing = np.zeros(0)
        return Course(nothing, nothing, nothing, nothing, nothing)
    own, pool = work.own, capacity * HELD_PART
    start = _starts(own, work.output, pool) if left is None else _paced_starts(work, left, pool)
    begin = start + own / _CHUNK
    end = begin + np.maximum(work.output - 1.0, 0.0)
    edges = np.linspace(0.0, max(float(end.max()), 1.0), _STRETCHES + 1)
    span = edges[1]
    decodes = np.diff(_since(begin, edges) - _since(end, edges)) / span
    growth = np.diff(_squares_since(begin, edges) - _squares_since(end, edges)) / 2
    growth -= np.diff(_since(end, edges, end - begin))
    held = np.diff(_since(begin, edges, work.prompt) - _since(end, edges, work.prompt))
    context = np.maximum(held + growth, 0.0) / span
    prefill = np.diff(_since(start, edges) - _since(begin, edges)) * _CHUNK
    sizes = np.append(costs.step_sizes(_CHUNK) if left is not None else [], _CHUNK)
    seconds, steps_with_prefill = [], 0.0
    for running, reads, tokens in zip(
        decodes.tolist(), context.tolist(), prefill.tolist(), strict=True
    ):
        size = float(sizes[min(np.searchsorted(sizes, running + tokens / span), len(sizes) - 1)])
        full = tokens / max(size - running, 1.0)
        steps_with_prefill += full
        # Of a stretch in which less than one decodes, a part is empty.
        busy = min(running, 1.0)
        some, reads = max(round(running), 1), reads / max(busy, 1e-9)
        attention = costs.decode_seconds(some, reads) if busy else 0.0
        seconds.append(
            full * (costs.token_seconds(int(size)) + costs.step)
            + max(span - full, 0.0) * busy * (costs.token_seconds(some) + costs.step)
            + span * busy * attention
        )
    prompts = _prompt_seconds(work, costs, steps_with_prefill)
    spread = prefill / max(float(prefill.sum()), 1e-9)
    return Course(
        np.array(seconds) + prompts * spread, decodes, prefill, decodes * span, end / span
    )


def _starts(own: Floats, output: Floats, pool: float) -> Floats:
    """(k,) steps at which requests start, one after the other, each with its mean holding, once
    there is room for the most that it will hold."""
    now, free = 0.0, pool
    running: list[tuple[float, float]] = []  # (end, tokens)
    starts = []
    for tokens, length in zip(own.tolist(), output.tolist(), strict=True):
        need, most = min(tokens + length / 2, pool), min(tokens + length, pool)
        while running and (running[0][0] <= now or free < most):
            end, held = heapq.heappop(running)
            now = max(now, end)
            free += held
        starts.append(now)
        free -= need
        heapq.heappush(running, (now + tokens / _CHUNK + length, need))
        now += tokens / max(_CHUNK - len(running), _LEAST_PREFILL)
    return np.array(starts)


def _paced_starts(work: Work, left: NDArray[np.bool_], pool: float) -> Floats:
    """The memory side as memory allows, the compute side evenly beside it, to end with it."""
    own, output = work.own, work.output
    start = np.zeros(len(own))
    right = ~left
    start[right] = _starts(own[right], output[right], pool * RIGHT_PART)
    steps = max(
        float((start + output)[right].max(initial=0.0)),
        float(own.sum()) / _CHUNK,
        float(((work.prompt + output / 2) * output).sum()) / pool,
    )
    before = np.cumsum(own[left]) - own[left]
    even = before * (steps / max(float(own[left].sum()), 1.0))
    start[left] = np.minimum(even, np.maximum(steps - output[left], 0.0))
    return start


def _prompt_seconds(work: Work, costs: StepCosts, steps: float) -> float:
    """Attention of all prompts, in steps that are alike, and logits."""
    own, found = work.own, work.cached
    steps = max(steps, 1.0)
    chunks = max(round(len(own) / steps), 1)
    pairs = float(((found + own) ** 2 - found**2).sum()) / steps
    tokens, prefix = int(own.sum() / steps), int(found.sum() / steps)
    sampled = float(np.maximum(work.output, 1.0).sum()) * costs.rates.sampled
    return steps * costs.prefill_seconds(chunks, pairs, tokens, prefix) + sampled


def _since(at: Floats, edges: Floats, weight: Floats | None = None) -> Floats:
    """Sum of weight * max(edge - at, 0) for every edge."""
    order = np.argsort(at)
    w = np.ones(len(at)) if weight is None else weight[order]
    count = np.searchsorted(at[order], edges, side="right")
    total = np.concatenate(([0.0], np.cumsum(w)))
    moment = np.concatenate(([0.0], np.cumsum(w * at[order])))
    return np.asarray(total[count] * edges - moment[count])


def _squares_since(at: Floats, edges: Floats) -> Floats:
    """Sum of max(edge - at, 0)^2 for every edge."""
    sorted_at = np.sort(at)
    count = np.searchsorted(sorted_at, edges, side="right")
    first, second = (
        np.concatenate(([0.0], np.cumsum(sorted_at**power)))[count] for power in (1, 2)
    )
    return np.asarray(count * edges**2 - 2 * edges * first + second)
