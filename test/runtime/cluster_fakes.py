"""Engines without a model, behind wires that can be cut, all in one event loop.

The engines' end of the link is the real one. A line's body says everything: `prompt` is its token
ids, and it is answered after `max_tokens` ticks of its engine, which runs `slots` lines at a time.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import socket
from collections import Counter, deque
from collections.abc import AsyncIterator, Sequence
from contextlib import AsyncExitStack, aclosing, asynccontextmanager
from dataclasses import asdict
from typing import Any

import uvicorn
from fastapi import FastAPI, Request
from fastapi.responses import JSONResponse
from job_server import FakeLines, FakeReader

from blendserve.batch import EngineAddress
from blendserve.batch.executor import LineResult
from blendserve.config import Settings
from blendserve.planner import Side, hardware
from blendserve.runtime.cluster_executor import ClusterExecutor
from blendserve.runtime.engine_link import EngineLink
from blendserve.runtime.feedback import SchedulerReport
from blendserve.runtime.link_protocol import LINK_VERSION, EngineDescription
from blendserve.runtime.pacing import Pacer
from blendserve.runtime.plan_tag import PlanTag

KEY = "0123456789abcdef-key"
TICK_SECONDS = 0.002
MODEL = {
    "model_type": "llama",
    "architectures": ["LlamaForCausalLM"],
    "hidden_size": 64,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "intermediate_size": 128,
    "vocab_size": 49_152,
    "max_position_embeddings": 2_048,
    "torch_dtype": "float32",
}
# For jobs that take a second or two.
MOST_SECONDS = 60.0


class FakeEngine:
    """An engine behind a port.

    Attributes:
        heard: prompts of the lines that came, in order, by their first token.
        aborted: ids of lines that were aborted.
        prompts_read: how many prompts it has read.
        deadly: it dies (its wire is cut) when a line with such a last token begins.
    """

    def __init__(
        self,
        *,
        slots: int = 8,
        tick_seconds: float = TICK_SECONDS,
        fingerprint: str = "fake@1",
        link_version: int = LINK_VERSION,
        key: str = KEY,
    ) -> None:
        self.slots = slots
        self.tick_seconds = tick_seconds
        self.fingerprint = fingerprint
        self.link_version = link_version
        self.heard: list[list[int]] = []
        self.answered = 0
        self.aborted: list[str] = []
        self.prompts_read = 0
        self.healthy = True
        self.deadly: set[int] = set()
        self.on_death = lambda: None
        self._report = SchedulerReport()
        self._queues: dict[Side, deque[tuple[str, int, asyncio.Future[int]]]] = {
            side: deque() for side in Side
        }
        self._running: dict[str, list[Any]] = {}
        self._gone: set[str] = set()
        self._taken: Counter[Side] = Counter()
        self.app = self._build_app(key)
        self.link = EngineLink(
            app=self.app,
            api_key=key,
            abort=self._abort,
            tokens_so_far=lambda rid: self._running[rid][1] if rid in self._running else 0,
            reader=self,
            describe=self._describe,
            fingerprint=lambda: self.fingerprint,
            reports={0: self._report},
            pacer=Pacer(lambda: False),
        )
        self.app.include_router(self.link.router())
        self._reader = FakeReader()

    def read(self, url: str, body: Any) -> Any:
        self.prompts_read += 1
        return self._reader.read(url, body)

    def _describe(self, session: str) -> EngineDescription:
        return EngineDescription(
            session=session,
            link_version=self.link_version,
            release="0",
            endpoints=["/v1/completions"],
            models=["fake"],
            served_model="fake",
            fingerprint=self.fingerprint,
            model_config_json=MODEL,
            hardware=asdict(hardware("cpu")),
            tensor_ranks=1,
            dp_size=1,
            kv_tokens=4_096,
            shares_reads=False,
        )

    def _build_app(self, key: str) -> FastAPI:
        app = FastAPI()

        @app.get("/v1/models")
        async def models() -> dict[str, Any]:
            return {"data": [{"id": "fake"}]}

        app.add_middleware(_Quick, engine=self, key=key)
        return app

    async def complete(self, body: dict[str, Any]) -> JSONResponse:
        prompt, tag = body["prompt"], PlanTag.from_params(body.get("custom_params"))
        if body.get("unreadable"):
            return JSONResponse({"error": {"message": "no"}}, 400)
        self.heard.append(prompt)
        if prompt[-1] in self.deadly:
            self.on_death()
        future: asyncio.Future[int] = asyncio.get_running_loop().create_future()
        side = tag.side if tag is not None else Side.RIGHT
        self._queues[side].append((body["rid"], body["max_tokens"], future))
        tokens = await future
        if tokens < 0:
            return JSONResponse({"error": {"message": "aborted"}}, 499)
        self.answered += 1
        usage = {"prompt_tokens": len(prompt), "completion_tokens": tokens}
        return JSONResponse({"choices": [{"text": f"{prompt[-1]}"}], "usage": usage})

    def _abort(self, rid: str) -> None:
        self.aborted.append(rid)
        if rid in self._running:
            future = self._running.pop(rid)[2]
            if not future.done():
                future.set_result(-1)
        self._gone.add(rid)

    async def run(self) -> None:
        """The scheduler: a step a tick."""
        while True:
            await asyncio.sleep(self.tick_seconds)
            self._step()

    def _step(self) -> None:
        taken = self._taken.total()
        for side, queue in self._queues.items():
            while queue and len(self._running) < self.slots:
                rid, tokens, future = queue.popleft()
                self._taken[side] += 1
                if rid in self._gone:
                    future.set_result(-1)
                    continue
                self._running[rid] = [tokens, 0, future]
        for rid, entry in list(self._running.items()):
            entry[1] += 1
            if entry[1] >= entry[0]:
                del self._running[rid]
                entry[2].set_result(entry[0])
        if taken != self._taken.total():
            report = SchedulerReport(
                taken={side.value: self._taken[side] for side in Side},
                queued={side.value: len(self._queues[side]) for side in Side},
            )
            self.link.reports[0] = report
            self.link.on_report(report)


class _Quick:
    """Asks for the key, and answers lines without the cost of FastAPI's routes."""

    def __init__(self, app: Any, engine: FakeEngine, key: str) -> None:
        self._app, self._engine, self._key = app, engine, key

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        app = self._app
        if scope["type"] == "http":
            given = dict(scope["headers"]).get(b"authorization", b"").decode()
            if scope["path"] == "/health":
                app = JSONResponse({}, 200 if self._engine.healthy else 503)
            elif given != f"Bearer {self._key}":
                app = JSONResponse({"error": "no key"}, 401)
            elif scope["path"] == "/v1/completions":
                app = await self._engine.complete(await Request(scope, receive).json())
        await app(scope, receive, send)


class Wire:
    """A port in front of an engine's: what goes through it can be cut, or held."""

    def __init__(self, port: int) -> None:
        self._to = port
        self._open = asyncio.Event()
        self._open.set()
        self._writers: set[asyncio.StreamWriter] = set()
        self._server: asyncio.Server | None = None
        self.url = ""

    async def start(self) -> None:
        self._server = await asyncio.start_server(self._connect, "127.0.0.1", 0)
        self.url = f"http://127.0.0.1:{self._server.sockets[0].getsockname()[1]}"
        self._refusing = False

    def cut(self) -> None:
        """As the engine's process killed: connections break, and new ones are refused."""
        self._refusing = True
        for writer in self._writers:
            writer.transport.abort()

    def hold(self) -> None:
        """As a stopped process, or a black hole: nothing comes through, and nothing breaks."""
        self._open.clear()

    def mend(self) -> None:
        self._refusing = False
        self._open.set()

    async def close(self) -> None:
        self.cut()
        assert self._server is not None
        self._server.close()

    async def _connect(self, reader: Any, writer: asyncio.StreamWriter) -> None:
        if self._refusing:
            writer.transport.abort()
            return
        self._writers.add(writer)
        there_reader, there = await asyncio.open_connection("127.0.0.1", self._to)
        self._writers.add(there)
        with contextlib.suppress(ConnectionError):
            await asyncio.gather(self._pass(reader, there), self._pass(there_reader, writer))
        for end in (writer, there):
            self._writers.discard(end)
            end.transport.abort()

    async def _pass(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        while block := await reader.read(1 << 16):
            await self._open.wait()
            writer.write(block)
            await writer.drain()
        raise ConnectionError


@asynccontextmanager
async def serving(engine: FakeEngine) -> AsyncIterator[Wire]:
    """The engine on a port, behind a wire."""
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        listener.listen(64)
        server = uvicorn.Server(
            uvicorn.Config(engine.app, log_level="critical", timeout_graceful_shutdown=0)
        )
        server.install_signal_handlers = lambda: None  # type: ignore[attr-defined]
        serve = asyncio.create_task(server._serve(sockets=[listener]))
        steps = asyncio.create_task(engine.run())
        wire = Wire(listener.getsockname()[1])
        await wire.start()
        engine.on_death = wire.cut
        try:
            yield wire
        finally:
            await wire.close()
            server.should_exit = True
            steps.cancel()
            await asyncio.wait([serve], timeout=10)


class FakeCluster:
    """A coordinator's executor over fake engines."""

    def __init__(self, engines: Sequence[FakeEngine], **settings: Any) -> None:
        self.engines = list(engines)
        self.wires: list[Wire] = []
        self._settings = Settings(
            **{"engine_silent_seconds": 2.0, "engine_hang_seconds": 2.0, **settings}
        )
        self._stack = AsyncExitStack()
        self.started: Counter[int] = Counter()

    async def __aenter__(self) -> FakeCluster:
        self.executor = ClusterExecutor(self._settings, len(self.engines))
        for engine in self.engines:
            await self.join(engine)
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.executor.stop()
        await self._stack.aclose()

    async def join(self, engine: FakeEngine) -> Wire:
        """One more engine, which is up when this returns, or refused."""
        wire = await self._stack.enter_async_context(serving(engine))
        self.wires.append(wire)
        self.executor.cluster.add(EngineAddress(wire.url, KEY))
        await self.until(lambda: self.view(wire)["state"] != "connecting")
        return wire

    def view(self, wire: Wire) -> dict[str, Any]:
        [view] = [view for view in self.executor.view()["engines"] if view["url"] == wire.url]
        return view

    async def until(self, condition: Any) -> None:
        async with asyncio.timeout(MOST_SECONDS):
            while not condition():
                await asyncio.sleep(0.01)

    async def run(
        self, bodies: Sequence[dict[str, Any]], job: str = "batch-1", pending: Any = None
    ) -> AsyncIterator[LineResult]:
        """The answers as they come."""
        pending = range(len(bodies)) if pending is None else pending

        def on_start(index: int) -> None:
            self.started[index] += 1

        results = self.executor.run(job, FakeLines(bodies), pending, on_start)
        async with aclosing(results):  # type: ignore[type-var]
            async for result in results:
                yield result

    async def answers(self, bodies: Sequence[dict[str, Any]]) -> list[LineResult]:
        async with asyncio.timeout(MOST_SECONDS):
            return [result async for result in self.run(bodies)]


def text(result: LineResult) -> str:
    return json.loads(json.dumps(result.body))["choices"][0]["text"]
