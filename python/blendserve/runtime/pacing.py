"""Keeps batch lines from filling the event loop that they share with online requests.

A line costs the loop milliseconds at two points: when SGLang renders and tokenises it, and when its
answer becomes a response. One step of the scheduler can admit or end hundreds at once. So before a
line is sent, and before its answer goes on to SGLang's handler, it waits here for its turn, and one
turn is given in a round of the event loop: whatever else is ready comes in between.
"""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import AsyncIterator, Callable
from contextvars import ContextVar
from typing import Any

# While online requests are served, turns leave the loop idle for as long as a piece takes.
_REST_SECONDS = 0.002

is_batch_line: ContextVar[bool] = ContextVar("is_batch_line", default=False)
"""True in the task of a batch line, and in those that the server starts for it."""


class Pacer:
    """Gives turns, first come, first served. Use it in one event loop.

    Args:
        online: whether requests are served that are no batch lines.
    """

    def __init__(self, online: Callable[[], bool]) -> None:
        self._online = online
        self._waiting: deque[asyncio.Future[None]] = deque()
        self._giving = False

    async def turn(self) -> None:
        """Wait for a turn."""
        loop = asyncio.get_running_loop()
        mine: asyncio.Future[None] = loop.create_future()
        self._waiting.append(mine)
        if not self._giving:
            self._giving = True
            loop.call_soon(self._give)
        await mine

    def _give(self) -> None:
        while self._waiting and self._waiting[0].done():
            self._waiting.popleft()  # Cancelled while it waited.
        if not self._waiting:
            self._giving = False
            return
        self._waiting.popleft().set_result(None)
        loop = asyncio.get_running_loop()
        if self._online():
            loop.call_later(_REST_SECONDS, self._give)
        else:
            loop.call_soon(self._give)


def paced(generate: Callable[..., AsyncIterator[Any]], pacer: Pacer) -> Callable[..., Any]:
    """SGLang's ``TokenizerManager.generate_request``, whose outputs take turns for batch lines."""

    async def take_turns(outputs: AsyncIterator[Any]) -> AsyncIterator[Any]:
        async for output in outputs:
            await pacer.turn()
            yield output

    def generate_request(*args: Any, **kwargs: Any) -> AsyncIterator[Any]:
        outputs = generate(*args, **kwargs)
        return take_turns(outputs) if is_batch_line.get() else outputs

    return generate_request
