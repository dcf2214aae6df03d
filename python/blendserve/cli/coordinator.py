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
from blendserve.cli.cluster_flags import engine_urls, partition_flags, read_key
from blendserve.cli.cluster_proxy import ClusterProxy
from blendserve.cli.server_process import TOKEN_VARIABLE, follow_parent
from blendserve.config import ConfigError, Settings, load_settings, to_environment
from blendserve.runtime.cache_salt import SaltReader
from blendserve.runtime.cluster_executor import ClusterExecutor
from blendserve.runtime.cluster_metrics import CONTENT_TYPE, ClusterMetrics


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

    series: list[ClusterMetrics] = []

    @app.get("/metrics")
    async def metrics() -> Response:
        try:
            if not series:
                series.append(ClusterMetrics(executor.cluster, executor.jobs, executor.dispatch))
        except ImportError:
            message = "Metrics need prometheus-client on the coordinator's machine: install it."
            return error_response(501, message, "no_metrics", kind="server_error")
        return Response(series[0].text(), media_type=CONTENT_TYPE)

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
    options = _parse(argv)
    token = os.environ.pop(TOKEN_VARIABLE)
    follow_parent()
    try:
        asyncio.run(_coordinate(options, token, load_settings()))
    except ConfigError as error:
        print(f"blendserve serve: {error}", file=sys.stderr)
        return 2
    return 0


def _parse(argv: Sequence[str]) -> argparse.Namespace:
    own, engine_flags = partition_flags(argv)
    parser = argparse.ArgumentParser(prog="blendserve.cli.coordinator")
    parser.add_argument("--host", default="127.0.0.1")
    parser.add_argument("--port", type=int, required=True)
    where = parser.add_mutually_exclusive_group(required=True)
    where.add_argument("--engine-urls")
    where.add_argument("--ray", action="store_true")
    parser.add_argument("--engines", type=int)
    parser.add_argument("--min-engines", type=int, default=1)
    options = parser.parse_args(own)
    options.engine_flags = engine_flags
    return options


async def _coordinate(options: argparse.Namespace, token: str, settings: Settings) -> None:
    """Raises ConfigError."""
    ready = asyncio.Event()
    tasks: list[asyncio.Task[None]] = []
    if options.ray:
        from blendserve.cli.ray_engines import RayEngines

        environment = to_environment(settings.model_copy(update={"behind_front": False}))
        placed = RayEngines(options.engines, options.engine_flags, environment)
        executor = ClusterExecutor(settings, placed.connect())
        tasks.append(asyncio.create_task(placed.run(executor.cluster)))
    else:
        key = read_key(settings.cluster_key_file)
        addresses = [EngineAddress(url, key) for url in engine_urls(options.engine_urls)]
        executor = ClusterExecutor(settings, len(addresses))
        for address in addresses:
            executor.cluster.add(address)

    async def become_ready() -> None:
        await executor.until_ready(options.min_engines)
        ready.set()

    tasks.append(asyncio.create_task(become_ready()))
    config = uvicorn.Config(
        build_app(executor, token, settings.batch_dir, ready),
        host=options.host,
        port=options.port,
        log_level="warning",
        access_log=False,
        ws="none",
    )
    await uvicorn.Server(config).serve()
    for task in tasks:
        task.cancel()
    await asyncio.gather(*tasks, return_exceptions=True)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
