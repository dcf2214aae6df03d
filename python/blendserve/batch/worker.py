"""The loops that carry batches forward: validator, runner, publisher.

What a batch needs next is read from its row, never from memory, so the loops do after a crash
exactly what they do otherwise.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import traceback
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from typing import Any

import orjson
from sqlalchemy.exc import DBAPIError

from blendserve.batch.executor import EngineUnavailable, Executor, LineError
from blendserve.batch.job import BatchRun, JournalUnwritable, Result
from blendserve.batch.journal import Journal, Tally, tally_journal
from blendserve.batch.limits import BatchLimits
from blendserve.batch.lines import FileLineSource
from blendserve.batch.objects import BatchFault
from blendserve.batch.progress import Progress
from blendserve.batch.publication import Publication, publish_results
from blendserve.batch.store import BatchStore
from blendserve.batch.tables import BatchRow
from blendserve.batch.validation import ValidationStopped, validate_file

logger = logging.getLogger(__name__)

_UNFINISHED = {
    "cancelled": LineError("batch_cancelled", "The batch was cancelled before this request ran."),
    "expired": LineError("batch_expired", "The completion window closed before this request ran."),
    "failed": LineError("batch_failed", "The batch failed before this request ran."),
    "completed": LineError("internal_error", "The request got no answer."),
}


class BatchWorker:
    """Owns every batch that is not at its end. Create and use it in one event loop."""

    def __init__(
        self,
        store: BatchStore,
        executor: Executor,
        limits: BatchLimits,
        now: Callable[[], int],
        retry_seconds: float,
    ) -> None:
        self.live: dict[str, Progress] = {}
        """Progress of open batches by id: written here, read from any thread."""
        self._store = store
        self._executor = executor
        self._limits = limits
        self._now = now
        self._retry_seconds = retry_seconds
        self._held: set[str] = set()
        self._interrupted: set[str] = set()
        self._retry_at: dict[str, float] = {}
        self._engine_failure: str | None = None
        self._run: tuple[str, BatchRun] | None = None
        self._stopping = False
        self._wakes: list[asyncio.Event] = []
        self._tasks: list[asyncio.Task[None]] = []
        self._threads = ThreadPoolExecutor(4, thread_name_prefix="blendserve-batch")

    async def start(self) -> None:
        """Reads what the journals hold, and takes up every open batch."""
        rows = [
            *await self._offload(self._store.open_batches, "in_progress"),
            *await self._offload(self._store.ending_batches),
        ]
        for row in rows:
            if row.total is not None:
                path = self._store.directory.journal(row.id)
                tally = await self._offload(tally_journal, path, row.total)
                self.live[row.id] = _progress(tally, recovered=tally.completed + tally.failed)
        for step in (self._validate_next, self._run_next, self._publish_next):
            wake = asyncio.Event()
            self._wakes.append(wake)
            self._tasks.append(asyncio.create_task(self._loop(step, wake)))

    async def stop(self) -> None:
        """Stops at once; open batches go on at the next start."""
        self._stopping = True
        if self._run is not None:
            self._run[1].request_stop()
        self.wake()
        await asyncio.gather(*self._tasks)
        self._threads.shutdown()

    def wake(self) -> None:
        """Lets every loop look for work now. Loop thread only, like `interrupt`."""
        for event in self._wakes:
            event.set()

    def interrupt(self, batch_ids: Sequence[str]) -> None:
        """Makes whoever works on these batches let go of them."""
        self._interrupted.update(batch_ids)
        if self._run is not None and self._run[0] in self._interrupted:
            self._run[1].request_stop()
        self.wake()

    def engine_recovered(self) -> None:
        """Takes up the batches that waited for an engine."""
        self._engine_failure = None
        self.wake()

    async def _loop(self, step: Callable[[], Awaitable[bool]], wake: asyncio.Event) -> None:
        while not self._stopping:
            wake.clear()
            try:
                busy = await step()
                pause = None if busy else await self._pause_seconds()
            except Exception as error:
                logger.error("the batch store fails, trying again: %s", _reason(error))
                busy, pause = False, self._retry_seconds
            if not busy:
                with contextlib.suppress(asyncio.TimeoutError):
                    await asyncio.wait_for(wake.wait(), pause)

    async def _pause_seconds(self) -> float | None:
        """How long nothing can happen by itself: until a retry or an expiry is due."""
        clock = asyncio.get_running_loop().time()
        waits = [max(0.0, due - clock) for due in self._retry_at.values()]
        expiry = await self._offload(self._store.next_expiry)
        if expiry is not None:
            waits.append(max(0.0, expiry - self._now()) + 0.05)
        return min(waits, default=None)

    # -- validating

    async def _validate_next(self) -> bool:
        async with self._claim(await self._offload(self._store.open_batches, "validating")) as row:
            if row is not None:
                await self._validate(row)
                return True
        return False

    async def _validate(self, row: BatchRow) -> None:
        if row.fingerprint != self._executor.fingerprint:
            await self._fail_validation(row, [self._foreign_engine(row)])
            return
        try:
            verdict = await self._offload(
                validate_file,
                self._store.directory.file(row.input_file_id),
                row.endpoint,
                self._executor,
                self._limits,
                lambda: self._stopping or row.id in self._interrupted,
            )
        except ValidationStopped:
            return
        except FileNotFoundError:
            await self._fail_validation(row, [_input_missing(row)])
            return
        if verdict.faults:
            await self._fail_validation(row, verdict.faults)
            return
        self.live[row.id] = Progress(total=verdict.total)
        await self._offload(
            lambda: self._store.advance(
                row.id,
                ["validating"],
                status="in_progress",
                in_progress_at=self._now(),
                total=verdict.total,
                model=verdict.model,
            )
        )

    async def _fail_validation(self, row: BatchRow, faults: Sequence[BatchFault]) -> None:
        await self._offload(
            lambda: self._store.advance(
                row.id,
                ["validating"],
                status="failed",
                ending="failed",
                failed_at=self._now(),
                errors_json=_faults_json(faults),
            )
        )

    # -- running

    async def _run_next(self) -> bool:
        if self._engine_failure is not None:
            return False
        async with self._claim(await self._offload(self._store.open_batches, "in_progress")) as row:
            if row is not None:
                await self._run_batch(row)
                return True
        return False

    async def _run_batch(self, row: BatchRow) -> None:
        path = self._store.directory.journal(row.id)
        total = row.total or 0
        # Opening comes first: it cuts off a torn record, after which the rest may be read.
        journal = await self._offload(Journal, path)
        try:
            tally = await self._offload(tally_journal, path, total)
            if tally.remaining == 0:
                await self._end(row, "completed", status="finalizing", finalizing_at=self._now())
                return
            if row.fingerprint != self._executor.fingerprint:
                fault = self._foreign_engine(row)
                await self._end(row, "failed", errors_json=_faults_json([fault]))
                return
            try:
                source = await self._offload(
                    FileLineSource,
                    self._store.directory.file(row.input_file_id),
                    self._limits.max_line_bytes,
                )
            except FileNotFoundError:
                await self._end(row, "failed", errors_json=_faults_json([_input_missing(row)]))
                return
            try:
                await self._drive(row, source, journal, tally)
            finally:
                source.close()
        finally:
            journal.close()

    async def _drive(
        self, row: BatchRow, source: FileLineSource, journal: Journal, tally: Tally
    ) -> None:
        start = _progress(tally, recovered=tally.completed + tally.failed)
        start = replace(start, started_at=float(self._now()), phase="running")

        def report(current: Tally) -> None:
            self.live[row.id] = replace(
                start, completed=current.completed, failed=current.failed, usage=current.usage
            )

        report(tally)
        run = BatchRun(row.id, source, journal, tally, self._executor, self._offload, report)
        self._run = (row.id, run)
        try:
            if self._stopping or row.id in self._interrupted:
                return
            if await run.run():
                await self._end(row, "completed", status="finalizing", finalizing_at=self._now())
        except EngineUnavailable as error:
            self._engine_failure = str(error) or "the engine is not available"
            logger.error("%s waits for an engine: %s", row.id, self._engine_failure)
            self._pause(row, self._engine_failure)
        except JournalUnwritable as error:
            logger.error("%s pauses, its results cannot be saved: %s", row.id, error)
            self._pause(row, f"results cannot be saved: {error}")
            self._back_off(row)
        finally:
            self._run = None

    def _pause(self, row: BatchRow, note: str) -> None:
        self.live[row.id] = replace(self.live[row.id], phase="paused", note=note)

    async def _end(self, row: BatchRow, ending: str, **values: Any) -> None:
        await self._offload(
            lambda: self._store.advance(row.id, ["in_progress"], ending=ending, **values)
        )

    # -- publishing

    async def _publish_next(self) -> bool:
        overdue = await self._offload(self._store.expire_overdue, self._now())
        if overdue:
            self.interrupt(overdue)
        async with self._claim(await self._offload(self._store.ending_batches)) as row:
            if row is not None:
                await self._publish(row)
                return True
        return False

    async def _publish(self, row: BatchRow) -> None:
        ending = row.ending or "completed"
        publication: Publication | None = None
        if row.total is not None:
            if ending == "completed" and not await self._is_complete(row):
                # The journal lost records since: the batch is not at its end after all.
                await self._conclude(row, status="in_progress", ending=None, finalizing_at=None)
                return
            publication = await self._offload(
                lambda: publish_results(
                    self._store.directory,
                    row,
                    max_line_bytes=self._limits.max_line_bytes,
                    unfinished=_UNFINISHED[ending],
                    now=self._now,
                )
            )
        if publication is None:
            await self._conclude(row, status=ending, **{f"{ending}_at": self._now()})
        else:
            await self._conclude_with(row, ending, publication)
        self.live.pop(row.id, None)
        self._interrupted.discard(row.id)
        self._store.directory.journal(row.id).unlink(missing_ok=True)

    async def _is_complete(self, row: BatchRow) -> bool:
        path = self._store.directory.journal(row.id)
        tally = await self._offload(tally_journal, path, row.total or 0)
        return tally.remaining == 0

    async def _conclude_with(self, row: BatchRow, ending: str, publication: Publication) -> None:
        tally, usage = publication.tally, publication.tally.usage
        files = [file for file in (publication.output, publication.error) if file is not None]
        await self._conclude(
            row,
            *files,
            status=ending,
            completed=tally.completed,
            failed=tally.total - tally.completed,
            input_tokens=usage.input_tokens,
            cached_tokens=usage.cached_tokens,
            output_tokens=usage.output_tokens,
            reasoning_tokens=usage.reasoning_tokens,
            output_file_id=publication.output and publication.output.id,
            error_file_id=publication.error and publication.error.id,
            **{f"{ending}_at": self._now()},
        )

    async def _conclude(self, row: BatchRow, *files: Any, **values: Any) -> None:
        await self._offload(lambda: self._store.conclude(row.id, files, **values))

    # -- shared

    @contextlib.asynccontextmanager
    async def _claim(self, rows: Sequence[BatchRow]) -> AsyncIterator[BatchRow | None]:
        """Holds the first of `rows` that nobody holds and that still is as it was read."""
        clock = asyncio.get_running_loop().time()
        for row in rows:
            if row.id in self._held or self._retry_at.get(row.id, 0.0) > clock:
                continue
            self._held.add(row.id)
            try:
                current = await self._offload(self._store.find_batch, row.id)
                if (
                    self._stopping
                    or current is None
                    or (current.status, current.ending) != (row.status, row.ending)
                ):
                    continue
                self._retry_at.pop(row.id, None)
                try:
                    yield current
                except Exception as error:
                    # One batch that cannot go on must not hold up the others.
                    logger.error("%s fails for now, trying again: %s", row.id, _reason(error))
                    self._back_off(row)
                return
            finally:
                self._held.discard(row.id)
                self.wake()
        yield None

    def _back_off(self, row: BatchRow) -> None:
        self._retry_at[row.id] = asyncio.get_running_loop().time() + self._retry_seconds

    def _foreign_engine(self, row: BatchRow) -> BatchFault:
        return BatchFault(
            code="engine_changed",
            message=(
                f"The batch was begun with the engine {row.fingerprint}, and this server runs "
                f"{self._executor.fingerprint}; their answers must not stand in one file. Create "
                "the batch again from the same input file for the engine of today; finished "
                "requests of this one are in its output file."
            ),
        )

    async def _offload(self, function: Callable[..., Result], *args: Any) -> Result:
        loop = asyncio.get_running_loop()
        return await loop.run_in_executor(self._threads, function, *args)


def _progress(tally: Tally, *, recovered: int) -> Progress:
    return Progress(
        total=tally.total,
        completed=tally.completed,
        failed=tally.failed,
        usage=tally.usage,
        recovered=recovered,
    )


def _input_missing(row: BatchRow) -> BatchFault:
    return BatchFault(
        code="input_file_missing",
        message=f"The bytes of {row.input_file_id} are gone from the batch directory.",
    )


def _faults_json(faults: Sequence[BatchFault]) -> str:
    return orjson.dumps([fault.model_dump() for fault in faults]).decode()


def _reason(error: Exception) -> str:
    """An error's cause without its data: its text might quote a row or a prompt."""
    if isinstance(error, DBAPIError):
        return f"{type(error).__name__}: {error.orig}"
    if isinstance(error, OSError):
        return f"{type(error).__name__}: {error.strerror}"
    frames = "".join(traceback.format_tb(error.__traceback__))
    return f"{type(error).__name__}\n{frames}"
