"""The scheduler's reports to the engine process: what it admitted, and how it is doing.

One ZeroMQ PUSH/PULL pair over a local socket. Reports are counters since the scheduler started,
so a lost or late report costs nothing but time: the next one says it all.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import msgspec
import zmq
import zmq.asyncio


@dataclass
class SchedulerReport:
    """Counters since the start of one scheduler, and its present state.

    Attributes:
        dp_rank: which data-parallel replica reports.
        taken: requests of each side ("left", "right") that left its queue for the first time:
            admitted, or aborted while they waited.
        queued: requests of each side that wait in the scheduler now.
        running: planned requests that hold KV memory now, per side.
        account_tokens: KV memory booked per side (prompt plus half the expected output).
        kv_total_tokens, kv_free_tokens: size of the KV pool; free or evictable part of it.
        prefill_tokens, decode_tokens: tokens computed since the start, all requests.
        prompt_tokens, cached_tokens: prompt tokens of the planned requests that were admitted, and
            those of them that came out of the cache.
        retractions: planned requests that were thrown out of the running batch.
        compute_seconds, memory_seconds: of all steps by the cost model: GEMMs, and the attention of
            planned decodes.
    """

    dp_rank: int = 0
    taken: dict[str, int] = field(default_factory=lambda: {"left": 0, "right": 0})
    queued: dict[str, int] = field(default_factory=lambda: {"left": 0, "right": 0})
    running: dict[str, int] = field(default_factory=lambda: {"left": 0, "right": 0})
    account_tokens: dict[str, float] = field(default_factory=lambda: {"left": 0.0, "right": 0.0})
    kv_total_tokens: int = 0
    kv_free_tokens: int = 0
    prefill_tokens: int = 0
    decode_tokens: int = 0
    prompt_tokens: int = 0
    cached_tokens: int = 0
    retractions: int = 0
    steps: int = 0
    compute_seconds: float = 0.0
    memory_seconds: float = 0.0
    target_density: float = 0.0


class ReportSender:
    """The scheduler's end. Never blocks: a full queue drops the report."""

    def __init__(self, address: str) -> None:
        self._socket: Any = zmq.Context.instance().socket(zmq.PUSH)
        self._socket.setsockopt(zmq.LINGER, 0)
        self._socket.setsockopt(zmq.SNDHWM, 64)
        self._socket.connect(address)

    def send(self, report: SchedulerReport) -> None:
        try:
            self._socket.send(msgspec.msgpack.encode(report), zmq.NOBLOCK)
        except zmq.Again:
            # The engine process is behind; the counters of the next report include this one's.
            return


class ReportReceiver:
    """The engine process's end: calls ``on_report`` for every report until closed."""

    def __init__(self, address: str, on_report: Callable[[SchedulerReport], None]) -> None:
        context: Any = zmq.asyncio.Context()
        self._socket = context.socket(zmq.PULL)
        self._socket.setsockopt(zmq.LINGER, 0)
        self._socket.bind(address)
        self._on_report = on_report

    async def run(self) -> None:
        """Receive until cancelled."""
        try:
            while True:
                message = await self._socket.recv()
                self._on_report(msgspec.msgpack.decode(message, type=SchedulerReport))
        finally:
            self._socket.close()
