"""An executor behind HTTP: the engine process's end of the link to the front process.

The front owns files, batches and journals; this end only runs lines and tells of them, so it may
die at any instant. A job is one streaming response of JSON lines (`remote.py` reads them):

    {"start": [3, 4]}      these lines are with the engine now
    {"result": {...}}      an answer
    {}                     nothing new; the connection lives
    {"failed": "TypeError: ..."} | {"end": true}    the last line
    {"lost": [3], "reason": "..."}    the last, too: with these lines several engines died
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
from array import array
from collections.abc import AsyncIterator, Callable, Iterable, Sequence
from contextlib import aclosing
from dataclasses import asdict
from pathlib import Path
from typing import Any

import orjson
from fastapi import APIRouter, HTTPException
from fastapi.responses import StreamingResponse
from pydantic import BaseModel, ConfigDict

from blendserve.batch.errors import cause_of, reason_of
from blendserve.batch.executor import EngineUnavailable, Executor, LineError, LineResult
from blendserve.batch.lines import FileLineSource
from blendserve.batch.rests import with_rests

logger = logging.getLogger(__name__)

_HEARTBEAT_SECONDS = 5.0
_MAX_UNSENT_EVENTS = 1_024


class EngineInfo(BaseModel):
    """What an engine says of itself; see `Executor`."""

    endpoints: list[str]
    models: list[str]
    fingerprint: str


class RunJob(BaseModel):
    """Lines to run: `pending` are ranges [first, last + 1) of indexes into the file at `path`."""

    model_config = ConfigDict(extra="forbid")

    job_id: str
    path: Path
    max_line_bytes: int
    pending: list[tuple[int, int]]
    deadline: float | None = None


def build_engine_router(
    executor: Executor, view: Callable[[], dict[str, Any]], batch_dir: Path
) -> APIRouter:
    """Routes for the front process. They read files by path, of `batch_dir` only.

    `view` gives the counters for GET /blendserve/status.
    """
    files = (batch_dir / "files").resolve()
    router = APIRouter(prefix="/blendserve")
    running: dict[str, asyncio.Task[None]] = {}

    @router.get("/engine")
    async def engine() -> EngineInfo:
        return EngineInfo(
            endpoints=sorted(executor.endpoints),
            models=sorted(executor.models),
            fingerprint=executor.fingerprint,
        )

    @router.get("/status")
    async def status() -> dict[str, Any]:
        return view()

    @router.post("/jobs")
    async def run_job(job: RunJob) -> StreamingResponse:
        # Links are followed first: who has this engine's key gets no other file of its user's.
        if job.path.resolve().parent != files:
            raise HTTPException(403, "Jobs are read from the batch directory only.")
        # The front has one stream per job: whoever asks again has lost the one before.
        if (before := running.get(job.job_id)) is not None:
            before.cancel()
            await asyncio.wait([before])
        source = await asyncio.to_thread(FileLineSource, job.path, job.max_line_bytes)
        pending = await asyncio.to_thread(_flat, job.pending)
        stream = _JobStream(executor, job, source, pending)
        running[job.job_id] = task = stream.start()
        task.add_done_callback(lambda _: running.pop(job.job_id, None))
        return StreamingResponse(stream.events(task), media_type="application/x-ndjson")

    return router


class _JobStream:
    def __init__(
        self, executor: Executor, job: RunJob, source: FileLineSource, pending: Sequence[int]
    ) -> None:
        self._executor = executor
        self._job = job
        self._source = source
        self._pending = pending
        self._unsent: list[bytes] = []
        self._started: list[int] = []
        self._news = asyncio.Event()
        self._room = asyncio.Event()

    def start(self) -> asyncio.Task[None]:
        """Runs the job, until it ends or the task is cancelled, which aborts what is in flight."""
        task = asyncio.create_task(self._run())
        task.add_done_callback(lambda _: self._news.set())
        return task

    async def events(self, task: asyncio.Task[None]) -> AsyncIterator[bytes]:
        """Blocks of whole lines. Closing it cancels the task."""
        try:
            while True:
                with contextlib.suppress(asyncio.TimeoutError):
                    await asyncio.wait_for(self._news.wait(), _HEARTBEAT_SECONDS)
                self._news.clear()
                # Read before the block is taken: what comes later comes with another round.
                ended = task.done()
                yield self._take_block()
                if ended:
                    yield _ending(task)
                    return
        finally:
            # Not waited for: a client that went away has cancelled this, and would every await.
            task.cancel()

    def _take_block(self) -> bytes:
        started, self._started = self._started, []
        unsent, self._unsent = self._unsent, []
        self._room.set()
        if started:
            unsent.insert(0, _line({"start": started}))
        return b"".join(unsent) or b"{}\n"

    def _on_start(self, index: int) -> None:
        self._started.append(index)
        self._news.set()

    async def _run(self) -> None:
        results = self._executor.run(
            self._job.job_id, self._source, self._pending, self._on_start, self._job.deadline
        )
        try:
            async with aclosing(results) as stream:  # type: ignore[type-var]
                async for result in stream:
                    self._unsent.append(_encoded(result))
                    self._news.set()
                    if len(self._unsent) >= _MAX_UNSENT_EVENTS:
                        self._room.clear()
                        await self._room.wait()
        finally:
            self._source.close()


def _ending(task: asyncio.Task[None]) -> bytes:
    if task.cancelled():
        return _line({"failed": "CancelledError"})
    failure = task.exception()
    if failure is None:
        return _line({"end": True})
    if isinstance(failure, EngineUnavailable):
        return _line({"lost": sorted(failure.in_flight), "reason": str(failure)})
    logger.error("a job failed in the executor: %s", reason_of(failure))
    return _line({"failed": cause_of(failure)})


def _encoded(result: LineResult) -> bytes:
    try:
        return _line({"result": _shallow_dict(result)})
    except TypeError:
        error = LineError("internal_error", "The answer is not proper JSON.")
        return _line({"result": _shallow_dict(LineResult(result.index, "", error=error))})


def _shallow_dict(result: LineResult) -> dict[str, Any]:
    """`dataclasses.asdict` without copying the body."""
    return {**result.__dict__, "error": result.error and asdict(result.error)}


def _line(event: dict[str, Any]) -> bytes:
    return orjson.dumps(event, option=orjson.OPT_APPEND_NEWLINE)


def _flat(ranges: Iterable[tuple[int, int]]) -> Sequence[int]:
    indexes = array("Q")
    for first, end in with_rests(ranges):
        indexes.extend(range(first, end))
    return indexes
