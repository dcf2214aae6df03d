"""Requests of known length, mixed so that equal ones do not start together.

By density, known lengths stand sorted: a side starts those of one length at once, they hold their
most at the same time, and until then memory stands half empty, as no more may start than that
moment has room for. Mixed, they are of all ages at any time, and memory is full. Requests right
below one node can change places for nothing: whatever stands beside them shares as much with one as
with another.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from .prefix_tree import Floats, Ints
from .step_costs import RATE_STEP_TOKENS, StepCosts
from .step_pace import FULL_PART, StepPace

# Multiples of it, less their whole part, are spread evenly over 0 to 1 however many there are.
_GOLDEN = (5**0.5 - 1) / 2


def spread_known(
    density: Floats,
    target_density: float,
    family: Ints,
    output_tokens: Floats,
    held_tokens: Floats,
    known: NDArray[np.bool_],
    costs: StepCosts,
    kv_tokens: int,
) -> Ints:
    """(k,) the position in a plan whose request should stand at each position.

    density, family, output_tokens, held_tokens (in the mean, while it decodes), known: (k,) along
    the plan. Only known requests of one family change places, and only on their side. That of d
    tokens starts at an even chance between now and d steps before the job's end, so that none is
    left for last.
    """
    place = np.arange(len(density))
    steps = float((held_tokens * output_tokens).sum()) / kv_tokens
    right = density < max(target_density, _hidden_density(costs, kv_tokens))
    # In the order in which each side starts.
    for at in (np.flatnonzero(known & ~right), np.flatnonzero(known & right)[::-1]):
        slots = at[np.argsort(family[at], kind="stable")]
        ranked = at[np.lexsort((-output_tokens[at], family[at]))]  # The longest of each first.
        group = family[ranked]
        first = np.flatnonzero(np.r_[True, group[1:] != group[:-1]]) if len(group) else group
        size = np.diff(np.r_[first, len(group)])
        rank = np.arange(len(group)) - np.repeat(first, size)
        slack = np.maximum(steps - output_tokens[ranked], 0.0)
        place[slots] = ranked[np.lexsort((rank * _GOLDEN % 1.0 * slack, group))]
    return place


def _hidden_density(costs: StepCosts, kv_tokens: int) -> float:
    """Requests below this density leave compute over even where they fill memory alone: the
    smallest step has more. So none of them is needed beside the others."""
    read = FULL_PART * kv_tokens * costs.rates.context
    return StepPace.of(costs, RATE_STEP_TOKENS).floor_seconds / read if read > 0 else 0.0
