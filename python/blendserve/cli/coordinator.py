"""The coordinator: to the front process it is the engine; it holds plans, and engines do the work.

It has no model and needs no SGLang. Started by the front in an engine's place.
"""

from __future__ import annotations

import argparse
import asyncio
import hmac
import os
import sys
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from pathlib import Path

import uvicorn
from fastapi import FastAPI, Response
from starlette.datastructures import Headers
from starlette.types import ASGIApp, Receive, Scope, Send

from blendserve.batch import EngineAddress, build_engine_router, error_response
from blendserve.cli.cluster_flags import engine_urls, read_key
from blendserve.cli.cluster_proxy import ClusterProxy
from blendserve.cli.server_process import TOKEN_VARIABLE, follow_parent
from blendserve.config import ConfigError, load_settings
from blendserve.runtime.cache_salt import SaltReader
from blendserve.runtime.cluster_executor import ClusterExecutor


def build_app(
    executor: ClusterExecutor, token: str, batch_dir: Path, ready: asyncio.Event
) -> FastAPI:
    """What the front process talks to.

    Args:
        token: the key that it asks for.
        ready: set once enough engines have joined.
    """
    proxy = ClusterProxy(executor.cluster)

    @asynccontextmanager
    async def life(_: FastAPI) -> AsyncIterator[None]:
        yield
        await proxy.close()
        await executor.stop()

    app = FastAPI(lifespan=life, openapi_url=None)

    @app.get("/health")
    async def health() -> Response:
        # Jobs wait for engines that are away; only before the first has come is nothing served.
        return Response(status_code=200 if ready.is_set() else 503)

    app.include_router(build_engine_router(executor, executor.view, batch_dir))
    app.mount("/", proxy)
    app.add_middleware(SaltReader)
    app.add_middleware(_AskForKey, token=token)
    return app


class _AskForKey:
    """ASGI middleware: nothing but its health is told without the key."""

    def __init__(self, app: ASGIApp, token: str) -> None:
        self._app = app
        self._expected = f"Bearer {token}".encode()

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "http" and scope["path"] != "/health":
            given = Headers(scope=scope).get("authorization", "").encode("utf-8", "replace")
            if not hmac.compare_digest(given, self._expected):
                refusal = error_response(401, "This port is the front's alone.", "invalid_api_key")
                await refusal(scope, receive, send)
                return
        await self._app(scope, receive, send)


def main(argv: Sequence[str]) -> int:
    """Coordinate until stopped. 2 for a setting that cannot be used."""
    parser = argparse.ArgumentParser(prog="blendserve.cli.coordinator")
    parser.add_argument("--host", default="127.0.0.1")
    parser.add_argument("--port", type=int, required=True)
    parser.add_argument("--engine-urls", required=True)
    parser.add_argument("--min-engines", type=int, default=1)
    options = parser.parse_args(argv)
    token = os.environ.pop(TOKEN_VARIABLE)
    follow_parent()
    try:
        settings = load_settings()
        key = read_key(settings.cluster_key_file)
        addresses = [EngineAddress(url, key) for url in engine_urls(options.engine_urls)]
    except ConfigError as error:
        print(f"blendserve serve: {error}", file=sys.stderr)
        return 2

    async def serve() -> None:
        executor = ClusterExecutor(settings, len(addresses))
        ready = asyncio.Event()
        for address in addresses:
            executor.cluster.add(address)

        async def become_ready() -> None:
            await executor.until_ready(min(options.min_engines, len(addresses)))
            ready.set()

        waiting = asyncio.create_task(become_ready())
        app = build_app(executor, token, settings.batch_dir, ready)
        config = uvicorn.Config(
            app,
            host=options.host,
            port=options.port,
            log_level="warning",
            access_log=False,
            ws="none",
        )
        await uvicorn.Server(config).serve()
        waiting.cancel()

    asyncio.run(serve())
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
