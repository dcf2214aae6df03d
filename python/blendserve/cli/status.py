"""GET /blendserve/status of the front process: the engine's state, its counters, and the jobs."""

from __future__ import annotations

import asyncio
import dataclasses
import time
from collections.abc import Callable
from typing import Any

import httpx
from fastapi import APIRouter, Request

from blendserve.batch import (
    ADMIN_SCOPE_KEY,
    ApiError,
    BatchService,
    RemoteExecutor,
    engine_client,
    progress_of_programs,
    tenant_of,
    without_owner,
)
from blendserve.cli.engine_process import EngineState

# Any number of pages may look; the engine is asked this often.
_MAX_AGE_SECONDS = 0.5
_TIMEOUT_SECONDS = 2.0


class StatusBoard:
    """Asks the engine and the service, and shows each tenant its own jobs."""

    def __init__(
        self,
        service: BatchService,
        executor: RemoteExecutor,
        engine: EngineState,
        cache_salt: Callable[[str], str],
    ) -> None:
        self._cache_salt = cache_salt
        self._service = service
        self._executor = executor
        self._engine = engine
        self._client = engine_client(_TIMEOUT_SECONDS)
        self._lock = asyncio.Lock()
        self._counters: dict[str, Any] = {"schedulers": [], "jobs": [], "dispatch": None}
        self._read_at = -_MAX_AGE_SECONDS

    def router(self) -> APIRouter:
        router = APIRouter()

        @router.get("/blendserve/status")
        async def status(request: Request) -> dict[str, Any]:
            """What the engine, its schedulers and the running jobs are doing now."""
            counters = await self.counters()
            everything = bool(request.scope.get(ADMIN_SCOPE_KEY))
            jobs = [
                {**without_owner(job), "progress": progress}
                for job in counters["jobs"]
                if (progress := await self._progress(job, tenant_of(request), everything))
            ]
            engine = dataclasses.asdict(self._engine)
            shown = {"engine": engine, "schedulers": counters["schedulers"], "jobs": jobs}
            if not everything:
                return shown
            # How the queues are shared names jobs of all tenants; addresses are not for them.
            shown["dispatch"] = counters.get("dispatch")
            return {**shown, "engines": counters["engines"]} if "engines" in counters else shown

        return router

    async def counters(self) -> dict[str, Any]:
        """The engine's {"schedulers", "jobs", "dispatch"}; the last ones while it is silent."""
        async with self._lock:
            now = time.monotonic()
            address = self._executor.address
            if address is not None and now - self._read_at >= _MAX_AGE_SECONDS:
                try:
                    answer = await self._client.get(
                        f"{address.url}/blendserve/status", headers=address.headers
                    )
                    self._counters = answer.raise_for_status().json()
                except httpx.HTTPError:
                    # A busy engine answers the next time; a dead one is seen by its watch.
                    pass
                self._read_at = now
            return self._counters

    async def close(self) -> None:
        await self._client.aclose()

    async def _progress(
        self, job: dict[str, Any], tenant: str, everything: bool
    ) -> dict[str, Any] | None:
        """None for a job that the tenant may not see."""
        if "programs" in job:
            # Of the frontend: no batch, so the engine knows all of it.
            is_own = job["owner"] == self._cache_salt(tenant)
            if not (everything or is_own):
                return None
            return dataclasses.asdict(progress_of_programs(job))
        batch_id = job["job_id"]
        if everything:
            return dataclasses.asdict(self._service.live_progress(batch_id))
        try:
            found = await asyncio.to_thread(self._service.progress, batch_id, tenant)
        except ApiError:
            return None
        return dataclasses.asdict(found)
