"""How much prefill each mixed step carries beside its decodes.

SGLang fills a step with as many prompt tokens as its chunk size allows. So the compute of a job is
spent in the first half of the run, and the decodes of the second half have none to hide behind.
Here every step gets the prompt tokens that its decodes balance, at the density of what is left.
"""

from __future__ import annotations

import math

from blendserve.planner import StepPace, rest_density
from blendserve.planner.pacing import (
    FULL_PART,
    LONG_TOKENS,
    PACE_STEPS,
    UNCERTAIN_DENSITY,
    context_to_pace,
    enough_unknown,
)
from blendserve.runtime.side_queues import PlannedRequest, SideQueues

# A request shows that too little is known when it is so many times as long as the longest of the
# lengths that were expected of it.
_FAR_BEYOND = 1.5
# Part of the decodes' contexts that such requests make up before that counts: some always do.
_TELLING_PART = 0.1


class StepPacer:
    """The step budgets of one scheduler.

    Args:
        pace: costs of a step.

    Attributes:
        target_density: of all that is left: not sent yet, waiting, and running.
        hold_right: whether so much runs far beyond what was expected that no more long decodes
            should start until a new plan knows more.
    """

    def __init__(self, pace: StepPace) -> None:
        self._pace = pace
        self.target_density = self._density = math.inf
        self.hold_right = self._fills = False
        self._look_in = 0

    def prefill_tokens(
        self,
        blend: SideQueues,
        rest_seconds: tuple[float, float],
        backlog_tokens: int,
        decodes: int,
    ) -> int:
        """Prompt tokens for the next step, at least one.

        Args:
            blend: the requests that wait and run.
            rest_seconds: (compute, memory) of what has not been sent to the scheduler.
            backlog_tokens: still to be computed of prompts that have begun.
            decodes: requests that the step decodes.
        """
        self._look_in -= 1
        if self._look_in < 0:
            self._look_in = PACE_STEPS - 1
            self._look_ahead(blend, rest_seconds, backlog_tokens)
        total = blend.account.total_tokens
        context = context_to_pace(blend.context_tokens, total, self._fills)
        return self._pace.prefill_tokens(self._density, context, decodes)

    def _look_ahead(
        self, blend: SideQueues, rest_seconds: tuple[float, float], backlog_tokens: int
    ) -> None:
        pace, account = self._pace, blend.account
        tokens, alive = account.profile()
        tail_seconds = tokens * pace.context_seconds
        compute = rest_seconds[0] + blend.waiting_seconds[0]
        compute += (account.remaining_tokens() + backlog_tokens) * pace.token_seconds
        memory = rest_seconds[1] + blend.waiting_seconds[1]
        everything = memory + float(tail_seconds.sum()) * account.bin_steps
        self.target_density = compute / everything if everything > 0 else math.inf
        density = rest_density(
            compute,
            memory,
            tail_seconds,
            alive * account.bin_steps,
            pace.floor_seconds,
            FULL_PART * account.total_tokens * pace.context_seconds,
        )
        surprises = [
            done for request in blend.running.values() if (done := _beyond_expectation(request))
        ]
        little_known = sum(surprises) > _TELLING_PART * blend.context_tokens
        self.hold_right = little_known and enough_unknown(
            len(surprises), max(surprises), account.total_tokens
        )
        self._fills = memory > 0 and not little_known
        self._density = min(density, UNCERTAIN_DENSITY) if little_known else density


def _beyond_expectation(request: PlannedRequest) -> int:
    """Output tokens so far of a long decode that nobody expected; 0 for all others."""
    tag, done = request.tag, len(request.req.output_ids)
    likely = tag.likely_output_tokens
    return done if likely and done > max(_FAR_BEYOND * likely[-1], LONG_TOKENS) else 0
