"""Routes by which frontend programs become a job of this server.

    POST /blendserve/programs              {"name": ..., "limit": ..., "programs": [{...}, ...]}
    POST /blendserve/programs/{job}        {"ended": [0, 4], "failed": [2]} or {"cancel": true}

The first one's answer is a stream of JSON lines, for as long as the programs run:

    {"job": "programs_..."}
    {"go": [[3, "ticket"], [7, null]]}     these may send their requests; null: without a plan
    {"limit": 64}                          so many may run at once from now on
    {}                                     nothing new; the connection lives
    {"cancelled": true}                    no more programs are to run
    {"failed": "..."} | {"end": true}      the last line

A client that closes it has nothing left on the server.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
from collections.abc import AsyncIterator
from contextlib import AbstractContextManager
from typing import Annotated, Any, Protocol, TypeVar

import orjson
from fastapi import APIRouter, Request
from fastapi.responses import JSONResponse, Response, StreamingResponse
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from blendserve.batch import ApiError, error_response
from blendserve.batch.errors import cause_of, reason_of
from blendserve.runtime.cache_salt import cache_salt
from blendserve.runtime.program_job import ProgramJob

logger = logging.getLogger(__name__)

MAX_PROGRAMS = 4096
_MAX_JOBS_PER_TENANT = 64
_HEARTBEAT_SECONDS = 5.0

_Index = Annotated[int, Field(ge=0)]
_Body = TypeVar("_Body", bound=BaseModel)


class Programs(BaseModel):
    """Programs that wait at their first requests."""

    model_config = ConfigDict(extra="forbid")

    name: str = Field(default="program", max_length=200)
    limit: int | None = Field(default=None, ge=1)
    # In which they should all have ended, from now on; they go first if they may not have.
    window_seconds: float | None = Field(default=None, gt=0, allow_inf_nan=False)
    programs: list[dict[str, Any]] = Field(min_length=1, max_length=MAX_PROGRAMS)


class ProgramNews(BaseModel):
    """What became of programs of a job."""

    model_config = ConfigDict(extra="forbid")

    ended: list[_Index] = []
    failed: list[_Index] = []
    cancel: bool = False


class ProgramServer(Protocol):
    """Makes jobs of programs; see `BlendExecutor.program_job`."""

    def program_job(self, given: Programs, salt: str, stream: ProgramStream) -> ProgramJob: ...

    def shown(self, runner: ProgramJob) -> AbstractContextManager[None]: ...


class ProgramStream:
    """One job, and what its client is told of it.

    Attributes:
        salt: of the client's tenant.
    """

    def __init__(self, salt: str) -> None:
        self.salt = salt
        self._going: list[tuple[int, str | None]] = []
        self._others: list[dict[str, Any]] = []
        self._news = asyncio.Event()
        self._task: asyncio.Task[None] | None = None
        self.job: ProgramJob

    def go(self, index: int, ticket: str | None) -> None:
        self._going.append((index, ticket))
        self._news.set()

    def limit(self, limit: int) -> None:
        self._others.append({"limit": limit})
        self._news.set()

    def start(self, server: ProgramServer, given: Programs) -> asyncio.Task[None]:
        self.job = server.program_job(given, self.salt, self)
        self._task = asyncio.create_task(self._run(server))
        self._task.add_done_callback(lambda _: self._news.set())
        return self._task

    async def _run(self, server: ProgramServer) -> None:
        with server.shown(self.job):
            await self.job.run_all()

    def cancel(self) -> None:
        """The client is told at once, so that it lets no more programs go while some are ended."""
        if self._task is not None:
            self._others.append({"cancelled": True})
            self._news.set()
            self._task.cancel()

    async def events(self) -> AsyncIterator[bytes]:
        """Blocks of whole lines. Closing it cancels the job."""
        assert self._task is not None
        try:
            yield _line({"job": self.job.job_id})
            while True:
                with contextlib.suppress(asyncio.TimeoutError):
                    await asyncio.wait_for(self._news.wait(), _HEARTBEAT_SECONDS)
                self._news.clear()
                # Read before the block is taken: what comes later comes with another round.
                ended = self._task.done()
                yield self._take_block()
                if ended:
                    yield _ending(self._task)
                    return
        finally:
            # Not waited for: a client that went away has cancelled this, and would every await.
            self._task.cancel()

    def _take_block(self) -> bytes:
        going, self._going = self._going, []
        others, self._others = self._others, []
        events = [{"go": going}, *others] if going else others
        return b"".join(map(_line, events)) or b"{}\n"


def build_programs_router(server: ProgramServer) -> APIRouter:
    """The routes above. The salt of a request says whose it is."""
    router = APIRouter()
    streams: dict[str, ProgramStream] = {}

    @router.post("/blendserve/programs")
    async def run(request: Request) -> Response:
        """Plan programs, and say which may go on, for as long as they run."""
        try:
            given = await _read(request, Programs)
            salt = cache_salt.get()
            if sum(stream.salt == salt for stream in streams.values()) >= _MAX_JOBS_PER_TENANT:
                raise ApiError(
                    429,
                    f"{_MAX_JOBS_PER_TENANT} jobs of programs run already; wait for one to end.",
                    code="too_many_jobs",
                )
        except ApiError as error:
            return _error(error)
        stream = ProgramStream(salt)
        task = stream.start(server, given)
        job_id = stream.job.job_id
        streams[job_id] = stream
        task.add_done_callback(lambda _: streams.pop(job_id, None))
        return StreamingResponse(stream.events(), media_type="application/x-ndjson")

    @router.post("/blendserve/programs/{job_id}")
    async def tell(job_id: str, request: Request) -> Response:
        """Programs have ended, or the rest of them is not to run."""
        stream = streams.get(job_id)
        try:
            news = await _read(request, ProgramNews)
            if stream is None or stream.salt != cache_salt.get():
                raise ApiError(
                    404, f"No such job of programs runs: {job_id[:80]}", code="not_found"
                )
        except ApiError as error:
            return _error(error)
        stream.job.ended(news.ended, news.failed)
        if news.cancel:
            stream.cancel()
        return JSONResponse({"job": job_id})

    return router


async def _read(request: Request, kind: type[_Body]) -> _Body:
    data = await request.body()
    try:
        return kind.model_validate_json(data)
    except (ValidationError, RecursionError) as error:
        said = "nested too deeply"
        if isinstance(error, ValidationError):
            fault = error.errors(include_url=False, include_context=False, include_input=False)[0]
            said = f"{'.'.join(map(str, fault['loc'])) or 'the body'}: {fault['msg']}"
        raise ApiError(
            400, f"The body is not what is expected here. {said}", code="invalid_value"
        ) from error


def _error(error: ApiError) -> Response:
    return error_response(error.status_code, error.message, error.code or "", param=error.param)


def _ending(task: asyncio.Task[None]) -> bytes:
    if task.cancelled():
        return _line({"end": True})
    failure = task.exception()
    if failure is None:
        return _line({"end": True})
    logger.error("a job of programs failed: %s", reason_of(failure))
    return _line({"failed": cause_of(failure)})


def _line(event: dict[str, Any]) -> bytes:
    return orjson.dumps(event, option=orjson.OPT_APPEND_NEWLINE)
