"""The loops that carry batches forward: one each for validating, running and publishing.

Several batches run at once. Tenants take turns, and of one tenant's batches the one whose window
closes first goes first. What a batch needs next is read from its row, never from memory, so the
loops do after a crash exactly what they do otherwise.

A full disk, a locked database and an engine that is away are waited for. Anything else that a
batch raises is tried a few times, and then ends that batch.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
from collections import Counter
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

from blendserve.batch.errors import reason_of
from blendserve.batch.executor import EngineUnavailable, Executor
from blendserve.batch.fairness import in_turn, makes_room
from blendserve.batch.job import JournalUnwritable, Result
from blendserve.batch.limits import BatchLimits
from blendserve.batch.progress import Progress
from blendserve.batch.stages import (
    Publishing,
    Running,
    Validation,
    other_engine_note,
)
from blendserve.batch.storage import storage_fault
from blendserve.batch.store import BatchStore
from blendserve.batch.surroundings import SavedRecords, Surroundings
from blendserve.batch.tables import BatchRow, BatchStage

logger = logging.getLogger(__name__)

# Beside a thread for each running batch: validating, publishing, and looking around.
_OTHER_THREADS = 3
# The clock may be set forward at any time, so nobody sleeps until an expiry that is far off.
_MAX_PAUSE_SECONDS = 60.0
_SWEEP_SECONDS = 60
_MAX_TRIES = 3
# Batches that wait for another try. When there are more, it is not for their own sake.
_MAX_BACKING_OFF = 32


@dataclass(frozen=True)
class _Run:
    row: BatchRow
    task: asyncio.Task[None]


class BatchWorker:
    """Owns every batch that is not at its end. Create and use it in one event loop."""

    def __init__(
        self,
        store: BatchStore,
        executor: Executor,
        limits: BatchLimits,
        now: Callable[[], int],
        retry_seconds: float,
        on_saved: SavedRecords | None = None,
        in_order: bool = False,
    ) -> None:
        self._store = store
        self._executor = executor
        self._max_running = limits.max_running
        self._now = now
        self._retry_seconds = retry_seconds
        self._around = Surroundings(
            store=store,
            executor=executor,
            limits=limits,
            now=now,
            offload=self._offload,
            is_stopped=self._is_stopped,
            on_saved=on_saved,
            in_order=in_order,
        )
        self._validation = Validation(self._around)
        self._running = Running(self._around)
        self._publishing = Publishing(self._around)
        self._held: set[str] = set()
        self._runs: dict[str, _Run] = {}
        self._interrupted: set[str] = set()
        self._yielding: set[str] = set()
        self._backing_off: set[str] = set()
        self._tries: Counter[str] = Counter()
        self._last_tenant: dict[BatchStage, str] = {}
        self._swept_at: int | None = None
        self._engine_seen: str | None = None
        self._waits_for_engine = False
        self._recoveries = 0
        self._stopping = False
        self._wakes: list[asyncio.Event] = []
        self._tasks: list[asyncio.Task[None]] = []
        self._threads = ThreadPoolExecutor(
            limits.max_running + _OTHER_THREADS, thread_name_prefix="blendserve-batch"
        )

    @property
    def live(self) -> dict[str, Progress]:
        """Progress of open batches by id: written here, read from any thread."""
        return self._around.live

    def durable_bytes(self, row: BatchRow) -> int:
        """See `Surroundings`."""
        return self._around.durable_bytes(row)

    async def start(self) -> None:
        """Reads what the journals hold, and takes up every open batch."""
        last = 0
        while rows := await self._offload(self._store.backlog.unfinished_batches, last):
            for row in rows:
                await self._around.take_up(row)
            last = rows[-1].seq
        for step in (self._validate_next, self._run_next, self._publish_next):
            wake = asyncio.Event()
            self._wakes.append(wake)
            self._tasks.append(asyncio.create_task(self._loop(step, wake)))

    async def stop(self) -> None:
        """Stops at once; open batches go on at the next start."""
        self._stopping = True
        self._running.request_stop(lambda _: True)
        self.wake()
        await asyncio.gather(*self._tasks, *(run.task for run in self._runs.values()))
        self._threads.shutdown()

    def wake(self) -> None:
        """Lets every loop look for work now. Loop thread only, like `interrupt`."""
        for event in self._wakes:
            event.set()

    def interrupt(self, batch_ids: Sequence[str]) -> None:
        """Makes whoever works on these batches let go of them."""
        self._interrupted.update(batch_ids)
        self._running.request_stop(self._interrupted.__contains__)
        self.wake()

    def engine_recovered(self) -> None:
        """Takes up the batches that waited for an engine."""
        self._waits_for_engine = False
        self._recoveries += 1
        self.wake()

    def waits_for(self, row: BatchRow) -> str | None:
        """Why a batch that is to run cannot with the engine of the day. Any thread."""
        try:
            return other_engine_note(row, self._executor.fingerprint)
        except EngineUnavailable as error:
            return str(error)

    def _is_stopped(self, batch_id: str) -> bool:
        return self._stopping or batch_id in self._interrupted or batch_id in self._yielding

    async def _loop(self, step: Callable[[], Awaitable[bool]], wake: asyncio.Event) -> None:
        while not self._stopping:
            wake.clear()
            try:
                busy = await step()
                pause = None if busy else await self._pause_seconds()
            except Exception as error:
                logger.error("trying again: %s", self._said(error))
                busy, pause = False, self._retry_seconds
            if not busy:
                with contextlib.suppress(asyncio.TimeoutError):
                    await asyncio.wait_for(wake.wait(), pause)

    async def _pause_seconds(self) -> float:
        """How long nothing can happen by itself: until an expiry is due."""
        expiry = await self._offload(self._store.backlog.next_expiry)
        if expiry is None:
            return _MAX_PAUSE_SECONDS
        return min(_MAX_PAUSE_SECONDS, max(0.0, expiry - self._now()) + 0.05)

    async def _validate_next(self) -> bool:
        if self._waits_for_engine:
            return False
        async with self._claim(await self._next("validate")) as row:
            if row is not None:
                self._last_tenant["validate"] = row.tenant
                recoveries = self._recoveries
                try:
                    await self._validation.carry_out(row)
                except EngineUnavailable as error:
                    self._wait_for_engine(row, error, recoveries)
                return True
        return False

    async def _run_next(self) -> bool:
        """Begins to run a batch. False if none waits, or none can begin now."""
        if self._waits_for_engine:
            return False
        try:
            fingerprint = self._executor.fingerprint
        except EngineUnavailable:
            self._waits_for_engine = True
            return False
        if fingerprint != self._engine_seen:
            others = await self._offload(self._store.backlog.adopt, fingerprint)
            if others:
                logger.warning(
                    "%d batches were begun with other engines than %s, and wait for theirs",
                    others,
                    fingerprint,
                )
            self._engine_seen = fingerprint
        row = await self._next("run", fingerprint)
        if row is None or self._stopping:
            return False
        if len(self._runs) == self._max_running:
            if not self._yielding:
                self._make_room(row)
            return False
        self._last_tenant["run"] = row.tenant
        self._runs[row.id] = _Run(row, asyncio.create_task(self._run(row)))
        return True

    def _make_room(self, waiting: BatchRow) -> None:
        rows = [run.row for run in self._runs.values()]
        patient = makes_room(waiting, rows, self._now())
        if patient is not None:
            self._yielding.add(patient.id)
            self._running.request_stop(self._yielding.__contains__)

    async def _run(self, row: BatchRow) -> None:
        try:
            async with self._claim(row) as current:
                if current is not None:
                    await self._run_claimed(current)
        except Exception as error:
            logger.error("%s fails for now, trying again: %s", row.id, self._said(error))
            self._back_off(row)
        finally:
            del self._runs[row.id]
            self._yielding.discard(row.id)
            self.wake()

    async def _run_claimed(self, row: BatchRow) -> None:
        recoveries = self._recoveries
        try:
            await self._running.carry_out(row)
        except EngineUnavailable as error:
            self._wait_for_engine(row, error, recoveries)
        except JournalUnwritable as error:
            logger.error("%s pauses, its results cannot be saved: %s", row.id, error)
            self._running.pause(row, f"results cannot be saved: {error}")
            self._back_off(row)

    async def _publish_next(self) -> bool:
        overdue = await self._offload(self._store.backlog.expire_overdue, self._now())
        if overdue:
            self.interrupt(overdue)
        more = await self._sweep()
        async with self._claim(await self._next("publish")) as row:
            if row is not None:
                self._last_tenant["publish"] = row.tenant
                await self._publishing.carry_out(row)
                self._interrupted.discard(row.id)
                return True
        return more or bool(overdue)

    async def _sweep(self) -> bool:
        """Deletes what is past its time, a block of it; whether there is more."""
        now = self._now()
        if self._swept_at is not None and abs(now - self._swept_at) < _SWEEP_SECONDS:
            return False
        try:
            if await self._offload(self._store.bury_expired, now):
                return True
            await self._offload(self._store.directory.clear_lost, now)
            await self._offload(self._store.directory.hold_reserve)
        except Exception as error:
            # Batches end all the same; the next sweep is in a minute.
            logger.error("what has expired cannot be removed yet: %s", self._said(error))
        self._swept_at = now
        return False

    def _wait_for_engine(self, row: BatchRow, error: EngineUnavailable, recoveries: int) -> None:
        # Unless the next engine came up while this one's last results were being saved.
        if self._recoveries == recoveries:
            self._waits_for_engine = True
        note = str(error) or "the engine is not available"
        logger.info("%s waits for an engine: %s", row.id, note)
        if row.total is not None:
            self._running.pause(row, note)

    async def _next(self, stage: BatchStage, fingerprint: str | None = None) -> BatchRow | None:
        """The batch of a stage that is next, of those that nobody holds."""
        if len(self._backing_off) >= _MAX_BACKING_OFF:
            return None
        last = self._last_tenant.get(stage)
        running = Counter(run.row.tenant for run in self._runs.values() if stage == "run")
        return await self._offload(
            lambda: self._store.backlog.next_batch(
                stage,
                lambda tenants: in_turn(tenants, last, running),
                without=[*self._held, *self._backing_off, *self._runs],
                fingerprint=fingerprint,
            )
        )

    @contextlib.asynccontextmanager
    async def _claim(self, row: BatchRow | None) -> AsyncIterator[BatchRow | None]:
        """Holds a batch, if nobody holds it and it still is as it was read."""
        if row is None or row.id in self._held:
            yield None
            return
        self._held.add(row.id)
        try:
            current = await self._offload(self._store.find_batch, row.id)
            if (
                self._stopping
                or current is None
                or (current.status, current.ending) != (row.status, row.ending)
            ):
                yield None
                return
            try:
                yield current
            except Exception as error:
                # One batch that cannot go on must not hold up the others.
                await self._try_again(current, error)
            else:
                self._tries.pop(row.id, None)
        finally:
            self._held.discard(row.id)
            self.wake()

    async def _try_again(self, row: BatchRow, error: Exception) -> None:
        """Lets it wait for another try. Ends it after some, unless the storage is to blame."""
        if storage_fault(error, self._store.directory.database) is None:
            self._tries[row.id] += 1
        if self._tries[row.id] < _MAX_TRIES:
            logger.error("%s fails for now, trying again: %s", row.id, self._said(error))
            self._back_off(row)
            return
        logger.error("%s fails for good: %s", row.id, self._said(error))
        await self._publishing.give_up(row, error)
        del self._tries[row.id]

    def _said(self, error: Exception) -> str:
        fault = storage_fault(error, self._store.directory.database)
        return fault.remedy if fault is not None else reason_of(error)

    def _back_off(self, row: BatchRow) -> None:
        def try_again() -> None:
            self._backing_off.discard(row.id)
            self.wake()

        self._backing_off.add(row.id)
        asyncio.get_running_loop().call_later(self._retry_seconds, try_again)

    async def _offload(self, function: Callable[..., Result], *args: Any) -> Result:
        loop = asyncio.get_running_loop()
        return await loop.run_in_executor(self._threads, function, *args)
