"""The front process of ``blendserve serve``: files, batches, page and status.

It loads no model. The engine, SGLang's server with our scheduler, is a child process on a loopback
port; what is not a file or a batch is passed on to it. When the engine dies or hangs, it is
started again, and everything durable stays readable meanwhile.
"""

from __future__ import annotations

import argparse
import asyncio
import gc
import os
import sys
from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from contextlib import asynccontextmanager
from importlib.util import find_spec
from pathlib import Path

import uvicorn
from fastapi import FastAPI
from starlette.types import ASGIApp

from blendserve.batch import (
    ApiKeys,
    BatchDirectoryError,
    BatchLimits,
    BatchService,
    BatchStore,
    EngineAddress,
    EngineInfo,
    Holder,
    KeyFileError,
    KeyGuard,
    KnownHosts,
    OriginGuard,
    OwnRoutes,
    RemoteExecutor,
    WebhookError,
    Webhooks,
    build_health_router,
    build_page_router,
    build_router,
)
from blendserve.cli.cluster_flags import RAY_MISSING, engine_urls, read_key
from blendserve.cli.connections import PatientProtocol, raise_descriptor_limit
from blendserve.cli.engine_process import EngineFailed, EngineProcess, WatchSettings
from blendserve.cli.own_flags import add_setting_flags
from blendserve.cli.proxy import EngineProxy
from blendserve.cli.status import StatusBoard
from blendserve.cli.stock_flags import ConfigFileError, read
from blendserve.config import ConfigError, Settings, load_settings, to_environment

COORDINATOR_COMMAND = (sys.executable, "-m", "blendserve.cli.coordinator")
ENGINE_COMMAND = (sys.executable, "-m", "blendserve.cli.serve")
# SGLang's defaults.
_LOOPBACK = ("127.0.0.1", "localhost", "::1")
_HOST, _PORT = "127.0.0.1", 30_000
_GRACE_SECONDS = 10


class Front:
    """The service, the engine that works for it, and the application in front of both.

    Args:
        store: open batch directory; whoever opened it closes it.
        engine_command: see `EngineProcess`.
        keys: empty for a server that asks for none.
        host: that it listens on.
        webhooks: who is told when batches end.
    """

    def __init__(
        self,
        store: BatchStore,
        engine_command: Sequence[str],
        settings: Settings,
        keys: ApiKeys,
        watch: WatchSettings | None = None,
        host: str = _HOST,
        webhooks: Webhooks | None = None,
    ) -> None:
        self.executor = RemoteExecutor(
            on_lost=lambda: self.engine.look_again(), cache_salt=self._cache_salt
        )
        self.service = BatchService(store, self.executor, limits_of(settings), webhooks=webhooks)
        self.engine = EngineProcess(
            engine_command,
            self._engine_up,
            self.executor.engine_down,
            environment=engine_environment(settings),
            watch=watch or WatchSettings(hang_seconds=settings.engine_hang_seconds),
        )
        self._proxy = EngineProxy(
            self.executor,
            keys,
            allow_remote_urls=settings.allow_remote_urls,
            media_root=settings.media_root,
        )
        self._board = StatusBoard(self.service, self.executor, self.engine.view, keys.cache_salt)
        self._store = store
        self._keys = keys
        self.app = self._build_app(KnownHosts.of(settings.allowed_hosts, host))
        self.failure: EngineFailed | None = None
        self.on_failure: Callable[[], None] = lambda: None
        """Called when the engine is given up, which `failure` then tells."""

    def _engine_up(self, address: EngineAddress, info: EngineInfo) -> None:
        self.executor.engine_up(address, info)
        self.service.engine_recovered()

    def _build_app(self, hosts: KnownHosts) -> ASGIApp:
        routers = [
            build_router(self.service),
            build_page_router(),
            build_health_router(lambda: self.executor.address is not None),
            self._board.router(),
            self._proxy.programs_router(),
        ]
        routes = OwnRoutes(routers, rest=self._proxy, lifespan=self._life)
        return OriginGuard(KeyGuard(routes, self._keys), None if self._keys else hosts)

    def _cache_salt(self, batch_id: str) -> str:
        row = self._store.find_batch(batch_id)
        return self._keys.cache_salt(row.tenant) if row is not None else ""

    @asynccontextmanager
    async def _life(self, _: FastAPI) -> AsyncIterator[None]:
        await self.service.start()
        engine = asyncio.create_task(self._keep_engine())
        try:
            yield
        finally:
            await self.service.stop()
            await self._proxy.close()
            await self._board.close()
            engine.cancel()
            await asyncio.wait([engine])

    async def _keep_engine(self) -> None:
        try:
            await self.engine.run()
        except EngineFailed as error:
            self.failure = error
            self.on_failure()


def serve_front(argv: Sequence[str]) -> int:
    """Serve until stopped. Exit status: that of an engine that never came up, 2 for a setting."""
    try:
        options, engine_flags = split_flags(argv)
        settings = settings_of(options)
        keys = _keys(settings, options.api_key)
        webhooks = webhooks_of(settings)
        store = BatchStore(settings.batch_dir)
    except (ConfigError, ConfigFileError, KeyFileError, WebhookError, BatchDirectoryError) as error:
        print(f"blendserve serve: {error}", file=sys.stderr)
        return 2
    try:
        command = engine_command(options, engine_flags, settings)
    except ConfigError as error:
        store.close()
        print(f"blendserve serve: {error}", file=sys.stderr)
        return 2
    try:
        clients = raise_descriptor_limit()
        front = Front(store, command, settings, keys, host=options.host, webhooks=webhooks)
        server = uvicorn.Server(
            uvicorn.Config(
                front.app,
                host=options.host,
                port=options.port,
                ssl_keyfile=options.ssl_keyfile,
                ssl_certfile=options.ssl_certfile,
                ssl_keyfile_password=options.ssl_keyfile_password,
                timeout_graceful_shutdown=_GRACE_SECONDS,
                access_log=False,
                http=PatientProtocol,
                ws="none",
                limit_concurrency=clients,
            )
        )

        def stop() -> None:
            server.should_exit = True

        front.on_failure = stop
        # A look at all that has been imported would hold the event loop for 50 ms each time.
        gc.collect()
        gc.freeze()
        server.run()
    finally:
        store.close()
    if front.failure is not None:
        print(f"blendserve serve: {front.failure}", file=sys.stderr)
        return front.failure.status or 1
    return 0


def engine_command(
    options: argparse.Namespace,
    engine_flags: Sequence[str],
    settings: Settings,
    engine: Sequence[str] = ENGINE_COMMAND,
) -> list[str]:
    """What starts `engine`, or the coordinator of several. Raises ConfigError."""
    least = 1 if options.min_engines is None else options.min_engines
    own = ["--min-engines", str(least), "--host", "127.0.0.1"]
    if options.ray:
        return [*COORDINATOR_COMMAND, *own, *_ray_flags(options, least), "--", *engine_flags]
    if options.engines is not None:
        raise ConfigError("--engines is for engines on a Ray cluster: give --ray, too")
    if options.engine_urls is None:
        if options.min_engines is not None:
            raise ConfigError("--min-engines is for several engines: give --engine-urls or --ray")
        return [*engine, *engine_flags, "--host", "127.0.0.1"]
    if engine_flags:
        raise ConfigError(
            f"{engine_flags[0]} is for the engines, which are started by themselves: give it to "
            "`blendserve engine` on their machines"
        )
    # Looked at here, too, so that a mistake is told before anything starts.
    urls = engine_urls(options.engine_urls)
    read_key(settings.cluster_key_file)
    if not 1 <= least <= len(urls):
        raise ConfigError(f"--min-engines must be from 1 to {len(urls)}, the number of engines")
    return [*COORDINATOR_COMMAND, *own, "--engine-urls", ",".join(urls)]


def _ray_flags(options: argparse.Namespace, least: int) -> list[str]:
    if options.engine_urls is not None:
        raise ConfigError("give either --ray or --engine-urls, not both")
    if find_spec("ray") is None:
        raise ConfigError(RAY_MISSING)
    engines = options.engines
    if engines is None:
        return ["--ray"]
    if not 1 <= least <= engines:
        raise ConfigError(f"--min-engines must be from 1 to {engines}, the number of --engines")
    return ["--ray", "--engines", str(engines)]


def limits_of(settings: Settings) -> BatchLimits:
    """The batch room's limits, as the settings have them."""
    return BatchLimits(
        max_lines=settings.max_batch_lines,
        max_file_bytes=settings.max_file_bytes,
        max_running=settings.max_running_batches,
        max_open_batches=settings.max_open_batches,
        allow_remote_urls=settings.allow_remote_urls,
        media_root=settings.media_root,
    )


def webhooks_of(settings: Settings) -> Webhooks:
    """Who is told when batches end. Raises WebhookError."""
    return Webhooks.of(settings.webhook_url, settings.webhook_secret_file, settings.webhook_hosts)


def engine_environment(settings: Settings) -> dict[str, str]:
    """Variables that make a server the engine of this process."""
    engine = settings.model_copy(update={"enabled": True, "behind_front": True})
    return {**to_environment(engine), **around_proxies(os.environ)}


def around_proxies(environment: Mapping[str, str]) -> dict[str, str]:
    """Variables with which no request to this machine itself goes through a proxy: SGLang warms its
    own server up over HTTP. Downloads still take the proxy."""
    given = environment.get("no_proxy") or environment.get("NO_PROXY") or ""
    hosts = [*filter(None, given.split(",")), *_LOOPBACK]
    return dict.fromkeys(("no_proxy", "NO_PROXY"), ",".join(dict.fromkeys(hosts)))


def split_flags(argv: Sequence[str]) -> tuple[argparse.Namespace, list[str]]:
    """What is the front's, also in the file of --config; the rest is for the engine, which names
    what it does not know. Raises ConfigFileError."""
    return read(_parser(), argv)


def front_flags() -> frozenset[str]:
    """The flags that this process reads."""
    return frozenset(_parser()._option_string_actions)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="blendserve serve", add_help=False, allow_abbrev=False)
    add_setting_flags(parser)
    parser.add_argument("--host", default=_HOST)
    parser.add_argument("--port", type=int, default=_PORT)
    parser.add_argument("--api-key")
    parser.add_argument(
        "--engine-urls", help="Engines that run elsewhere (`blendserve engine`), with commas."
    )
    parser.add_argument("--ray", action="store_true", help="Start engines on a Ray cluster.")
    parser.add_argument("--engines", type=int, help="How many of them; else as many as fit.")
    parser.add_argument("--min-engines", type=int, help="Serve once so many have joined.")
    for name in ("--ssl-keyfile", "--ssl-certfile", "--ssl-keyfile-password"):
        parser.add_argument(name)
    return parser


def settings_of(options: argparse.Namespace) -> Settings:
    """The settings under the flags of ours. ConfigError if one cannot be used."""
    given = {name: getattr(options, name, None) for name in Settings.model_fields}
    overrides = {name: value for name, value in given.items() if value is not None}
    return load_settings(**{**overrides, "enabled": True})


def _keys(settings: Settings, api_key: str | None) -> ApiKeys:
    if settings.api_keys_file:
        if api_key is not None:
            raise ConfigError("give either --api-key or --api-keys-file, not both")
        return ApiKeys.read(Path(settings.api_keys_file))
    return ApiKeys({api_key: Holder("", admin=True)} if api_key else {})
