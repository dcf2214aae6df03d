"""What starts next, and how much prefill a step carries: all that decides in one engine.

Whoever drives an engine (SGLang's scheduler, the simulator) tells this class what has happened, in
its own requests' names, and asks it before every step. No rule of the schedule stands elsewhere.
"""

from __future__ import annotations

import math
from collections.abc import Hashable, Sequence
from enum import StrEnum

from blendserve.planner.dual_scanner import Side
from blendserve.planner.step_pace import StepPace

from .admission import Admission, PacedAdmission
from .decodes import Decodes
from .gather import Gather
from .kv_account import Candidate, KVAccount
from .overtaking import Overtaking, Queues
from .step_pacer import StepPacer


class Steps(StrEnum):
    """What an engine's steps are made of. MIXED: prompt tokens and decodes, and the policy says how
    many of the former. FILLED: the same, but each takes what its size allows. SEPARATE: either.
    PARALLEL: both, side by side on parts of the device."""

    MIXED = "mixed"
    FILLED = "filled"
    SEPARATE = "separate"
    PARALLEL = "parallel"


class BlendPolicy:
    """The policy of one engine, and what it remembers of the running requests.

    Mutable, without a clock or I/O: time is the number of steps with decodes in them.

    Args:
        total_tokens: size of the KV pool.
        pace: costs of a step.
        steps: what they are made of.

    Attributes:
        account: memory that the running requests hold and will take. Whoever owns the pool sets
            `free_tokens` and `others_tokens` before it asks.
        decodes: how far they have come.
        overtaking: who may start before the heads, and for how long.
        rest_seconds: (compute, memory) of what has not started, for this engine to do.
        retractions: times that a running request lost its memory.
    """

    def __init__(self, total_tokens: int, pace: StepPace, steps: Steps) -> None:
        self.account = KVAccount(total_tokens)
        self.decodes = Decodes()
        self.overtaking = Overtaking()
        self.rest_seconds = (0.0, 0.0)
        self.retractions = 0
        # Of two heads that are both dense, whose turn it is.
        self._dense_turn = Side.RIGHT
        self._admission, self._paced = Admission(), PacedAdmission()
        self.steps_are(steps, pace)

    def steps_are(self, steps: Steps, pace: StepPace) -> None:
        """What steps are made of from now on, and what they cost."""
        self._pace = pace
        self._pacer = StepPacer(pace) if steps is Steps.MIXED else None
        self._gather = Gather(pace.costs.token_seconds(1)) if steps is Steps.SEPARATE else None

    # -- what has happened -----------------------------------------------------------------------

    def start(self, candidate: Candidate, done_tokens: int = 0) -> None:
        """A request starts, with so many output tokens of before it lost its memory."""
        request = candidate.request
        self.account.start(request, candidate)
        self.overtaking.start(candidate, self.account.now)
        self.decodes.start(request, done_tokens, candidate.guessed)

    def prefilled(self, request: Hashable, context_tokens: int, done_tokens: int) -> None:
        """Its prompt is in the KV pool, and it decodes from the next step on."""
        self.decodes.prefilled(request, context_tokens, done_tokens)

    def decoded(self, decodes: int = 0, seconds: float = 0.0) -> bool:
        """A step of so many decodes has taken so long. True if more may start than before."""
        if self._gather is not None:
            self._gather.decode_step(decodes, seconds)
        self.decodes.step()
        return self.account.decode_step()

    def prefill_began(self, goes_on: bool) -> None:
        """What was chosen goes into the next step. goes_on: see `Gather.prefill_step`."""
        if self._gather is not None:
            self._gather.prefill_step(goes_on)

    def end(self, request: Hashable) -> bool:
        """A request has ended or lost its memory; False for one that was not running."""
        if not self.account.end(request):
            return False
        self.decodes.end(request)
        self.overtaking.end(request)
        return True

    def memory_freed(self) -> None:
        """A request has given its memory back."""
        if self._gather is not None:
            self._gather.ended()

    def retracted(self) -> None:
        """One that ended here lost its memory to the others, and will start again."""
        self.account.retracted()
        self.retractions += 1

    def learn(
        self,
        request: Hashable,
        done_tokens: int,
        output_tokens: float,
        likely: Sequence[float],
        guessed: bool,
    ) -> None:
        """Other lengths are expected of a running request; see `KVAccount.revise`."""
        if self.account.revise(request, done_tokens, output_tokens, likely):
            self.decodes.revise(request, guessed)

    # -- what is to be done ----------------------------------------------------------------------

    @property
    def paced(self) -> bool:
        """Whether it says how much prefill a step carries."""
        return self._pacer is not None

    @property
    def target_density(self) -> float:
        """Of what is left of all jobs."""
        if self._pacer is not None:
            return self._pacer.target_density
        compute, memory = self.rest_seconds
        return compute / memory if memory > 0 else math.inf

    def prefill_tokens(self, backlog_tokens: int, decodes: int, read_part: float = 1.0) -> int:
        """See `StepPacer.prefill_tokens`; only where `paced`."""
        assert self._pacer is not None
        return self._pacer.prefill_tokens(
            self.account, self.decodes, self.rest_seconds, backlog_tokens, decodes, read_part
        )

    def running_seconds(self, backlog_tokens: int, read_part: float = 1.0) -> tuple[float, float]:
        """(compute, memory) seconds that the running requests are expected to take yet; arguments
        as of `prefill_tokens`."""
        account, pace = self.account, self._pace
        tokens = account.remaining_tokens() + backlog_tokens
        contexts = float(account.profile()[0].sum()) * account.bin_steps
        return tokens * pace.token_seconds, contexts * read_part * pace.context_seconds

    def waits(self, decodes: int) -> bool:
        """Whether nothing should start beside so many decodes, though it could."""
        return self._gather is not None and self._gather.holds(decodes)

    def choose(self, queues: Queues) -> Candidate | None:
        """The request that should start now, None when none can."""
        return self.overtaking.choose(
            queues,
            self.account,
            self.account.now,
            self._choose_head,
            self._rest_steps(),
        )

    def _choose_head(self, left: Candidate | None, right: Candidate | None) -> Side | None:
        account, target = self.account, self.target_density
        if self._pacer is None:
            return self._admission.choose(left, right, account, target)
        if right is None or right.density < target:
            return self._paced.choose(left, right, account, target)
        # The right one was sent when less was known of lengths. It has no part in filling memory,
        # but those behind it may; and so may those behind the left one, or that one itself.
        if left is not None and left.density < target:
            side = self._paced.choose(right, left, account, target)
            return None if side is None else side.other
        turns = (self._dense_turn, self._dense_turn.other)
        heads = {Side.LEFT: left, Side.RIGHT: right}
        for side in turns:
            head = heads[side]
            if head is not None and not head.blocked and account.fits(head):
                self._dense_turn = side.other
                return side
        return self._paced.choose(left, right, account, target)

    def density(self, prompt_tokens: int, output_tokens: float) -> float:
        """Compute density of a request that shares nothing; inf without output.

        Two of them tell how that of one that does changes with its length."""
        compute = (prompt_tokens + output_tokens) * self._pace.token_seconds
        read = (prompt_tokens + output_tokens / 2) * output_tokens * self._pace.context_seconds
        return compute / read if read > 0 else math.inf

    def _rest_steps(self) -> float:
        """Decode steps that all that has not started would take with a full pool."""
        full = self._pace.context_seconds * self.account.total_tokens
        return self.rest_seconds[1] / full if full > 0 else math.inf
