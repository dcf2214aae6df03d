"""Whose lines are with the engine: those of many batches at once, or suspects of one batch alone.

A line that was with the engine when it died is found out by running it with nothing beside it. So
the batches of a server take turns: most share theirs, and one with suspects has a turn to itself.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass

Rank = tuple[float, str]
"""When a batch is due (unix seconds), and its id, which makes ranks unique: the lowest is first."""


@dataclass(frozen=True)
class _Guest:
    alone: bool
    step_aside: Callable[[], None]


class Turns:
    """Use it in one event loop.

    Who wants to be alone waits until nobody else is with the engine. If it is due before all those
    who are, they are asked to step aside, and whoever is due later is not let in before it.
    """

    def __init__(self) -> None:
        self._inside: dict[Rank, _Guest] = {}
        self._waiting: dict[Rank, tuple[bool, asyncio.Future[None]]] = {}

    @asynccontextmanager
    async def take(
        self, rank: Rank, *, alone: bool, step_aside: Callable[[], None]
    ) -> AsyncIterator[None]:
        """Holds a turn. `step_aside` may be called meanwhile, several times: to leave soon."""
        while not self._may_enter(rank, alone):
            change = asyncio.get_running_loop().create_future()
            self._waiting[rank] = (alone, change)
            self._ask_to_step_aside()
            try:
                await change
            except asyncio.CancelledError:
                del self._waiting[rank]
                # Who gives up may be the one that others waited behind.
                self._tell_waiting()
                raise
            del self._waiting[rank]
        self._inside[rank] = _Guest(alone, step_aside)
        try:
            yield
        finally:
            del self._inside[rank]
            self._ask_to_step_aside()
            self._tell_waiting()

    def _may_enter(self, rank: Rank, alone: bool) -> bool:
        if any(guest.alone for guest in self._inside.values()):
            return False
        first = self._first_to_be_alone()
        if alone:
            return not self._inside and (first is None or rank <= first)
        return first is None or rank < first

    def _first_to_be_alone(self) -> Rank | None:
        """Who waits to be alone and is due before all that are inside."""
        first = min((rank for rank, (alone, _) in self._waiting.items() if alone), default=None)
        return None if first is None or first > min(self._inside, default=first) else first

    def _ask_to_step_aside(self) -> None:
        if self._first_to_be_alone() is not None:
            for guest in list(self._inside.values()):
                if not guest.alone:
                    guest.step_aside()

    def _tell_waiting(self) -> None:
        for _, change in self._waiting.values():
            if not change.done():
                change.set_result(None)
