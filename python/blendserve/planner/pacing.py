"""How much prefill a step should carry, so that it has as much compute per memory traffic as what
is left of the job."""

from __future__ import annotations

from dataclasses import dataclass

# While something runs longer than anything has so far, the memory work that is left is a guess on
# the low side. Until then no step takes more compute than this per memory second: a job that does
# turn out compute-bound loses little in that time, one that does not would have spent the compute
# that its long decodes need beside them.
UNCERTAIN_DENSITY = 1.5


@dataclass(frozen=True)
class StepPace:
    """token_seconds: GEMMs of a token. context_seconds: decode attention to one token of context.
    weight_seconds: reading the weights, which a step's GEMMs cannot undercut. chunk_tokens: most
    tokens of a step."""

    token_seconds: float
    context_seconds: float
    weight_seconds: float
    chunk_tokens: int

    def prefill_tokens(self, density: float, context_tokens: int, decodes: int) -> int:
        """Prompt tokens that give a step of so many decodes, which attend to context_tokens in
        all, this density; as many as the weight read hides at least, and at least one."""
        memory_seconds = context_tokens * self.context_seconds
        compute_seconds = max(density * memory_seconds, self.weight_seconds)
        tokens = min(compute_seconds / self.token_seconds, float(self.chunk_tokens))
        return max(int(tokens) - decodes, 1)


def rest_density(compute_seconds: float, memory_seconds: float, uncertain: bool) -> float:
    """Density to pace steps at, given what is left of the job, running requests included.

    uncertain: a running request is more than twice as long as any that has ended."""
    if memory_seconds <= 0:
        return UNCERTAIN_DENSITY if uncertain else 1e9
    density = compute_seconds / memory_seconds
    return min(density, UNCERTAIN_DENSITY) if uncertain else density
