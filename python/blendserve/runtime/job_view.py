"""What of a running job is shown to an operator."""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass, field
from typing import Any

from blendserve.runtime.plan_worker import JobPlan


@dataclass
class JobView:
    """A job as `GET /blendserve/status` and the metrics show it.

    Attributes:
        deadline: unix seconds, None for a job without haste.
        phase: "reading prompts", "planning" or "running".
        prompt_tokens, unique_tokens: of the lines that were left when this server took it up;
            the prompt tokens that a cache without end would have to compute.
        best_sharing, planned_sharing: shares of the prompt tokens that a DFS order and the plan's
            order find in the cache.
        bound_seconds: nothing could run the lines that were left faster: all compute that the best
            sharing leaves, or all memory traffic, whichever takes longer. 0: not known.
        answered_prompt_tokens, answered_cached_tokens: of the answered lines; found in the cache.
        target_density: compute density of what is left.
        left_density, right_density: at the two scanners; None when the plan is used up.
        waiting, in_flight: lines not yet sent, and lines sent and not yet answered.
        returned: times that a line's engine was lost, one of several, and the line ran on another.
        sampled: lines that run first for their lengths.
        plans: plans made so far.
        observed: answered lines, those without an error.
        estimated_output_tokens, estimated_lines_output_tokens, estimate_error_tokens: of the
            answered lines whose length was estimated: sums of the estimates, of the true lengths
            and of the absolute differences.
        total_work_tokens, done_work_tokens: prefill tokens that sharing leaves plus expected output
            tokens, of all lines and of the answered ones.
        done_work_seconds: compute and memory seconds of the answered lines by the cost model.
        answered_output_tokens: of the answered lines.
        flight_prefill_tokens, flight_output_tokens: computed so far of lines that are not answered.
        curve: how the work that was left goes on with time, as predicted last; empty: not known.
            curves: predictions so far. curve_prefill_tokens, curve_output_tokens: computed before
            the last, answered or not.
    """

    job_id: str
    deadline: float | None = None
    phase: str = "reading prompts"
    prompt_tokens: int = 0
    unique_tokens: int = 0
    best_sharing: float = 0.0
    planned_sharing: float = 0.0
    bound_seconds: float = 0.0
    answered_prompt_tokens: int = 0
    answered_cached_tokens: int = 0
    target_density: float = 0.0
    left_density: float | None = None
    right_density: float | None = None
    waiting: int = 0
    in_flight: int = 0
    returned: int = 0
    sampled: int = 0
    plans: int = 0
    observed: int = 0
    estimated_output_tokens: float = 0.0
    estimated_lines_output_tokens: int = 0
    estimate_error_tokens: float = 0.0
    total_work_tokens: float = 0.0
    done_work_tokens: float = 0.0
    done_work_seconds: float = 0.0
    answered_output_tokens: int = 0
    flight_prefill_tokens: int = 0
    flight_output_tokens: int = 0
    curve: dict[str, Any] = field(default_factory=dict)
    curves: int = 0
    curve_prefill_tokens: int = 0
    curve_output_tokens: int = 0

    def begin(self, plan: JobPlan) -> None:
        """The first plan: what the job is."""
        self.prompt_tokens = plan.prompt_tokens
        self.unique_tokens = plan.unique_tokens
        self.best_sharing = plan.sharing_best
        self.planned_sharing = plan.sharing_planned
        self.bound_seconds = plan.bound_seconds

    def computed(self) -> tuple[int, int]:
        """Tokens of prompts and of answers, as of the last look."""
        answered = self.answered_prompt_tokens - self.answered_cached_tokens
        return (
            answered + self.flight_prefill_tokens,
            self.answered_output_tokens + self.flight_output_tokens,
        )

    def adopt(self, plan: JobPlan, before: tuple[int, int]) -> None:
        """A plan, and what was `computed` when it was asked for."""
        self.plans += 1
        self.total_work_tokens = plan.total_work_tokens
        self.follow({} if plan.curve is None else asdict(plan.curve), before)

    def follow(self, curve: dict[str, Any], before: tuple[int, int]) -> None:
        """A new course, of what was left when so much was `computed`."""
        self.curve = curve
        self.curves += 1
        self.curve_prefill_tokens, self.curve_output_tokens = before

    def count_answer(
        self, prompt_tokens: int, cached_tokens: int, output_tokens: int, estimate: float | None
    ) -> None:
        """One more answered line; `estimate` of its output, None where it was known."""
        self.observed += 1
        self.answered_prompt_tokens += prompt_tokens
        self.answered_cached_tokens += cached_tokens
        self.answered_output_tokens += output_tokens
        if estimate is not None:
            self.estimated_output_tokens += estimate
            self.estimated_lines_output_tokens += output_tokens
            self.estimate_error_tokens += abs(estimate - output_tokens)


def without_infinity(value: Any) -> Any:
    """JSON has no infinity: a density without memory traffic, of what never decodes, is null."""
    if isinstance(value, dict):
        return {key: without_infinity(item) for key, item in value.items()}
    if isinstance(value, list):
        return [without_infinity(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
