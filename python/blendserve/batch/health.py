"""For probes: whether this process lives, and whether it can serve models now."""

from __future__ import annotations

from collections.abc import Callable

from fastapi import APIRouter
from fastapi.responses import JSONResponse

_LIVE, _READY = "/blendserve/live", "/blendserve/ready"
HEALTH_PATHS = frozenset({_LIVE, _READY})
"""Open to everybody: a probe carries no key."""

_RETRY_SECONDS = 5


def build_health_router(is_ready: Callable[[], bool]) -> APIRouter:
    """`is_ready`: whether there is an engine that takes requests."""
    router = APIRouter()

    @router.get(_LIVE)
    async def live() -> dict[str, str]:
        """200 as long as this process answers, with or without an engine."""
        return {"status": "live"}

    @router.get(_READY)
    async def ready() -> JSONResponse:
        """200 while the engine takes requests; else 503."""
        if is_ready():
            return JSONResponse({"status": "ready"})
        return JSONResponse(
            {"status": "engine loading or restarting"},
            503,
            headers={"Retry-After": str(_RETRY_SECONDS)},
        )

    return router
