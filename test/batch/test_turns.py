"""Turns with the engine: many share one, a batch with suspects has one alone, all get theirs."""

from __future__ import annotations

import asyncio
from collections.abc import Coroutine
from contextlib import AsyncExitStack
from typing import Any

from hypothesis import given, settings
from hypothesis import strategies as st

from blendserve.batch.turns import Rank, Turns


class Guest:
    """A batch that takes one turn; `asked` counts how often it was asked to step aside."""

    def __init__(self, turns: Turns, due: float, *, alone: bool = False) -> None:
        self._turns, self._rank, self._alone = turns, (due, f"due-{due}"), alone
        self._stack = AsyncExitStack()
        self._entering: asyncio.Task[None] | None = None
        self.inside = False
        self.asked = 0

    async def come(self) -> None:
        """Enters, or begins to wait."""
        self._entering = asyncio.create_task(self._enter())
        await rest()

    async def leave(self) -> None:
        self.inside = False
        await self._stack.aclose()
        await rest()

    async def give_up(self) -> None:
        assert self._entering is not None
        self._entering.cancel()
        await rest()

    async def _enter(self) -> None:
        turn = self._turns.take(self._rank, alone=self._alone, step_aside=self._step_aside)
        await self._stack.enter_async_context(turn)
        self.inside = True

    def _step_aside(self) -> None:
        self.asked += 1


async def rest() -> None:
    for _ in range(5):
        await asyncio.sleep(0)


def run(story: Coroutine[Any, Any, None]) -> None:
    asyncio.run(asyncio.wait_for(story, 20))


def test_turns_are_shared_until_someone_due_first_wants_to_be_alone() -> None:
    async def story() -> None:
        turns = Turns()
        first, second = Guest(turns, 5), Guest(turns, 6)
        await first.come()
        await second.come()
        assert first.inside
        assert second.inside
        alone, later, sooner = Guest(turns, 4, alone=True), Guest(turns, 7), Guest(turns, 3)
        await alone.come()
        assert first.asked
        assert second.asked
        await later.come()
        await first.leave()
        await second.leave()
        assert alone.inside
        assert not later.inside
        await sooner.come()
        assert not sooner.inside
        await alone.leave()
        assert later.inside
        assert sooner.inside

    run(story())


def test_who_is_due_later_waits_to_be_alone_and_holds_nobody_back() -> None:
    async def story() -> None:
        turns = Turns()
        first, alone, later = Guest(turns, 1), Guest(turns, 5, alone=True), Guest(turns, 9)
        await first.come()
        await alone.come()
        await later.come()
        assert later.inside
        assert not alone.inside
        assert not first.asked
        # Now it is due before all that are left.
        await first.leave()
        assert later.asked
        await later.leave()
        assert alone.inside

    run(story())


def test_who_gives_up_waiting_lets_the_others_in() -> None:
    async def story() -> None:
        turns = Turns()
        inside, alone, later = Guest(turns, 5), Guest(turns, 4, alone=True), Guest(turns, 6)
        await inside.come()
        await alone.come()
        await later.come()
        assert not later.inside
        await alone.give_up()
        assert later.inside

    run(story())


@settings(max_examples=60, deadline=None)
@given(
    st.lists(
        st.tuples(st.integers(0, 9), st.integers(1, 4), st.integers(0, 12), st.booleans()),
        min_size=1,
        max_size=8,
    )
)
def test_everyone_gets_all_turns_and_who_is_alone_is(
    guests: list[tuple[int, int, int, bool]],
) -> None:
    """Each guest takes some turns, the later ones perhaps alone, and steps aside when asked."""
    inside: dict[Rank, bool] = {}

    async def live(turns: Turns, rank: Rank, rounds: int, length: int, alone_later: bool) -> None:
        while rounds:
            aside = asyncio.Event()
            alone = alone_later and rounds <= 2
            async with turns.take(rank, alone=alone, step_aside=aside.set):
                inside[rank] = alone
                assert len(inside) == 1 or not any(inside.values())
                for _ in range(length):
                    await asyncio.sleep(0)
                    if aside.is_set():
                        break
                else:
                    rounds -= 1
                del inside[rank]

    async def story() -> None:
        turns = Turns()
        await asyncio.gather(
            *(live(turns, (due, str(n)), *more) for n, (due, *more) in enumerate(guests))
        )

    run(story())
