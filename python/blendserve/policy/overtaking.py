"""Who starts where no head can: one behind them that fits, within a bound."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Hashable, Iterator
from dataclasses import replace
from typing import Protocol

from blendserve.planner.dual_scanner import Side

from .admission import KVView, may_start_alone
from .kv_account import Candidate
from .stagger import Stagger

# Requests behind each head that are looked at.
LOOK_BEHIND = 16
# Decode steps in which no head could start, after which others may. Mostly memory for the next one
# comes free in a moment.
PATIENCE_STEPS = 16


Policy = Callable[[Candidate | None, Candidate | None], Side | None]


class Queues(Protocol):
    """What waits on each side."""

    def look(self, side: Side) -> Iterator[Candidate]:
        """The requests of a side in the order in which they are to start, the head first."""
        ...


class Overtaking:
    """Chooses the next request to start: a head by the policy, or one behind the heads.

    A head that finds no memory must not hold up those that do, and must not be passed for ever.
    So where no head has started for some steps, those behind may, if their memory lasts; but once
    all that ran when a head became one have ended, nothing starts before it, but the other side's
    head if that has been one for as long. So a head waits for no more than two generations of
    requests, whatever else arrives: those that ran and those that passed it; and for the other
    head, if both sides have one that finds no memory.

    Mutable, without a clock: `now` is a number of decode steps. Whoever owns the queues calls
    `start`, `end` and `forget`.
    """

    def __init__(self) -> None:
        self._starts = 0
        # In the order of their start, by number of the start.
        self._running: dict[Hashable, int] = {}
        # Of what is or was a head: number of the latest start that it waits for.
        self._waits_for: dict[Hashable, int] = {}
        # Since when no head can start.
        self._stuck_since: int | None = None
        self._stagger = Stagger()

    def start(self, candidate: Candidate, now: int) -> None:
        """A request starts."""
        self._starts += 1
        self._running[candidate.request] = self._starts
        self._waits_for.pop(candidate.request, None)
        self._stagger.start(candidate, now)

    def end(self, request: Hashable) -> None:
        """A request has ended, or lost its memory."""
        self._running.pop(request, None)
        self._stagger.end(request)

    def forget(self, request: Hashable) -> None:
        """A request waits no longer, and has not started."""
        self._waits_for.pop(request, None)

    def is_due(self, request: Hashable) -> bool:
        """Whether nothing may start before this head any more."""
        if request not in self._waits_for:
            # Where nothing runs, it waits for whatever starts next.
            self._waits_for[request] = self._starts + (not self._running)
        oldest = next(iter(self._running.values()), self._starts + 1)
        return oldest > self._waits_for[request]

    def choose(
        self,
        queues: Queues,
        kv: KVView,
        now: int,
        by_policy: Policy,
        rest_steps: float = 0.0,
    ) -> Candidate | None:
        """The request that should start now, None when none can.

        Args:
            by_policy: the choice between a head of the left and one of the right.
            rest_steps: see `Stagger.holds`.
        """
        heads = {side: next(queues.look(side), None) for side in Side}
        # One whose prefix is being computed waits for that, not for memory.
        waiting = [head for head in heads.values() if head is not None and not head.blocked]
        due = [head for head in waiting if self.is_due(head.request)]
        # Of two, the one that has stood first for longer: else one side could start, head after
        # head, before the other's.
        longest = min((self._waits_for[head.request] for head in due), default=0)
        for head in due:
            if self._waits_for[head.request] == longest and (
                kv.fits(head) or may_start_alone(head, kv)
            ):
                return head
        if due and not kv.idle:
            return None
        held = {
            side: replace(head, blocked=True)
            if head is not None
            and not kv.idle
            and self._stagger.holds(head, kv.total_tokens, now, rest_steps)
            else head
            for side, head in heads.items()
        }
        side = by_policy(held[Side.LEFT], held[Side.RIGHT])
        if side is not None:
            self._stuck_since = None
            return heads[side]
        if self._stuck_since is None:
            self._stuck_since = now
        if now - self._stuck_since < PATIENCE_STEPS:
            return None
        for head in waiting:
            for candidate in itertools.islice(queues.look(head.side), 1 + LOOK_BEHIND):
                if candidate.blocked or not kv.fits(candidate):
                    continue
                if not self._stagger.holds(candidate, kv.total_tokens, now, rest_steps):
                    return candidate
        self._stuck_since = now  # Not to look at them all in every step.
        return None
