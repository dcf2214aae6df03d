"""A batch service over a fake engine, behind a real HTTP server on the loopback interface."""

from __future__ import annotations

import asyncio
import contextlib
import threading
from pathlib import Path

import httpx
import uvicorn
from batch_fakes import FakeExecutor
from fastapi import FastAPI
from openai import OpenAI

from blendserve.batch import BatchLimits, BatchService, BatchStore, Webhooks, build_router


class Clock:
    """Unix seconds that tests move by hand."""

    def __init__(self) -> None:
        self.seconds = 1_700_000_000.0

    def __call__(self) -> float:
        return self.seconds


class BatchServer:
    """The service and its routes in a uvicorn thread; the SDK's client talks to it."""

    def __init__(
        self,
        batch_dir: Path,
        executor: FakeExecutor,
        limits: BatchLimits | None = None,
        clock: Clock | None = None,
        webhooks: Webhooks | None = None,
    ) -> None:
        self.executor = executor
        self.clock = clock if clock is not None else Clock()
        self.store = BatchStore(batch_dir)
        self.service = BatchService(
            self.store,
            executor,
            limits,
            clock=self.clock,
            retry_seconds=0.05,
            webhooks=webhooks,
        )
        app = FastAPI()
        app.include_router(build_router(self.service))
        self._server = uvicorn.Server(
            uvicorn.Config(app, host="127.0.0.1", port=0, log_level="warning", lifespan="off")
        )
        self.simulated_death: tuple[type[BaseException], ...] = ()
        """Exceptions that a test throws into the service in place of a kill."""
        self._up = threading.Event()
        self._thread = threading.Thread(target=lambda: asyncio.run(self._serve()))

    def __enter__(self) -> BatchServer:
        self._thread.start()
        assert self._up.wait(20)
        port = self._server.servers[0].sockets[0].getsockname()[1]
        self.url = f"http://127.0.0.1:{port}"
        self.client = OpenAI(base_url=f"{self.url}/v1", api_key="none", max_retries=0)
        self.http = httpx.Client(base_url=self.url)
        return self

    def __exit__(self, *_: object) -> None:
        self.client.close()
        self.http.close()
        self._server.should_exit = True
        self._thread.join(20)
        assert not self._thread.is_alive()
        self.store.close()

    async def _serve(self) -> None:
        await self.service.start()
        serving = asyncio.create_task(self._server.serve())
        while not self._server.started:
            await asyncio.sleep(0.01)
        self._up.set()
        await serving
        with contextlib.suppress(*self.simulated_death):
            await self.service.stop()
