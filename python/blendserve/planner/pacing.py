"""How much prefill a step should carry, so that it has as much compute per memory traffic as what
is left of the job."""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import cached_property

import numpy as np

from .prefix_tree import Floats
from .step_costs import StepCosts

# While something runs longer than anything has so far, the memory work that is left is a guess on
# the low side. Until then no step takes more compute than this per memory second (but what the
# weight read hides): a job that does turn out compute-bound loses little in that time, one that
# does not would have spent the compute that its long decodes need beside them. And short steps
# bring the answers sooner.
UNCERTAIN_DENSITY = 0.8
# And until then, each of them may grow to so many times the longest so far (of so many tokens at
# least); together they must not take more than this part of the memory. Half of it left the memory
# of a small pool empty for as long as the first long decodes ran, as if all grew so far at once.
UNCERTAIN_GROWTH = 4
UNCERTAIN_TOKENS = 1_024
UNCERTAIN_SHARE = 0.8
# A request of unknown length is a long decode from here on.
LONG_TOKENS = 256
# From this density on a step gets the full chunk. Above 3.6, the last measured point of
# `interference.INTERFERENCE`, memory work costs the same beside however much compute, so nothing is
# gained by giving each step its share, and short steps only cost more of what every step costs.
# But a job whose lengths are not known yet looks like up to 6 (`DEFAULT_OUTPUT_TOKENS` each), and
# may turn out to need all of its compute beside long decodes.
HIDDEN_DENSITY = 8.0
# Steps after which the density of what is left is looked at again.
PACE_STEPS = 64
# Part of the memory that decodes are taken to fill while there are more to come.
FULL_PART = 0.75
# While requests wait and decodes read less than this part of the memory, steps are paced as if they
# read so much. Prefill in proportion to few decodes keeps them few: any number of them is in
# balance, and a job of like requests would go on for ever in the small steps that it began with.
# More would start long decodes of unknown length by the hundred.
FILLING_PART = 0.4
_BISECTIONS = 20


@dataclass(frozen=True)
class StepPace:
    """How steps are filled, by what they cost. chunk_tokens: most tokens of a step. sizes: counts
    of tokens, decodes included, that a step should have, ascending; empty where any will do."""

    costs: StepCosts
    chunk_tokens: int
    sizes: tuple[int, ...] = ()

    @staticmethod
    def of(costs: StepCosts, chunk_tokens: int) -> StepPace:
        """With the sizes at which tokens are cheap."""
        return StepPace(costs, chunk_tokens, tuple(costs.step_sizes(chunk_tokens).tolist()))

    @property
    def token_seconds(self) -> float:
        """GEMMs of a token in large steps."""
        return self.costs.rates.token

    @property
    def context_seconds(self) -> float:
        """Decode attention to one token of context."""
        return self.costs.rates.context

    @cached_property
    def floor_seconds(self) -> float:
        """What tokens in large steps take for the time of the smallest step: no less compute is
        ever spent on one."""
        least = self.sizes[0] * self.token_seconds if self.sizes else 0.0
        return least or self.costs.token_seconds(1)

    def seconds(self, tokens: int, context_tokens: int) -> tuple[float, float]:
        """(compute, memory) seconds of a step with so many tokens in its GEMMs, whose decodes
        attend to context_tokens in all; prefill attention left out."""
        return self.costs.token_seconds(tokens), context_tokens * self.context_seconds

    def prefill_tokens(self, density: float, context_tokens: int, decodes: int) -> int:
        """Prompt tokens that give a step of so many decodes, which attend to context_tokens in
        all, this density (a full chunk where they all hide behind compute), with its tokens in all
        of the nearest size; as many as the weight read hides at least, and at least one."""
        if density >= HIDDEN_DENSITY:
            return max(self.chunk_tokens - decodes, 1)
        compute_seconds = max(density * context_tokens * self.context_seconds, self.floor_seconds)
        tokens = min(compute_seconds / self.token_seconds, float(self.chunk_tokens))
        if self.sizes:
            tokens = float(min(self.sizes, key=lambda size: abs(size - max(tokens, decodes))))
            if tokens <= decodes:  # The next size has room for prefill, if there is one.
                tokens = next((size for size in self.sizes if size > decodes), tokens)
        return max(int(tokens) - decodes, 1)


def context_to_pace(context_tokens: float, total_tokens: float, waits: bool) -> int:
    """Tokens of context to pace a step by: those that its decodes attend to, or, while requests of
    known lengths wait, what should be filled at least of a memory of total_tokens."""
    return int(max(context_tokens, FILLING_PART * total_tokens) if waits else context_tokens)


def enough_unknown(running: int, longest_tokens: int, total_tokens: int) -> bool:
    """Whether no more long decodes should start while it is not known how long they get."""
    each = UNCERTAIN_GROWTH * max(longest_tokens, UNCERTAIN_TOKENS)
    return (running + 1) * each > UNCERTAIN_SHARE * total_tokens


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
