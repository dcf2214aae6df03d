"""How much prefill each mixed step carries beside its decodes.

SGLang fills a step with as many prompt tokens as its chunk size allows. So the compute of a job is
spent in the first half of the run, and the decodes of the second half have none to hide behind.
Here every step gets the prompt tokens that its decodes balance, at the density of what is left.
"""

from __future__ import annotations

import math

from blendserve.planner.families import LONG_TOKENS
from blendserve.planner.step_pace import FULL_PART, StepPace
from blendserve.policy.decodes import Decodes
from blendserve.policy.kv_account import KVAccount
from blendserve.policy.pacing import (
    PACE_STEPS,
    UNCERTAIN_DENSITY,
    context_to_pace,
    rest_density,
)

# While no guess has come further than this, all of them may be as short, and steps are filled: the
# first answers come sooner, and little has been started that would have to be balanced.
_NEW_TOKENS = 32


class StepPacer:
    """The step budgets of one engine.

    Args:
        pace: costs of a step.

    Attributes:
        target_density: of all that is left: not started yet, and running.
    """

    def __init__(self, pace: StepPace) -> None:
        self._pace = pace
        self.target_density = self._density = math.inf
        self._fills = False
        self._look_in = 0

    def prefill_tokens(
        self,
        account: KVAccount,
        running: Decodes,
        rest_seconds: tuple[float, float],
        backlog_tokens: int,
        decodes: int,
        read_part: float = 1.0,
    ) -> int:
        """Prompt tokens for the next step, at least one.

        Args:
            account: memory that the running requests hold and will take.
            running: how far they have come.
            rest_seconds: (compute, memory) of what has not started.
            backlog_tokens: still to be computed of prompts that have begun.
            decodes: requests that the step decodes.
            read_part: part of their contexts that is read; what several have in common may be read
                once for all.
        """
        self._look_in -= 1
        if self._look_in < 0:
            self._look_in = PACE_STEPS - 1
            self._look_ahead(account, running, rest_seconds, backlog_tokens, read_part)
        read = read_part * running.context_tokens
        context = context_to_pace(read, read_part * account.total_tokens, self._fills)
        return self._pace.prefill_tokens(self._density, context, decodes)

    def _look_ahead(
        self,
        account: KVAccount,
        running: Decodes,
        rest_seconds: tuple[float, float],
        backlog_tokens: int,
        read_part: float,
    ) -> None:
        pace = self._pace
        tokens, alive = account.profile()
        tail_seconds = tokens * (read_part * pace.context_seconds)
        compute, memory = rest_seconds
        compute += (account.remaining_tokens() + backlog_tokens) * pace.token_seconds
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
        self._fills = memory > 0 and not running.guessed
        self._density = density
        if running.guessed:
            longest = running.longest_guessed()
            if longest <= _NEW_TOKENS:
                self._density = math.inf
            elif longest > LONG_TOKENS:
                self._density = min(density, UNCERTAIN_DENSITY)
