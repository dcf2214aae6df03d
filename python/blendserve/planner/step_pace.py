"""How the steps of an engine are filled, by what they cost."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

from .step_costs import StepCosts

# From this density on a step gets the full chunk. Above 3.6, the last measured point of
# `interference.INTERFERENCE`, memory work costs the same beside however much compute, so nothing is
# gained by giving each step its share, and short steps only cost more of what every step costs.
# But a job whose lengths are not known yet looks like up to 6 (`DEFAULT_OUTPUT_TOKENS` each), and
# may turn out to need all of its compute beside long decodes.
HIDDEN_DENSITY = 8.0
# Part of the memory that decodes are taken to fill while there are more to come.
FULL_PART = 0.75


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
