"""A server of frontend programs over loopback: our routes, jobs and tickets, and an engine that
only counts."""

from __future__ import annotations

import asyncio
import threading
import time
from collections import Counter
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager, contextmanager
from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import Any

import numpy as np
import uvicorn
from fastapi import FastAPI, Request
from fastapi.responses import JSONResponse
from job_server import COST_MODEL, THREADS

from blendserve.batch import CACHE_SALT_HEADER
from blendserve.planner import PlannerConfig, Side
from blendserve.runtime.cache_salt import SaltReader
from blendserve.runtime.credits import Credits
from blendserve.runtime.dispatcher import Dispatcher
from blendserve.runtime.feedback import SchedulerReport
from blendserve.runtime.pacing import Pacer
from blendserve.runtime.plan_tag import PlanTag
from blendserve.runtime.plan_worker import PlanWorker
from blendserve.runtime.program_client import ProgramClient
from blendserve.runtime.program_job import ProgramJob, ProgramView
from blendserve.runtime.program_routes import Programs, ProgramStream, build_programs_router
from blendserve.runtime.prompts import Prompt, UnreadablePrompt
from blendserve.runtime.tickets import Tickets, ticketed

__all__ = ["CACHE_SALT_HEADER", "ProgramServer", "serving"]

_STEP_SECONDS = 0.002


class _Words:
    """Tokens are words."""

    def __init__(self) -> None:
        self._ids: dict[str, int] = {}

    def read(self, url: str, body: dict[str, Any]) -> Prompt:
        if body.get("unplanned"):
            raise UnreadablePrompt("not to be planned")
        ids = [self._ids.setdefault(word, len(self._ids)) for word in body["text"].split()]
        params = body["sampling_params"]
        return Prompt(
            np.array(ids, dtype=np.int32), params["max_new_tokens"], params["ignore_eos"], 1
        )


@dataclass
class Asked:
    """A request as the engine got it."""

    text: str
    tag: PlanTag | None
    custom: dict[str, Any] | None
    rid: str | None


@dataclass
class ProgramServer:
    """See above. `answer` makes the text of an answer; it runs on the server's loop.

    Attributes:
        asked: all requests, in the order in which they came.
        most_at_once: requests that were with the engine at the same time.
        frozen: while it is set, nothing is answered.
        unavailable: so many requests to a path are answered 503, as while the engine restarts.
    """

    url: str = ""
    asked: list[Asked] = field(default_factory=list)
    aborted: list[str] = field(default_factory=list)
    at_once: int = 0
    most_at_once: int = 0
    frozen: bool = False
    jobs: dict[str, ProgramJob] = field(default_factory=dict)
    tickets: Tickets = field(default_factory=Tickets)
    seen_jobs: int = 0
    windows: list[float | None] = field(default_factory=list)
    unavailable: dict[str, int] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.credits = Credits()
        self.dispatcher = Dispatcher(self.credits, Pacer(lambda: False))
        self.planner = PlanWorker(COST_MODEL, PlannerConfig())
        self.words = _Words()
        self.generate = ticketed(self._generate, self.tickets)
        self._taken: Counter[str] = Counter()
        self._app: FastAPI | None = None

    # -- what the routes ask for

    def program_job(self, given: Programs, salt: str, stream: ProgramStream) -> ProgramJob:
        self.seen_jobs += 1
        self.windows.append(given.window_seconds)
        view = ProgramView(
            f"programs_{self.seen_jobs}",
            deadline=given.window_seconds and time.time() + given.window_seconds,
            name=given.name,
            programs=len(given.programs),
            running_limit=given.limit,
            owner=salt,
        )
        client = ProgramClient(
            salt,
            stream.go,
            tickets=self.tickets,
            dispatcher=self.dispatcher,
            abort=self.aborted.append,
            tokens_so_far=lambda rid: 0,
        )
        return ProgramJob(
            view,
            given.programs,
            client,
            stream.limit,
            reader=self.words,  # type: ignore[arg-type]
            planner=self.planner,
            threads=THREADS,
            dispatcher=self.dispatcher,
        )

    @contextmanager
    def shown(self, job: ProgramJob) -> Iterator[None]:
        self.jobs[job.job_id] = job
        try:
            yield
        finally:
            del self.jobs[job.job_id]

    # -- its engine

    async def _generate(self, obj: Any) -> AsyncIterator[Any]:
        params = obj.sampling_params
        custom = params.get("custom_params")
        tag = PlanTag.from_params(custom)
        self.asked.append(Asked(obj.text, tag, custom, obj.rid))
        self.at_once += 1
        self.most_at_once = max(self.most_at_once, self.at_once)
        try:
            if tag is not None:
                self._taken[tag.side.value] += 1
                taken = {side.value: self._taken[side.value] for side in Side}
                nothing = {side.value: 0 for side in Side}
                self.credits.on_report(SchedulerReport(taken=taken, queued=nothing))
                self.dispatcher.wake()
            await asyncio.sleep(_STEP_SECONDS)
            while self.frozen and obj.rid not in self.aborted:
                await asyncio.sleep(_STEP_SECONDS)
        finally:
            self.at_once -= 1
        reason = {"type": "abort"} if obj.rid in self.aborted else {"type": "length"}
        texts = obj.text if isinstance(obj.text, list) else [obj.text]
        outputs = [
            {
                "text": f" said-{len(text.split())}",
                "meta_info": {
                    "prompt_tokens": len(text.split()),
                    "completion_tokens": 1,
                    "cached_tokens": 0,
                    "finish_reason": reason,
                },
            }
            for text in texts
        ]
        yield outputs if isinstance(obj.text, list) else outputs[0]

    def app(self) -> FastAPI:
        app = FastAPI()
        app.add_middleware(SaltReader)

        @app.middleware("http")
        async def restarting(request: Request, call_next: Any) -> Any:
            path = request.url.path
            if self.unavailable.get(path, 0) > 0:
                self.unavailable[path] -= 1
                error = {"message": "restarting", "code": "engine_unavailable"}
                return JSONResponse({"error": error}, 503)
            return await call_next(request)

        app.include_router(build_programs_router(self))

        @app.get("/get_model_info")
        async def model_info() -> dict[str, str]:
            return {"model_path": "a-model"}

        @app.post("/generate")
        async def generate(request: Request) -> Any:
            body = await request.json()
            obj = SimpleNamespace(
                text=body["text"], sampling_params=body["sampling_params"], rid=None
            )
            try:
                async for output in self.generate(obj):
                    return JSONResponse(output)
            except ValueError as error:
                return JSONResponse({"error": {"message": str(error)}}, 400)

        return app

    @property
    def is_clean(self) -> bool:
        """Nothing of any program is left."""
        return not (self.jobs or len(self.tickets) or self.at_once or self.planner._jobs)

    def wait_until_clean(self, seconds: float = 10.0) -> bool:
        deadline = time.monotonic() + seconds
        while not self.is_clean and time.monotonic() < deadline:
            time.sleep(0.01)
        return self.is_clean


@contextmanager
def serving() -> Iterator[ProgramServer]:
    """The server, in a thread of its own."""
    server = ProgramServer()
    started = threading.Event()

    @asynccontextmanager
    async def life(_: Any) -> AsyncIterator[None]:
        yield

    app = server.app()
    app.router.lifespan_context = life
    config = uvicorn.Config(app, host="127.0.0.1", port=0, log_level="error", lifespan="off")
    runner = uvicorn.Server(config)

    def run() -> None:
        asyncio.run(_serve(runner, started))

    thread = threading.Thread(target=run, daemon=True)
    thread.start()
    assert started.wait(20)
    port = runner.servers[0].sockets[0].getsockname()[1]
    server.url = f"http://127.0.0.1:{port}"
    try:
        yield server
    finally:
        runner.should_exit = runner.force_exit = True
        thread.join(20)


async def _serve(runner: uvicorn.Server, started: threading.Event) -> None:
    task = asyncio.create_task(runner.serve())
    while not runner.started and not task.done():
        await asyncio.sleep(0.01)
    started.set()
    await task
