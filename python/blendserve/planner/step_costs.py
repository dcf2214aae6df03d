"""What one step of an engine takes: the one set of costs that the simulator, the bounds, densities,
predictions and the runtime's pacing rest on.

A step runs the GEMMs of its tokens, the logits of those that sample, the attention of its prompt
chunks and of its decodes. Where the figures come from is for `cost_sources` to say: kernels
measured on a chip, formulas fitted to such, a datasheet, or an engine of our own.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property

import numpy as np

from .kernel_tables import Floats, Grid, Ints

# Steps that rates are those of: what a job's balance is reckoned with.
RATE_STEP_TOKENS = 2_048
RATE_PROMPT_TOKENS = 2_048
RATE_DECODES, RATE_CONTEXT = 128, 1_024
# So many times the best price of a token is too much for a smaller step: with tiles of 128 and 1 ms
# a step, an A100 runs steps of 256, an H100 of 384.
DEAREST = 4 / 3


@dataclass(frozen=True)
class AttentionCosts:
    """Attention of all layers of a kind. decode: over (decodes, context of each). prefill: over
    (chunks, tokens of each). window: how far back these layers reach, 0: all the way."""

    decode: Grid
    prefill: Grid
    window: int = 0


@dataclass(frozen=True)
class Rates:
    """Seconds per unit of work in large steps. token: GEMMs. sampled: logits. pair: prefill
    attention from position a to b costs (b^2 - a^2) of these. context: decode attention to a token
    of context; window_context: to one within the window of the layers that have one. state: what
    linear attention reads and writes of a decode."""

    token: float
    sampled: float
    pair: float
    context: float
    window_context: float = 0.0
    window_pair: float = 0.0
    window: int = 0
    state: float = 0.0


@dataclass(frozen=True, eq=False)
class StepCosts:
    """Terms of a step, in seconds.

    source: where they are from. tokens: (t + 1,) GEMMs, experts, small operators and all-reduces of
    so many tokens; in proportion beyond t. sampled: the same for the logits. attention: by kind of
    layer. weights: (t + 1,) reading the weights that so many tokens need, at the memory's full
    bandwidth. context, window_context: the same for the KV of one token. state: per decode, what
    linear attention reads and writes. step: of every step, whatever is in it. tile: tokens at whose
    multiples a step gets dearer, 0 where there are no such steps.
    """

    source: str
    tokens: Floats
    sampled: Floats
    attention: tuple[AttentionCosts, ...]
    weights: Floats
    context: float = 0.0
    window_context: float = 0.0
    state: float = 0.0
    step: float = 0.0
    tile: int = 0

    # -- one step -------------------------------------------------------------------------------

    def token_seconds(self, tokens: int) -> float:
        return _at(self._token_list, tokens)

    def sampled_seconds(self, sampled: int) -> float:
        return _at(self._sampled_list, sampled)

    def prefill_seconds(self, chunks: int, pairs: float, tokens: int, prefix_tokens: int) -> float:
        """Attention of so many chunks of prompts, of `tokens` in all. pairs: the sum of
        end^2 - begin^2. prefix_tokens: before the chunks, whose KV is read again."""
        if not chunks:
            return 0.0
        found = 0.0
        for kind in self.attention:
            work = min(pairs, 2.0 * kind.window * tokens) if kind.window else pairs
            found += kind.prefill.at(chunks, work)
        return max(found, prefix_tokens * self.context)

    def decode_seconds(self, decodes: int, context: float) -> float:
        """Attention of so many decodes that attend to `context` tokens in all."""
        if not decodes:
            return 0.0
        found = decodes * self.state
        for kind in self.attention:
            reads = min(context, decodes * kind.window) if kind.window else context
            found += kind.decode.at(decodes, reads)
        return found

    def decode_seconds_each(self, decodes: int, contexts: Floats) -> Floats:
        """The same for an array of contexts above 0, shape (k,)."""
        found = np.full(len(contexts), decodes * self.state)
        for kind in self.attention:
            reads = np.minimum(contexts, decodes * kind.window) if kind.window else contexts
            found += kind.decode.at_each(decodes, reads)
        return found

    def traffic_seconds(
        self, tokens: int, decodes: int, context: float, prefix_tokens: int = 0
    ) -> float:
        """What a step moves through the memory, weights and KV, at its full bandwidth: no step is
        shorter, however its operators overlap. prefix_tokens: before its chunks of prompts."""
        window = min(context, decodes * self._window) * self.window_context
        return self._weight_seconds(tokens) + (context + prefix_tokens) * self.context + window

    def traffic_seconds_each(self, tokens: int, decodes: int, contexts: Floats) -> Floats:
        window = np.minimum(contexts, decodes * self._window) * self.window_context
        weights = self._weight_seconds(tokens)
        return np.asarray(weights + contexts * self.context + window)

    def _weight_seconds(self, tokens: int) -> float:
        return self._weight_list[min(tokens, len(self._weight_list) - 1)]

    # -- what rests on them -----------------------------------------------------------------------

    @cached_property
    def rates(self) -> Rates:
        """Of large steps, for the balance of a job."""
        full = [kind for kind in self.attention if not kind.window]
        short = [kind for kind in self.attention if kind.window]
        counts = np.arange(1, RATE_STEP_TOKENS + 1)
        tokens = np.array([self.token_seconds(int(count)) for count in counts])
        pairs, reads = float(RATE_PROMPT_TOKENS**2), RATE_DECODES * RATE_CONTEXT
        window = short[0].window if short else 0
        near = RATE_DECODES * min(window, RATE_CONTEXT)
        return Rates(
            token=float((tokens / counts).min()),
            sampled=self.sampled_seconds(RATE_DECODES) / RATE_DECODES,
            pair=sum(kind.prefill.at(1, pairs) for kind in full) / pairs,
            context=sum(kind.decode.at(RATE_DECODES, reads) for kind in full) / reads,
            window=window,
            window_context=sum(kind.decode.at(RATE_DECODES, near) for kind in short) / max(near, 1),
            window_pair=sum(kind.prefill.at(1, pairs) for kind in short) / pairs,
            state=self.state,
        )

    @cached_property
    def least(self) -> Rates:
        """Rates that no step undercuts, whatever is in it."""
        full = [kind for kind in self.attention if not kind.window]
        short = [kind for kind in self.attention if kind.window]
        return Rates(
            token=_least(self.tokens),
            sampled=_least(self.sampled),
            pair=sum(kind.prefill.least_rate for kind in full),
            context=sum(kind.decode.least_rate for kind in full),
            window=short[0].window if short else 0,
            window_context=sum(kind.decode.least_rate for kind in short),
            window_pair=sum(kind.prefill.least_rate for kind in short),
            state=self.state,
        )

    def step_sizes(self, most: int) -> Ints:
        """Sizes that steps of up to `most` tokens should have: multiples of the smallest number of
        tiles whose tokens, each, cost no more than DEAREST times what they do at best, the fixed
        time of a step included. Empty where tokens have no tiles."""
        if not self.tile:
            return np.zeros(0, dtype=np.int64)
        counts = np.arange(self.tile, max(most, self.tile) + 1, self.tile)
        seconds = np.array([self.token_seconds(count) for count in counts.tolist()]) + self.step
        each = seconds / counts
        smallest = int(counts[np.flatnonzero(each <= DEAREST * each.min())[0]])
        return np.arange(smallest, counts[-1] + 1, smallest)

    def without(self, terms: Sequence[str]) -> StepCosts:
        """With terms switched off, for comparison: "traffic" (one memory for weights and KV),
        "step" (fixed seconds), "sampled" (logits). Raises ValueError for any other name."""
        costs = self
        for term in terms:
            if term == "traffic":
                costs = replace(
                    costs,
                    weights=np.zeros_like(costs.weights),
                    context=0.0,
                    window_context=0.0,
                )
            elif term == "step":
                costs = replace(costs, step=0.0)
            elif term == "sampled":
                costs = replace(costs, sampled=np.zeros_like(costs.sampled))
            else:
                raise ValueError(f"no term {term!r}; use traffic, step, sampled")
        return costs

    @cached_property
    def _window(self) -> int:
        return max((kind.window for kind in self.attention), default=0)

    @cached_property
    def _token_list(self) -> list[float]:
        found: list[float] = self.tokens.tolist()
        return found

    @cached_property
    def _sampled_list(self) -> list[float]:
        found: list[float] = self.sampled.tolist()
        return found

    @cached_property
    def _weight_list(self) -> list[float]:
        found: list[float] = self.weights.tolist()
        return found


def _at(seconds: list[float], tokens: int) -> float:
    if tokens < len(seconds):
        return seconds[tokens]
    last = len(seconds) - 1
    return seconds[last] * (tokens / last)


def _least(seconds: Floats) -> float:
    return float((seconds[1:] / np.arange(1, len(seconds))).min())
