"""The loops that carry batches forward: one each for validating, running and publishing.

Several batches run at once, those whose windows close first go first. What a batch needs next is
read from its row, never from memory, so the loops do after a crash exactly what they do otherwise.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

from blendserve.batch.errors import reason_of
from blendserve.batch.executor import EngineUnavailable, Executor
from blendserve.batch.job import JournalUnwritable, Result
from blendserve.batch.limits import BatchLimits
from blendserve.batch.progress import Progress
from blendserve.batch.stages import Publishing, Running, SavedRecords, Surroundings, Validation
from blendserve.batch.store import BatchStore
from blendserve.batch.tables import BatchRow

logger = logging.getLogger(__name__)

# A running batch makes room for one that has so many times less left of its completion window.
_CLEARLY_SOONER = 2
# Beside a thread for each running batch: validating, publishing, and looking around.
_OTHER_THREADS = 3


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
        self._runs: dict[str, asyncio.Task[None]] = {}
        self._interrupted: set[str] = set()
        self._yielding: set[str] = set()
        self._retry_at: dict[str, float] = {}
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

    async def start(self) -> None:
        """Reads what the journals hold, and takes up every open batch."""
        rows = [
            *await self._offload(self._store.open_batches, "in_progress"),
            *await self._offload(self._store.ending_batches),
        ]
        for row in rows:
            await self._around.take_up(row)
        for step in (self._validate_next, self._run_next, self._publish_next):
            wake = asyncio.Event()
            self._wakes.append(wake)
            self._tasks.append(asyncio.create_task(self._loop(step, wake)))

    async def stop(self) -> None:
        """Stops at once; open batches go on at the next start."""
        self._stopping = True
        self._running.request_stop(lambda _: True)
        self.wake()
        await asyncio.gather(*self._tasks, *self._runs.values())
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

    def _is_stopped(self, batch_id: str) -> bool:
        return self._stopping or batch_id in self._interrupted or batch_id in self._yielding

    async def _loop(self, step: Callable[[], Awaitable[bool]], wake: asyncio.Event) -> None:
        while not self._stopping:
            wake.clear()
            try:
                busy = await step()
                pause = None if busy else await self._pause_seconds()
            except Exception as error:
                logger.error("the batch store fails, trying again: %s", reason_of(error))
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

    async def _validate_next(self) -> bool:
        if self._waits_for_engine:
            return False
        async with self._claim(await self._offload(self._store.open_batches, "validating")) as row:
            if row is not None:
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
        rows = await self._offload(self._store.open_batches, "in_progress")
        waiting = [row for row in rows if row.id not in self._runs and self._is_free(row)]
        if self._stopping or not waiting:
            return False
        if len(self._runs) == self._max_running:
            self._make_room(waiting[0], [row for row in rows if row.id in self._runs])
            return False
        self._runs[waiting[0].id] = asyncio.create_task(self._run(waiting[0]))
        return True

    def _make_room(self, waiting: BatchRow, running: Sequence[BatchRow]) -> None:
        """Lets go of the batch that has most time, if the waiting one has clearly less."""
        if not running or self._yielding:
            return
        left = [row.expires_at - self._now() for row in (waiting, running[-1])]
        if _CLEARLY_SOONER * left[0] <= left[1]:
            self._yielding.add(running[-1].id)
            self._running.request_stop(self._yielding.__contains__)

    async def _run(self, row: BatchRow) -> None:
        try:
            async with self._claim([row]) as current:
                if current is not None:
                    await self._run_claimed(current)
        except Exception as error:
            logger.error("the batch store fails, trying again: %s", reason_of(error))
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
        overdue = await self._offload(self._store.expire_overdue, self._now())
        if overdue:
            self.interrupt(overdue)
        async with self._claim(await self._offload(self._store.ending_batches)) as row:
            if row is not None:
                await self._publishing.carry_out(row)
                self._interrupted.discard(row.id)
                return True
        return False

    def _wait_for_engine(self, row: BatchRow, error: EngineUnavailable, recoveries: int) -> None:
        # Unless the next engine came up while this one's last results were being saved.
        if self._recoveries == recoveries:
            self._waits_for_engine = True
        note = str(error) or "the engine is not available"
        logger.info("%s waits for an engine: %s", row.id, note)
        if row.total is not None:
            self._running.pause(row, note)

    @contextlib.asynccontextmanager
    async def _claim(self, rows: Sequence[BatchRow]) -> AsyncIterator[BatchRow | None]:
        """Holds the first of `rows` that nobody holds and that still is as it was read."""
        for row in rows:
            if not self._is_free(row):
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
                    logger.error("%s fails for now, trying again: %s", row.id, reason_of(error))
                    self._back_off(row)
                return
            finally:
                self._held.discard(row.id)
                self.wake()
        yield None

    def _is_free(self, row: BatchRow) -> bool:
        due = self._retry_at.get(row.id, 0.0)
        return row.id not in self._held and due <= asyncio.get_running_loop().time()

    def _back_off(self, row: BatchRow) -> None:
        self._retry_at[row.id] = asyncio.get_running_loop().time() + self._retry_seconds

    async def _offload(self, function: Callable[..., Result], *args: Any) -> Result:
        loop = asyncio.get_running_loop()
        return await loop.run_in_executor(self._threads, function, *args)
