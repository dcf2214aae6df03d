"""Who starts when neither head may: one behind them that does, within a bound."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Hashable, Iterator, Mapping, Sequence
from typing import Protocol

from .admission import KVView, may_start_alone
from .dual_scanner import Side
from .kv_account import Candidate

# Requests behind each head that are looked at.
LOOK_BEHIND = 16
# Decode steps in which nothing could start, after which memory that the policy keeps for one side
# is lent to the other. Mostly what it is kept for starts in a moment.
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
    So it may be passed until all that ran when it became the head have ended; from then on nothing
    starts before it. What runs then has started in that time, so a head waits for no more than two
    generations of requests, whatever else arrives: twice as long as the longest may run.

    Mutable, without a clock: `now` is a number of decode steps. Whoever owns the queues calls
    `start`, `end` and `forget`.
    """

    def __init__(self) -> None:
        self._starts = 0
        # In the order of their start, by number of the start.
        self._running: dict[Hashable, int] = {}
        # Of what is or was a head: number of the latest start that it waits for.
        self._waits_for: dict[Hashable, int] = {}
        # Since when nothing may start by the policy.
        self._stuck_since: int | None = None

    def start(self, request: Hashable) -> None:
        self._starts += 1
        self._running[request] = self._starts
        self._waits_for.pop(request, None)

    def end(self, request: Hashable) -> None:
        """A request has ended, or lost its memory."""
        self._running.pop(request, None)

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
        closed: Side | None = None,
    ) -> Candidate | None:
        """The request that should start now, None when none can.

        Args:
            by_policy: the choice between a head of the left and one of the right.
            closed: a side of which nothing may start but by the policy.
        """
        heads = {side: next(queues.look(side), None) for side in Side}
        # One whose prefix is being computed waits for that, not for memory.
        waiting = [head for head in heads.values() if head is not None and not head.blocked]
        due = [head for head in waiting if self.is_due(head.request)]
        for head in due:
            if kv.fits(head) or may_start_alone(head, kv):
                return head
        if due and not kv.idle:
            return None
        chosen = _first_by_policy(queues, heads, waiting, by_policy)
        if chosen is not None:
            self._stuck_since = None
            return chosen
        if self._stuck_since is None:
            self._stuck_since = now
        if now - self._stuck_since < PATIENCE_STEPS:
            return None
        for head in waiting:
            if head.side is not closed:
                for candidate in itertools.islice(queues.look(head.side), 1 + LOOK_BEHIND):
                    if not candidate.blocked and kv.fits(candidate):
                        return candidate
        return None


def _first_by_policy(
    queues: Queues,
    heads: Mapping[Side, Candidate | None],
    waiting: Sequence[Candidate],
    by_policy: Policy,
) -> Candidate | None:
    """A head, or else the first behind one that would start if it were the head."""
    side = by_policy(heads[Side.LEFT], heads[Side.RIGHT])
    if side is not None:
        return heads[side]
    for head in waiting:
        for candidate in itertools.islice(queues.look(head.side), 1, 1 + LOOK_BEHIND):
            pair = {**heads, head.side: candidate}
            if by_policy(pair[Side.LEFT], pair[Side.RIGHT]) is head.side:
                return candidate
    return None
