"""How much prefill a step should carry, so that it has as much compute per memory traffic as what
is left of the job."""

from __future__ import annotations

import math

import numpy as np

from blendserve.planner.prefix_tree import Floats
from blendserve.planner.step_pace import HIDDEN_DENSITY

# While something runs longer than anything has so far, the memory work that is left is a guess on
# the low side. Until then no step takes more compute than this per memory second (but what the
# weight read hides): a job that does turn out compute-bound loses little in that time, one that
# does not would have spent the compute that its long decodes need beside them. And short steps
# bring the answers sooner.
UNCERTAIN_DENSITY = 0.8
# Steps after which the density of what is left is looked at again.
PACE_STEPS = 64
# While requests wait and decodes read less than this part of the memory, steps are paced as if they
# read so much. Prefill in proportion to few decodes keeps them few: any number of them is in
# balance, and a job of like requests would go on for ever in the small steps that it began with.
# More would start long decodes of unknown length by the hundred.
FILLING_PART = 0.4
_BISECTIONS = 20


def context_to_pace(context_tokens: float, total_tokens: float, waits: bool) -> int:
    """Tokens of context to pace a step by: those that its decodes attend to, or, while requests of
    known lengths wait, what should be filled at least of a memory of total_tokens."""
    return int(max(context_tokens, FILLING_PART * total_tokens) if waits else context_tokens)


def rest_density(
    compute_seconds: float,
    memory_seconds: float,
    tail_seconds: Floats,
    tail_steps: Floats,
    weight_seconds: float,
    full_seconds: float,
) -> float:
    """The density rho that uses up the compute just when the memory work ends.

    A step with decode attention m takes max(weight_seconds, rho m) of compute: as memory empties
    towards the end of a job, steps carry more than their share, because less would leave the GEMMs
    waiting for the weights. What those steps will take must not be spent before. So with
    compute_seconds left, of memory_seconds not started yet (in steps of full_seconds each) and a
    tail in which (k,) tail_steps have tail_seconds of attention each:

        memory / full * max(weight, rho full) + sum of steps * max(weight, rho tail) = compute

    0 when the compute does not even fill the weight reads; inf when there is no memory work. Where
    all of it hides anyway, what the tail takes at least is nothing to save for.
    """
    steps = np.append(tail_steps, memory_seconds / full_seconds if full_seconds > 0 else 0.0)
    each = np.append(tail_seconds, full_seconds)
    total = float((steps * each).sum())
    if total <= 0:
        return math.inf
    low, high = 0.0, compute_seconds / total  # At this one without any weight read.
    if high >= HIDDEN_DENSITY:
        return high
    for _ in range(_BISECTIONS):
        rho = (low + high) / 2
        if float((steps * np.maximum(weight_seconds, rho * each)).sum()) > compute_seconds:
            high = rho
        else:
            low = rho
    return high
