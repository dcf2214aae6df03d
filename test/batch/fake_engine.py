"""An engine process without a model: `python fake_engine.py [options] --port N`.

It speaks the engine's end of the link over a `FakeExecutor`. Orders in prompts beside that one's:
`die` kills this process, `hang` blocks it, each once the front has been told that it started.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import json
import os
import signal
import threading
import time
from collections.abc import AsyncIterator, Callable, Sequence
from pathlib import Path
from typing import Any

import httpx
import uvicorn
from batch_fakes import FakeExecutor, prompt_of
from fastapi import FastAPI, Request
from fastapi.middleware.cors import CORSMiddleware
from fastapi.responses import JSONResponse, StreamingResponse

from blendserve.batch import CACHE_SALT_HEADER
from blendserve.batch.engine_routes import build_engine_router
from blendserve.batch.executor import LineResult, LineSource
from blendserve.cli.server_process import follow_parent

TELL_SECONDS = 0.05


class DeadlyExecutor(FakeExecutor):
    """Obeys `die` and `hang`."""

    async def run(
        self,
        job_id: str,
        lines: LineSource,
        pending: Sequence[int],
        on_start: Callable[[int], None],
        deadline: float | None = None,
    ) -> AsyncIterator[LineResult]:
        orders = {index: prompt_of(lines.read(index)).split(" ", 1)[0] for index in pending}
        deadly = {index for index, order in orders.items() if order in ("die", "hang")}

        def start(index: int) -> None:
            on_start(index)
            if index in deadly:
                asyncio.get_running_loop().call_later(TELL_SECONDS, self._obey, orders[index])

        async for result in super().run(job_id, lines, pending, start):
            yield result
        if deadly:
            # The order is obeyed while its line is still in flight.
            await asyncio.sleep(3_600)

    def _obey(self, order: str) -> None:
        if order == "hang":
            time.sleep(3_600)
        os.kill(os.getpid(), signal.SIGKILL)


def warm_up(port: int, warm: threading.Event) -> None:
    """As SGLang does: a request to itself, which the environment's proxy is asked for."""
    while not warm.is_set():
        with contextlib.suppress(httpx.TransportError):
            httpx.get(f"http://127.0.0.1:{port}/health", timeout=5)
            warm.set()
        time.sleep(0.05)


def build_app(executor: FakeExecutor, warm: threading.Event, salts: Path | None) -> FastAPI:
    token = os.environ["BLENDSERVE_ENGINE_TOKEN"]
    app = FastAPI()
    counters = {"prefill_tokens": 0, "decode_tokens": 0, "prompt_tokens": 0, "cached_tokens": 0}

    @app.middleware("http")
    async def ask_for_the_key(request: Request, call_next: Any) -> Any:
        key = request.headers.get("authorization")
        if request.url.path != "/health" and key != f"Bearer {token}":
            return JSONResponse({"error": "no key"}, 401)
        if salts is not None and request.method == "POST":
            with salts.open("a") as log:
                log.write(f"{request.url.path} {request.headers.get(CACHE_SALT_HEADER)}\n")
        return await call_next(request)

    # As SGLang has it.
    app.add_middleware(
        CORSMiddleware,
        allow_origins=["*"],
        allow_credentials=True,
        allow_methods=["*"],
        allow_headers=["*"],
    )

    @app.get("/health")
    async def health() -> JSONResponse:
        return JSONResponse({}, 200 if warm.is_set() else 503)

    @app.get("/v1/models/{name:path}")
    async def model(name: str) -> dict[str, str]:
        return {"id": name}

    @app.post("/v1/responses")
    @app.post("/v1/chat/completions")
    async def echo(request: Request) -> dict[str, Any]:
        return {"pid": os.getpid(), "body": await request.json()}

    @app.get("/headers")
    async def headers(request: Request) -> JSONResponse:
        hop = {"Connection": "X-Hop", "X-Hop": "1", "Access-Control-Allow-Origin": "*"}
        return JSONResponse(dict(request.headers), headers=hop)

    @app.get("/slow")
    async def slow() -> dict[str, float]:
        await asyncio.sleep(0.6)
        return {"slept": 0.6}

    @app.get("/server_info")
    async def server_info() -> StreamingResponse:
        # Cut at every byte: the key must not slip through between two.
        text = json.dumps({"api_key": token, "command": f"--api-key {token}"})
        return StreamingResponse(iter(text), media_type="application/json")

    @app.post("/flush_cache")
    async def flush_cache() -> dict[str, str]:
        return {"flushed": "yes"}

    app.include_router(
        build_engine_router(
            executor,
            lambda: {"schedulers": [counters], "jobs": []},
            Path(os.environ["BLENDSERVE_BATCH_DIR"]),
        )
    )
    return app


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--port", type=int, required=True)
    parser.add_argument("--host", default="127.0.0.1")
    parser.add_argument("--delay", type=float, default=0.0)
    parser.add_argument("--parallel", type=int, default=4)
    parser.add_argument("--log", type=Path)
    parser.add_argument("--salts", type=Path)
    parser.add_argument("--fingerprint", default="fake-model/float32")
    parser.add_argument("--served-model-name", help="it has names of its own")
    parser.add_argument("--tool-call-parser")
    parser.add_argument("--warm-up", action="store_true")
    parser.add_argument("--stopped", type=Path, help="made a second after it was told to stop")
    parser.add_argument("--print", help="what its log is to hold")
    options = parser.parse_args()
    follow_parent()
    if options.print:
        print(options.print, flush=True)
    warm = threading.Event()
    if options.warm_up:
        threading.Thread(target=warm_up, args=(options.port, warm), daemon=True).start()
    else:
        warm.set()
    executor = DeadlyExecutor(
        fingerprint=options.fingerprint,
        delay_seconds=options.delay,
        parallel=options.parallel,
        log=options.log,
    )
    app = build_app(executor, warm, options.salts)
    if options.stopped is not None:
        app.router.on_shutdown += [lambda: time.sleep(1), options.stopped.touch]
    uvicorn.run(app, host=options.host, port=options.port, log_level="warning")


if __name__ == "__main__":
    main()
