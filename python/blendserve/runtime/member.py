"""One engine of several, as its coordinator sees it: a stream of news, and lines that go to it."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncGenerator, AsyncIterator, Callable, Sequence
from contextlib import aclosing, asynccontextmanager
from dataclasses import dataclass
from typing import Any

import httpx
import msgspec
from pydantic import ValidationError

from blendserve.batch import EngineAddress, engine_client
from blendserve.runtime.feedback import SchedulerReport
from blendserve.runtime.line_client import MemberLost
from blendserve.runtime.link_protocol import (
    LINK_VERSION,
    EngineDescription,
    FrameReader,
    LinkError,
    LinkHello,
    frame,
    other_version,
    unpack_prompts,
)
from blendserve.runtime.prompt_data import Prompt

_REPORTS = msgspec.msgpack.Decoder(SchedulerReport)
_CONNECT_SECONDS = 5.0
# What is to be sent within this goes with one request.
_GATHER_SECONDS = 0.005
_PROBE_SECONDS = 15.0
# SGLang itself waits 20 s for a sign of its scheduler before it says that it is not healthy.
_HEALTH_SECONDS = 25.0
_PROMPT_SECONDS = 120.0
_CONFLICT = 409


class LinkLost(Exception):
    """The engine cannot be reached, or does not speak the protocol; the message says how.

    Attributes:
        taken: another coordinator has it.
    """

    def __init__(self, message: str, *, taken: bool = False) -> None:
        super().__init__(message)
        self.taken = taken


@dataclass(frozen=True)
class Patience:
    """silent_seconds: without a word on its stream, an engine is gone. hang_seconds: without being
    healthy; 0 never."""

    silent_seconds: float = 20.0
    hang_seconds: float = 120.0


@dataclass(frozen=True)
class Answer:
    """What an engine's route answered to a line. status: 0 for none, `content` then says why."""

    status: int
    content: bytes


class Member:
    """An engine whose stream is open. Use it in one event loop, inside `linked`.

    Attributes:
        description: what it said of itself.
        reports: the latest of each of its schedulers.
        answered: lines that it has answered.
    """

    def __init__(
        self, address: EngineAddress, description: EngineDescription, patience: Patience
    ) -> None:
        self.address = address
        self.description = description
        self.reports: dict[int, SchedulerReport] = {}
        self.answered = 0
        self.on_report: Callable[[Member, SchedulerReport], None] = lambda member, report: None
        self._patience = patience
        self._tokens: dict[str, int] = {}
        self._answers: dict[str, asyncio.Future[Answer]] = {}
        self._outbox: dict[str, bytes] = {}
        self._has_mail = asyncio.Event()
        self._lost: MemberLost | None = None
        self._client = engine_client()

    @property
    def in_flight(self) -> int:
        """Lines that it has not answered."""
        return len(self._answers)

    def send(self, rid: str, url: str, salt: str, content: bytes) -> asyncio.Future[Answer]:
        """Send a line; the future has its answer, or MemberLost."""
        future: asyncio.Future[Answer] = asyncio.get_running_loop().create_future()
        if self._lost is not None:
            future.set_exception(self._lost)
            return future
        self._answers[rid] = future
        self._outbox[rid] = frame({"rid": rid, "url": url, "salt": salt}, content)
        self._has_mail.set()
        return future

    def tokens_so_far(self, rid: str) -> int:
        return self._tokens.get(rid, 0)

    async def abort(self, rids: Sequence[str]) -> None:
        """Ask the engine to end lines; their answers come as ever. Lost engines are silent."""
        for rid in rids:
            if self._outbox.pop(rid, None) is not None:
                self._resolve(rid, Answer(0, b"Aborted"))
        there = [rid for rid in rids if rid in self._answers]
        if there and self._lost is None:
            with contextlib.suppress(LinkLost):
                await self._post("abort", frame({"rids": there}))

    async def read(self, bodies: Sequence[bytes]) -> list[Prompt | None]:
        """Prompts of bodies, each a frame. Raises LinkLost."""
        try:
            answer = await self._client.post(
                f"{self.address.url}/blendserve/prompts",
                content=b"".join(bodies),
                headers=self.address.headers,
                timeout=httpx.Timeout(_PROMPT_SECONDS, connect=_CONNECT_SECONDS),
            )
            prompts = unpack_prompts(answer.raise_for_status().content)
        except (httpx.HTTPError, LinkError) as error:
            raise LinkLost(_said(error)) from error
        if len(prompts) != len(bodies):
            raise LinkLost("it read another number of prompts than it was given")
        return prompts

    async def check_health(self) -> None:
        """One whose scheduler hangs takes no lines, though it opens streams. Raises LinkLost."""
        if not await self._is_healthy():
            raise LinkLost("it is not healthy")

    async def serve(self, events: AsyncIterator[tuple[dict[str, Any], bytes]]) -> None:
        """Take what comes and send what there is, until the link breaks. Raises LinkLost."""
        tasks = [
            asyncio.create_task(self._receive(events)),
            asyncio.create_task(self._deliver()),
            asyncio.create_task(self._probe()),
        ]
        try:
            await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
        finally:
            for task in tasks:
                task.cancel()
            ends = await asyncio.gather(*tasks, return_exceptions=True)
        for end in ends:
            if isinstance(end, Exception):
                raise end

    async def lose(self, reason: str, *, died: bool) -> None:
        """What it has not answered is for others; what it may answer later is not heard."""
        self._lost = MemberLost(reason, died=died)
        self._outbox.clear()
        answers, self._answers = self._answers, {}
        for future in answers.values():
            if not future.done():
                future.set_exception(self._lost)
        await self._client.aclose()

    # -- the three tasks of `serve` --------------------------------------------------------------

    async def _receive(self, events: AsyncIterator[tuple[dict[str, Any], bytes]]) -> None:
        async for head, content in events:
            if "answer" in head:
                self._resolve(head["answer"], Answer(int(head["status"]), content))
            elif "report" in head:
                report = _REPORTS.decode(content)
                self.reports[report.dp_rank] = report
                self.on_report(self, report)
            elif "tokens" in head:
                self._tokens |= head["tokens"]
            elif "fingerprint" in head:
                raise LinkLost(
                    f"it is {head['fingerprint']} now, and was {self.description.fingerprint}"
                )
            elif "taken" in head:
                raise LinkLost("another coordinator has taken it", taken=True)
        raise LinkLost("it has ended the stream")

    async def _deliver(self) -> None:
        """One request for all lines, whose body ends with the link: a request for each block of
        them would cost more than all else."""
        await self._post("lines", self._mail())
        raise LinkLost("it takes no more lines")

    async def _mail(self) -> AsyncIterator[bytes]:
        while True:
            await self._has_mail.wait()
            await asyncio.sleep(_GATHER_SECONDS)
            self._has_mail.clear()
            outbox, self._outbox = self._outbox, {}
            if outbox:
                yield b"".join(outbox.values())

    async def _probe(self) -> None:
        """Its stream may live while its scheduler hangs."""
        loop = asyncio.get_running_loop()
        healthy_at = loop.time()
        hang = self._patience.hang_seconds
        pause = min(_PROBE_SECONDS, hang / 4 or _PROBE_SECONDS)
        while True:
            await asyncio.sleep(pause)
            if await self._is_healthy():
                healthy_at = loop.time()
            if 0 < hang < loop.time() - healthy_at:
                raise LinkLost(f"it was not healthy for {loop.time() - healthy_at:.0f} s")

    async def _is_healthy(self) -> bool:
        hang = self._patience.hang_seconds
        timeout = httpx.Timeout(
            min(_HEALTH_SECONDS, hang or _HEALTH_SECONDS), connect=_CONNECT_SECONDS
        )
        try:
            answer = await self._client.get(f"{self.address.url}/health", timeout=timeout)
        except httpx.HTTPError:
            return False
        return answer.status_code == 200

    async def _post(self, what: str, content: bytes | AsyncIterator[bytes]) -> None:
        silent = self._patience.silent_seconds
        # The answer to a body without end comes when the link has ended.
        read = silent if isinstance(content, bytes) else None
        try:
            answer = await self._client.post(
                f"{self.address.url}/blendserve/link/{self.description.session}/{what}",
                content=content,
                headers=self.address.headers,
                timeout=httpx.Timeout(connect=_CONNECT_SECONDS, read=read, write=silent, pool=None),
            )
            answer.raise_for_status()
        except httpx.HTTPError as error:
            raise LinkLost(_said(error)) from error

    def _resolve(self, rid: str, answer: Answer) -> None:
        self._tokens.pop(rid, None)
        future = self._answers.pop(rid, None)
        if future is not None and not future.done():
            self.answered += 1
            future.set_result(answer)


@asynccontextmanager
async def linked(
    address: EngineAddress, coordinator: str, patience: Patience
) -> AsyncIterator[tuple[Member, AsyncGenerator[tuple[dict[str, Any], bytes], None]]]:
    """Open an engine's stream: the member, and the frames for its `serve`. Raises LinkLost."""
    hello = LinkHello(coordinator=coordinator, link_version=LINK_VERSION).model_dump()
    timeout = httpx.Timeout(
        connect=_CONNECT_SECONDS, read=patience.silent_seconds, write=_CONNECT_SECONDS, pool=None
    )
    try:
        async with (
            engine_client() as client,
            client.stream(
                *("POST", f"{address.url}/blendserve/link"),
                json=hello,
                headers=address.headers,
                timeout=timeout,
            ) as response,
        ):
            if response.status_code != 200:
                raise LinkLost(_refusal(response.status_code, await response.aread()))
            async with aclosing(_frames(response)) as events:
                try:
                    head, _ = await anext(events)
                    description = EngineDescription.model_validate(head.get("hello"))
                except (StopAsyncIteration, ValidationError) as error:
                    raise LinkLost("it does not say what it is") from error
                if description.link_version != LINK_VERSION:
                    raise LinkLost(other_version(LINK_VERSION, description.link_version))
                yield Member(address, description, patience), events
    except (httpx.HTTPError, httpx.InvalidURL) as error:
        raise LinkLost(_said(error)) from error


async def _frames(
    response: httpx.Response,
) -> AsyncGenerator[tuple[dict[str, Any], bytes], None]:
    reader = FrameReader()
    try:
        async for block in response.aiter_raw():
            for event in reader.feed(block):
                yield event
    except (httpx.HTTPError, LinkError) as error:
        raise LinkLost(_said(error)) from error


def _said(error: Exception) -> str:
    if isinstance(error, httpx.ReadTimeout):
        return "it has not said a word for too long"
    if isinstance(error, httpx.HTTPStatusError):
        return _refusal(error.response.status_code, error.response.content)
    return f"{type(error).__name__}: {error}" if str(error) else type(error).__name__


def _refusal(status: int, content: bytes) -> str:
    if status in (401, 403):
        return "it does not take the key: give both ends the same --cluster-key-file"
    if status == 404:
        return "it is no engine for a coordinator: start it with `blendserve engine`"
    said = content.decode("utf-8", "replace")[:300]
    return said if status == _CONFLICT else f"it answered {status}: {said}"
