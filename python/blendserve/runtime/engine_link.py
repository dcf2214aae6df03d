"""An engine's end of the link to a coordinator: reads prompts, runs lines, reports.

One coordinator has the engine at a time, for as long as its stream lives; when that ends, what it
had sent is aborted. The routes believe what they are told of plans and tenants, as nobody but the
coordinator has the engine's key.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import logging
import secrets
from collections.abc import AsyncIterator, Callable, Iterable
from dataclasses import replace
from functools import partial
from typing import Any

import httpx
import msgspec
from fastapi import APIRouter, HTTPException, Request, Response
from fastapi.responses import StreamingResponse
from starlette.requests import ClientDisconnect

from blendserve.batch import CACHE_SALT_HEADER
from blendserve.batch.endpoints import ENDPOINTS
from blendserve.runtime.feedback import SchedulerReport
from blendserve.runtime.job_prompts import LineReader
from blendserve.runtime.link_protocol import (
    HEARTBEAT_SECONDS,
    LINK_VERSION,
    EngineDescription,
    FrameReader,
    LinkError,
    LinkHello,
    frame,
    frames,
    other_version,
    pack_prompts,
)
from blendserve.runtime.pacing import Pacer, is_batch_line
from blendserve.runtime.prompt_data import Prompt

logger = logging.getLogger(__name__)

# What comes within this goes with one write.
_GATHER_SECONDS = 0.002
_ABORT_INTERVAL_SECONDS = 0.05
_MAX_ABORT_SECONDS = 60.0


class EngineLink:
    """Everything a coordinator may ask of the engine that it lives in.

    Args:
        app: the engine's HTTP application, whose own routes run the lines.
        api_key: that the application asks for, if any.
        abort: ends a request by its id; unknown ids are ignored.
        tokens_so_far: output tokens of a request by its id, 0 if it is not known.
        reader: reads prompts, in a worker thread.
        describe: the engine, for a stream of this name.
        fingerprint: as it is now; it changes with the weights.
        reports: the latest report of each data-parallel scheduler.
        pacer: gives each line its turn on the event loop.
    """

    def __init__(
        self,
        app: object,
        api_key: str | None,
        abort: Callable[[str], None],
        tokens_so_far: Callable[[str], int],
        reader: LineReader,
        describe: Callable[[str], EngineDescription],
        fingerprint: Callable[[], str],
        reports: dict[int, SchedulerReport],
        pacer: Pacer,
    ) -> None:
        self._http = httpx.AsyncClient(
            transport=httpx.ASGITransport(app=app, raise_app_exceptions=False),  # type: ignore[arg-type]
            base_url="http://engine",
            headers={"Authorization": f"Bearer {api_key}"} if api_key else {},
        )
        self.abort = abort
        self.tokens_so_far = tokens_so_far
        self.describe = describe
        self.fingerprint = fingerprint
        self.reports = reports
        self.pacer = pacer
        self._reader = reader
        self._session: _Session | None = None
        self._opening = asyncio.Lock()

    @property
    def in_flight(self) -> int:
        """Lines of the coordinator that run."""
        return self._session.in_flight if self._session is not None else 0

    def on_report(self, report: SchedulerReport) -> None:
        """A scheduler has reported."""
        if self._session is not None:
            self._session.report(report)

    def router(self) -> APIRouter:
        router = APIRouter(prefix="/blendserve")

        @router.post("/link")
        async def link(hello: LinkHello) -> StreamingResponse:
            if hello.link_version != LINK_VERSION:
                raise HTTPException(409, other_version(hello.link_version, LINK_VERSION))
            async with self._opening:
                if self._session is not None:
                    await self._session.close(taken=True)
                session = self._session = _Session(self)
            logger.info("BlendServe: coordinator %s has this engine", hello.coordinator)
            return StreamingResponse(session.stream(), media_type="application/octet-stream")

        @router.post("/link/{session}/lines")
        async def lines(session: str, request: Request) -> Response:
            # A body that ends with the link: lines are run as they come.
            current, reader = self._current(session), FrameReader()
            with contextlib.suppress(ClientDisconnect):
                async for block in request.stream():
                    try:
                        current.run(_checked_lines(reader.feed(block)))
                    except LinkError as error:
                        raise HTTPException(400, str(error)) from error
            return Response(status_code=204)

        @router.post("/link/{session}/abort")
        async def abort(session: str, request: Request) -> Response:
            [(head, _)] = _read(await request.body())
            self._current(session).abort(head.get("rids", ()))
            return Response(status_code=204)

        @router.post("/prompts")
        async def prompts(request: Request) -> Response:
            bodies = _read(await request.body())
            found = await asyncio.to_thread(self._prompts, bodies)
            return Response(pack_prompts(found), media_type="application/octet-stream")

        return router

    async def call(self, url: str, salt: str, content: bytes) -> httpx.Response:
        """Run a line through the application's own route, in process."""
        headers = {"Content-Type": "application/json"}
        if salt:
            headers[CACHE_SALT_HEADER] = salt
        request = self._http.build_request("POST", url, content=content, headers=headers)
        return await self._http.send(request)

    def _current(self, name: str) -> _Session:
        session = self._session
        if session is None or session.name != name or session.closed:
            raise HTTPException(409, "This stream has ended; open another one.")
        return session

    def _prompts(self, bodies: list[tuple[dict[str, object], bytes]]) -> list[Prompt | None]:
        return [self._prompt(str(head.get("url")), content) for head, content in bodies]

    def _prompt(self, url: str, content: bytes) -> Prompt | None:
        try:
            return self._reader.read(url, json.loads(content))
        except Exception:
            # Whatever is wrong with it shows when the line is sent.
            return None


class _Session:
    """One coordinator's stream, and the lines that it has sent."""

    def __init__(self, link: EngineLink) -> None:
        self.name = secrets.token_hex(16)
        self.closed = False
        self._link = link
        self._unsent: list[bytes] = []
        self._reports: dict[int, SchedulerReport] = {}
        # Counters go back to the scheduler's start; a coordinator knows of none before its own.
        self._before = dict(link.reports)
        self._news = asyncio.Event()
        self._lines: dict[str, asyncio.Task[None]] = {}
        self._waiting: asyncio.Queue[tuple[str, str, str, bytes]] = asyncio.Queue()
        self._starting = asyncio.create_task(self._start_lines())

    @property
    def in_flight(self) -> int:
        return len(self._lines)

    def report(self, report: SchedulerReport) -> None:
        before = self._before.setdefault(report.dp_rank, SchedulerReport(report.dp_rank))
        taken = {side: count - before.taken[side] for side, count in report.taken.items()}
        self._reports[report.dp_rank] = replace(report, taken=taken)
        self._news.set()

    def run(self, lines: list[tuple[str, str, str, bytes]]) -> None:
        for line in lines:
            self._waiting.put_nowait(line)

    def abort(self, rids: object) -> None:
        for rid in rids if isinstance(rids, list) else ():
            if rid in self._lines:
                self._link.abort(rid)

    async def _start_lines(self) -> None:
        while True:
            rid, url, salt, content = await self._waiting.get()
            task = asyncio.create_task(self._answer(rid, url, salt, content))
            self._lines[rid] = task
            task.add_done_callback(partial(self._ended, rid))
            await self._link.pacer.turn()

    def _ended(self, rid: str, _: asyncio.Task[None]) -> None:
        self._lines.pop(rid, None)

    async def _answer(self, rid: str, url: str, salt: str, content: bytes) -> None:
        is_batch_line.set(True)
        try:
            response = await self._link.call(url, salt, content)
            head, answer = {"answer": rid, "status": response.status_code}, response.content
        except Exception as error:
            # What the application lets through; the coordinator makes it that line's error.
            head, answer = {"answer": rid, "status": 0}, type(error).__name__.encode()
        self._unsent.append(frame(head, answer))
        self._news.set()

    async def stream(self) -> AsyncIterator[bytes]:
        """Frames, in blocks, until either end closes it."""
        described = self._link.describe(self.name)
        told_tokens: dict[str, int] = {}
        tokens_at = 0.0
        loop = asyncio.get_running_loop()
        try:
            for report in self._link.reports.values():
                self.report(report)
            yield frame({"hello": described.model_dump()})
            while not self.closed:
                with contextlib.suppress(asyncio.TimeoutError):
                    await asyncio.wait_for(self._news.wait(), HEARTBEAT_SECONDS)
                    await asyncio.sleep(_GATHER_SECONDS)
                self._news.clear()
                block = self._take_block()
                if loop.time() - tokens_at >= HEARTBEAT_SECONDS:
                    tokens_at = loop.time()
                    told_tokens = self._new_tokens(told_tokens, block)
                    if (now := self._link.fingerprint()) != described.fingerprint:
                        block.append(frame({"fingerprint": now}))
                yield b"".join(block) or frame({})
            yield frame({"taken": True})
        finally:
            # A client that went away has cancelled this, and would every await.
            self._end = asyncio.create_task(self.close())

    def _take_block(self) -> list[bytes]:
        block, self._unsent = self._unsent, []
        reports, self._reports = self._reports, {}
        block += [
            frame({"report": rank}, msgspec.msgpack.encode(report))
            for rank, report in reports.items()
        ]
        return block

    def _new_tokens(self, told: dict[str, int], block: list[bytes]) -> dict[str, int]:
        now = {rid: count for rid in self._lines if (count := self._link.tokens_so_far(rid))}
        if news := {rid: count for rid, count in now.items() if told.get(rid) != count}:
            block.append(frame({"tokens": news}))
        return now

    async def close(self, taken: bool = False) -> None:
        """End what the coordinator had sent, and wait until the engine has let go of it."""
        if self.closed:
            return
        self.closed = True
        self._news.set()
        self._starting.cancel()
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(_MAX_ABORT_SECONDS):
                while self._lines:
                    for rid in list(self._lines):
                        # Asked again until it ends: it is not known before it is tokenised.
                        self._link.abort(rid)
                    await asyncio.wait(self._lines.values(), timeout=_ABORT_INTERVAL_SECONDS)
        if taken:
            logger.warning("BlendServe: another coordinator takes this engine over")


def _read(data: bytes) -> list[tuple[dict[str, object], bytes]]:
    try:
        return frames(data)
    except LinkError as error:
        raise HTTPException(400, str(error)) from error


def _checked_lines(
    frames: Iterable[tuple[dict[str, Any], bytes]],
) -> list[tuple[str, str, str, bytes]]:
    found = []
    for head, content in frames:
        rid, url, salt = head.get("rid"), head.get("url"), head.get("salt", "")
        if not isinstance(rid, str) or not isinstance(salt, str) or url not in ENDPOINTS:
            raise HTTPException(400, "A line needs a rid, the url of an endpoint, and a salt.")
        found.append((rid, str(url), salt, content))
    return found
