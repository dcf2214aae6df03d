"""How many clients may be connected, and how long one may say nothing."""

from __future__ import annotations

import asyncio
import resource
from typing import Any

import h11
from uvicorn.protocols.http.h11_impl import H11Protocol

HEAD_SECONDS = 30.0
"""A connection on which no whole request head comes within this is closed."""
# Of this process's own: the database, journals, drafts, and what libraries open.
_OWN_DESCRIPTORS = 128
# A request that is passed on needs one to its client and one to the engine.
_DESCRIPTORS_PER_CLIENT = 2
_MIN_CLIENTS = 16


class PatientProtocol(H11Protocol):
    """uvicorn's HTTP/1.1, which by itself waits for ever for a request to begin."""

    head_seconds = HEAD_SECONDS

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._head_timer: asyncio.TimerHandle | None = None

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        super().connection_made(transport)
        self._watch_head()

    def data_received(self, data: bytes) -> None:
        super().data_received(data)
        self._watch_head()

    def connection_lost(self, exc: Exception | None) -> None:
        self._stop_timer()
        super().connection_lost(exc)

    def _watch_head(self) -> None:
        # h11 leaves IDLE when a head is whole, and comes back for the next request.
        if self.conn.their_state is not h11.IDLE:
            self._stop_timer()
        elif self._head_timer is None:
            self._head_timer = self.loop.call_later(self.head_seconds, self._give_up)

    def _give_up(self) -> None:
        self._head_timer = None
        if self.conn.their_state is h11.IDLE:
            self.transport.close()

    def _stop_timer(self) -> None:
        if self._head_timer is not None:
            self._head_timer.cancel()
            self._head_timer = None


def raise_descriptor_limit() -> int:
    """Let this process open as many files as the system allows it; returns how many clients may be
    connected, the rest being told to come again."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft != hard:
        resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
    return max((hard - _OWN_DESCRIPTORS) // _DESCRIPTORS_PER_CLIENT, _MIN_CLIENTS)
