"""Batch lines share the event loop with online requests, a piece at a time."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator

import pytest

from blendserve.runtime.pacing import Pacer, is_batch_line, paced


async def rounds_of(pacer: Pacer, lines: int) -> list[int]:
    """The round of the event loop in which each line had its turn."""
    rounds = 0
    turns: list[int] = []

    async def line() -> None:
        await pacer.turn()
        turns.append(rounds)

    tasks = [asyncio.create_task(line()) for _ in range(lines)]
    while not all(task.done() for task in tasks):
        await asyncio.sleep(0)
        rounds += 1
    return turns


def test_one_line_has_its_turn_in_a_round_of_the_loop():
    turns = asyncio.run(rounds_of(Pacer(lambda: False), 50))
    assert len(set(turns)) == 50


def test_turns_go_in_the_order_of_asking_and_start_again_after_a_pause():
    async def scenario() -> list[str]:
        pacer = Pacer(lambda: False)
        order: list[str] = []

        async def line(name: str) -> None:
            await pacer.turn()
            order.append(name)

        await asyncio.gather(*(line(name) for name in "abc"))
        await asyncio.gather(*(line(name) for name in "def"))
        return order

    assert asyncio.run(scenario()) == list("abcdef")


def test_a_cancelled_line_takes_no_turn_from_the_others():
    async def scenario() -> None:
        pacer = Pacer(lambda: False)
        tasks = [asyncio.create_task(pacer.turn()) for _ in range(4)]
        await asyncio.sleep(0)
        tasks[1].cancel()
        tasks[2].cancel()
        done, _ = await asyncio.wait(tasks, timeout=10)
        assert [task.cancelled() for task in tasks] == [False, True, True, False]
        assert len(done) == 4

    asyncio.run(scenario())


@pytest.mark.parametrize("online", [False, True])
def test_the_loop_rests_between_turns_only_while_online_requests_are_served(online):
    async def scenario() -> int:
        loop = asyncio.get_running_loop()
        rests: list[float] = []
        later = loop.call_later

        def watched(delay, *args, **kwargs):
            rests.append(delay)
            return later(delay, *args, **kwargs)

        loop.call_later = watched
        await rounds_of(Pacer(lambda: online), 5)
        return len(rests)

    assert asyncio.run(scenario()) == (5 if online else 0)


def test_only_the_outputs_of_batch_lines_wait_for_turns():
    asked: list[int] = []

    class Watched(Pacer):
        async def turn(self) -> None:
            asked.append(1)
            await super().turn()

    async def generate(first: int, *, count: int) -> AsyncIterator[int]:
        for k in range(first, first + count):
            yield k

    async def outputs(batch: bool) -> list[int]:
        is_batch_line.set(batch)
        wrapped = paced(generate, Watched(lambda: False))
        return [output async for output in wrapped(3, count=2)]

    assert asyncio.run(outputs(batch=False)) == [3, 4]
    assert asked == []
    assert asyncio.run(outputs(batch=True)) == [3, 4]
    assert asked == [1, 1]
