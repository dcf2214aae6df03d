"""One batch on the engine: results are gathered, made durable in groups, and only then counted."""

from __future__ import annotations

import asyncio
import logging
from collections import Counter
from collections.abc import Awaitable, Callable, Collection, Iterable, Sequence
from typing import Any, Protocol, TypeVar

from blendserve.batch.errors import cause_of
from blendserve.batch.executor import EngineUnavailable, Executor, LineError, LineResult
from blendserve.batch.ids import request_line_id
from blendserve.batch.journal import Journal, Record, Suspect, Tally
from blendserve.batch.lines import FileLineSource
from blendserve.batch.rests import with_rests
from blendserve.batch.turns import Turns

logger = logging.getLogger(__name__)

Result = TypeVar("Result")

_MAX_UNSAVED_RESULTS = 512
_MAX_BARREN_PASSES = 2
# One by one would leave the engine nearly idle; all at once would tell nothing.
_SUSPECTS_AT_ONCE = 16
# The engine is busy or a part of it is away: another try may well succeed.
_TRANSIENT_STATUSES = frozenset({429, 502, 503, 504})
_MAX_ATTEMPTS = 5
_MAX_RETRY_PAUSE_SECONDS = 30.0


class Offload(Protocol):
    """Runs a blocking function in a worker thread."""

    def __call__(self, function: Callable[..., Result], *args: Any) -> Awaitable[Result]: ...


class JournalUnwritable(Exception):
    """Results cannot be made durable, e.g. because the disk is full."""


class BatchRun:
    """Runs what a journal does not have yet. The same for a fresh batch and for a resumed one.

    `on_progress` gets the tally and the number of retries after every saved group. `on_saved` gets
    the group's records, on a worker thread, and raises JournalUnwritable if it cannot take them.
    The executor is told the `deadline`, unix seconds. `turns`: of all batches of the server.
    """

    def __init__(
        self,
        batch_id: str,
        source: FileLineSource,
        journal: Journal,
        tally: Tally,
        executor: Executor,
        offload: Offload,
        on_progress: Callable[[Tally, int], None],
        on_saved: Callable[[Sequence[Record]], None] | None = None,
        *,
        deadline: float,
        turns: Turns,
    ) -> None:
        self._batch_id = batch_id
        self._deadline = deadline
        self._turns = turns
        self._source = source
        self._journal = journal
        self._tally = tally
        self._executor = executor
        self._offload = offload
        self._on_progress = on_progress
        self._on_saved = on_saved
        self._unsaved: list[LineResult] = []
        self._arrival = asyncio.Event()
        self._room = asyncio.Event()
        self._stopping = asyncio.Event()
        self._collector: asyncio.Task[None] | None = None
        self._attempts: Counter[int] = Counter()
        # What is left of a pass that failed, in halves; the next to run is the last.
        self._parts: list[Sequence[int]] = []
        self._failure: BaseException | None = None

    def request_stop(self) -> None:
        """Aborts what is in flight; results that have arrived are still saved. Loop thread only."""
        self._stopping.set()
        self._end_pass()

    def _end_pass(self) -> None:
        # Once: a second one would cut short the abort of what is in flight.
        if self._collector is not None and not self._collector.cancelling():
            self._collector.cancel()

    async def run(self) -> bool:
        """True once every line is done, False if it was stopped before.

        Suspects, the lines that were with the engine when it died, run last, in ever smaller groups
        and with no other batch beside them; one with which the engine dies again, and which was
        alone with it, is answered as an error. A pass may leave lines unanswered (the executor
        failed in an unknown way, or was busy): they are tried again as long as passes get anything
        done. Then they are halved until the line is found with which a pass fails though it runs no
        other; only that one is answered as an error. No line is ever dropped. Raises
        EngineUnavailable and JournalUnwritable; what is counted stays.
        """
        barren_passes = 0
        while not self._stopping.is_set():
            if self._tally.remaining == 0:
                return True
            pending = await self._offload(self._next_lines)
            before = (self._tally.remaining, self._attempts.total())
            try:
                ended = await self._pass(pending)
            except EngineUnavailable as error:
                await self._blame(error.in_flight)
                raise
            retries = self._attempts.total() - before[1]
            if (self._tally.remaining, self._attempts.total()) != before:
                barren_passes = 0
            elif ended:
                barren_passes += 1
            if barren_passes == (1 if self._parts else _MAX_BARREN_PASSES):
                barren_passes = 0
                await self._halve(pending)
            if retries:
                await self._pause_before_retry()
        return self._tally.remaining == 0

    def _next_lines(self) -> Sequence[int]:
        while self._parts:
            part = [index for index in self._parts[-1] if not self._tally.is_done(index)]
            if part:
                return part
            self._parts.pop()
        return self._tally.next_lines(_SUSPECTS_AT_ONCE)

    async def _halve(self, failed: Sequence[int]) -> None:
        """Plans the halves of a pass that failed; a single line is answered instead."""
        if self._parts:
            self._parts.pop()
        if len(failed) > 1:
            middle = len(failed) // 2
            self._parts += [failed[middle:], failed[:middle]]
            return
        message = "The engine gave no answer to this request, though it ran no other of this batch."
        if self._failure is not None:
            message += f" {cause_of(self._failure)}"
        error = LineError("internal_error", message)
        await self._commit([LineResult(failed[0], "", error=error)])

    async def _pass(self, pending: Sequence[int]) -> bool:
        """False if it was ended before the executor had done what it could."""
        collector = asyncio.create_task(self._collect(pending))
        collector.add_done_callback(lambda _: self._arrival.set())
        self._collector = collector
        try:
            await self._save_while_running(collector)
        finally:
            self._collector = None
            collector.cancel()
            await asyncio.wait([collector])
        if collector.cancelled():
            return False
        self._failure = failure = collector.exception()
        if isinstance(failure, EngineUnavailable):
            raise failure
        if failure is not None:
            logger.error("%s: the executor failed with %s", self._batch_id, type(failure).__name__)
        return True

    async def _collect(self, pending: Sequence[int]) -> None:
        rank = (self._deadline, self._batch_id)
        alone = pending[0] in self._tally.suspects
        async with self._turns.take(rank, alone=alone, step_aside=self._end_pass):
            await self._receive(pending)

    async def _receive(self, pending: Sequence[int]) -> None:
        in_flight: set[int] = set()
        results = self._executor.run(
            self._batch_id, self._source, pending, in_flight.add, self._deadline
        )
        try:
            async for result in results:
                in_flight.discard(result.index)
                self._unsaved.append(result)
                self._arrival.set()
                if len(self._unsaved) >= _MAX_UNSAVED_RESULTS:
                    self._room.clear()
                    await self._room.wait()
        except EngineUnavailable as error:
            raise EngineUnavailable(str(error), error.in_flight or in_flight) from error
        finally:
            close = getattr(results, "aclose", None)
            if close is not None:
                await close()

    async def _save_while_running(self, collector: asyncio.Task[None]) -> None:
        # Whatever arrived during one sync forms the next group: a slow disk gets large groups, a
        # fast one small delays.
        while self._unsaved or not collector.done():
            await self._arrival.wait()
            self._arrival.clear()
            group, self._unsaved = self._unsaved, []
            self._room.set()
            if group:
                await self._commit(group)

    async def _blame(self, in_flight: Collection[int]) -> None:
        """Keeps who was with the engine when it died, even if this process dies next."""
        lines = [index for index in sorted(in_flight) if not self._tally.is_done(index)]
        if not lines:
            return
        if len(lines) == 1 and lines[0] in self._tally.suspects:
            error = LineError(
                "engine_crashed",
                "The engine ended more than once while it ran this request, the last time while "
                "it ran no other.",
            )
            await self._commit([LineResult(lines[0], "", error=error)])
            return
        await self._offload(self._append, [Suspect(index).encode() for index in lines])
        for index in lines:
            self._tally.suspect(index)
        self._on_progress(self._tally, self._attempts.total())

    async def _pause_before_retry(self) -> None:
        most = max(self._attempts.values())
        pause = asyncio.create_task(self._stopping.wait())
        await asyncio.wait([pause], timeout=min(0.5 * 2**most, _MAX_RETRY_PAUSE_SECONDS))
        pause.cancel()

    async def _commit(self, group: Sequence[LineResult]) -> None:
        fresh: dict[int, LineResult] = {}
        strays = 0
        for result in group:
            if not 0 <= result.index < self._tally.total or self._tally.is_done(result.index):
                strays += 1
            elif not self._is_to_be_retried(result):
                fresh.setdefault(result.index, result)
        if strays:
            logger.warning("%s: %d results came twice or for no line", self._batch_id, strays)
        if fresh:
            records = await self._offload(self._save, list(fresh.values()))
            for record in records:
                self._tally.add(record)
            if self._on_saved is not None:
                await self._offload(self._on_saved, records)
        self._on_progress(self._tally, self._attempts.total())

    def _is_to_be_retried(self, result: LineResult) -> bool:
        if result.status_code not in _TRANSIENT_STATUSES:
            return False
        if self._attempts[result.index] + 1 >= _MAX_ATTEMPTS:
            return False
        self._attempts[result.index] += 1
        return True

    def _save(self, results: Iterable[LineResult]) -> list[Record]:
        records: list[Record] = []
        encoded: list[bytes] = []
        for result in with_rests(results):
            record = self._record(result)
            try:
                data = record.encode()
            except TypeError:
                record = self._record(
                    LineResult(
                        result.index,
                        result.request_id,
                        error=LineError("internal_error", "The answer is not proper JSON."),
                    )
                )
                data = record.encode()
            records.append(record)
            encoded.append(data)
        self._append(encoded)
        return records

    def _append(self, encoded: Sequence[bytes]) -> None:
        try:
            self._journal.append(encoded)
        except OSError as error:
            raise JournalUnwritable(error.strerror or str(error)) from error

    def _record(self, result: LineResult) -> Record:
        custom_id = self._source.custom_id(result.index)
        line_id = request_line_id(self._batch_id, result.index)
        if result.status_code is None:
            error = result.error or LineError("internal_error", "The request got no answer.")
            return unanswered(result.index, line_id, custom_id, error)
        response = {
            "status_code": result.status_code,
            "request_id": result.request_id,
            "body": result.body,
        }
        line = {"id": line_id, "custom_id": custom_id, "response": response, "error": None}
        return Record(result.index, "output" if 200 <= result.status_code < 300 else "error", line)


def unanswered(index: int, line_id: str, custom_id: str, error: LineError) -> Record:
    """The record of a line that got no response at all."""
    line = {
        "id": line_id,
        "custom_id": custom_id,
        "response": None,
        "error": {"code": error.code, "message": error.message},
    }
    return Record(index, "error", line)
