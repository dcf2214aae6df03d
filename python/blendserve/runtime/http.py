"""Adds BlendServe's routes to SGLang's HTTP server, and ties the batch service to its life."""

from __future__ import annotations

import asyncio
import dataclasses
import logging
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from typing import Any

from fastapi import APIRouter

from blendserve.batch import (
    BatchDirectoryError,
    BatchLimits,
    BatchService,
    BatchStore,
    KnownHosts,
    OriginGuard,
    OwnRoutes,
    Webhooks,
    build_engine_router,
    build_health_router,
    build_page_router,
    build_router,
    is_own,
    progress_of_programs,
    without_owner,
)
from blendserve.config import load_settings
from blendserve.runtime.cache_salt import SaltReader
from blendserve.runtime.engine_link import EngineLink
from blendserve.runtime.executor import BlendExecutor
from blendserve.runtime.guard import UnsupportedSGLang, check_scheduler_live
from blendserve.runtime.job_view import without_infinity
from blendserve.runtime.program_routes import build_programs_router

logger = logging.getLogger(__name__)

_SIGTERM_POLL_SECONDS = 0.2


def mount(
    server_args: Any,
    tokenizer_manager: Any,
    template_manager: Any,
    port_args: Any,
    scheduler_infos: list[dict[str, Any]],
    *args: Any,
    **kwargs: Any,
) -> None:
    """BEFORE hook of ``_setup_and_run_http_server``: everything is loaded, nothing listens yet.

    Raises:
        SystemExit: the scheduler is not ours, or the batch directory cannot be used.
    """
    from sglang.srt.entrypoints.http_server import app

    settings = load_settings()
    try:
        if server_args.dp_size == 1:
            for info in scheduler_infos:
                check_scheduler_live(info)
        if server_args.tokenizer_worker_num != 1:
            raise UnsupportedSGLang(
                "BlendServe's Batch API needs --tokenizer-worker-num 1: further workers do not "
                "load plugins. Leave the flag out."
            )
        kv_tokens = scheduler_infos[0].get("max_total_num_tokens") if scheduler_infos else None
        executor = BlendExecutor(app, server_args, tokenizer_manager, settings, kv_tokens)
        if settings.behind_coordinator:
            app.add_middleware(SaltReader)
            app.include_router(_link(app, server_args, tokenizer_manager, executor).router())
            _extend_life(app, tokenizer_manager, executor, None, plans=False)
            return
        if settings.behind_front:
            app.add_middleware(SaltReader)
            app.include_router(
                build_engine_router(executor, lambda: _engine_view(executor), settings.batch_dir)
            )
            app.include_router(build_programs_router(executor))
            _extend_life(app, tokenizer_manager, executor, None)
            return
        limits = BatchLimits(
            max_lines=settings.max_batch_lines,
            max_file_bytes=settings.max_file_bytes,
            max_running=settings.max_running_batches,
            max_open_batches=settings.max_open_batches,
            allow_remote_urls=settings.allow_remote_urls,
            media_root=settings.media_root,
        )
        webhooks = Webhooks.of(
            settings.webhook_url, settings.webhook_secret_file, settings.webhook_hosts
        )
        store = BatchStore(settings.batch_dir)
    except (UnsupportedSGLang, BatchDirectoryError, ValueError) as error:
        raise SystemExit(f"blendserve: {error}") from error
    service = BatchService(store, executor, limits, webhooks=webhooks)
    routers = [
        build_router(service),
        build_page_router(),
        build_health_router(lambda: tokenizer_manager.server_status.value == "Up"),
        _status_router(executor, service),
        build_programs_router(executor),
    ]
    # Where SGLang asks for a key, it asks before these.
    hosts = KnownHosts.of(settings.allowed_hosts, server_args.host)
    app.add_middleware(_OwnFirst, routers=routers, hosts=None if server_args.api_key else hosts)
    _extend_life(app, tokenizer_manager, executor, service)
    logger.info("BlendServe: blended scheduling, Batch API in %s", settings.batch_dir.resolve())


def _link(
    app: Any, server_args: Any, tokenizer_manager: Any, executor: BlendExecutor
) -> EngineLink:
    link = EngineLink(
        app=app,
        api_key=server_args.api_key,
        abort=tokenizer_manager.abort_request,
        tokens_so_far=executor.tokens_so_far,
        reader=executor.reader,
        describe=executor.describe,
        fingerprint=lambda: executor.fingerprint,
        reports=executor.reports,
        pacer=executor.pacer,
    )
    executor.on_report = link.on_report
    executor.lines_of_coordinator = lambda: link.in_flight
    return link


class _OwnFirst:
    """ASGI middleware of SGLang's application: our routes answer before its CORS rules, which let
    pages of any origin read, and before its own error shapes."""

    def __init__(self, app: Any, routers: Sequence[APIRouter], hosts: KnownHosts | None) -> None:
        self._app = app
        self._own = OriginGuard(OwnRoutes(routers, rest=app), hosts)

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        own = scope["type"] == "http" and is_own(scope["path"])
        await (self._own if own else self._app)(scope, receive, send)


def _extend_life(
    app: Any,
    tokenizer_manager: Any,
    executor: BlendExecutor,
    service: BatchService | None,
    *,
    plans: bool = True,
) -> None:
    """Start after SGLang's own start-up, which makes the handlers, and stop before its end."""
    sglang_lifespan = app.router.lifespan_context

    @asynccontextmanager
    async def lifespan(application: Any) -> AsyncIterator[Any]:
        async with sglang_lifespan(application) as state:
            executor.start(plans=plans)
            try:
                await executor.replicas_live()
                if service is None:
                    # The front process, or the coordinator's, has the batches, and stops its jobs
                    # before this engine.
                    yield state
                else:
                    async with _serving(service, tokenizer_manager):
                        yield state
            finally:
                await executor.stop()

    app.router.lifespan_context = lifespan


@asynccontextmanager
async def _serving(service: BatchService, tokenizer_manager: Any) -> AsyncIterator[None]:
    await service.start()
    stopping = asyncio.create_task(_stop_on_sigterm(tokenizer_manager, service))
    try:
        yield
    finally:
        stopping.cancel()
        await service.stop()
        service.store.close()


async def _stop_on_sigterm(tokenizer_manager: Any, service: BatchService) -> None:
    """On SIGTERM SGLang waits until no request is left; a batch would feed it new ones for ever."""
    while not tokenizer_manager.gracefully_exit:
        await asyncio.sleep(_SIGTERM_POLL_SECONDS)
    logger.info("BlendServe: stopping; unfinished batches go on at the next start.")
    await service.stop()


def _status_router(executor: BlendExecutor, service: BatchService) -> APIRouter:
    router = APIRouter()

    @router.get("/blendserve/status")
    async def status() -> dict[str, Any]:
        """What the scheduler and the running jobs are doing now."""
        view = _engine_view(executor)
        for job in view["jobs"]:
            progress = (
                progress_of_programs(job)
                if "programs" in job
                else service.live_progress(job["job_id"])
            )
            job["progress"] = dataclasses.asdict(progress)
        view["jobs"] = [without_owner(job) for job in view["jobs"]]
        return view

    return router


def _engine_view(executor: BlendExecutor) -> dict[str, Any]:
    """The counters of all schedulers, and the jobs that run."""
    view = {
        "schedulers": [dataclasses.asdict(report) for report in executor.reports.values()],
        "jobs": [dataclasses.asdict(view) for view in executor.jobs()],
        "dispatch": dataclasses.asdict(executor.dispatch()),
    }
    return {key: without_infinity(value) for key, value in view.items()}
