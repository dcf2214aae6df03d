"""The routes that are ours alone, as one application: whatever else the server has, it never
answers below our prefixes, and ours answer alike in the front process and inside SGLang's server.
"""

from __future__ import annotations

from collections.abc import Sequence

from fastapi import APIRouter, FastAPI, Request
from starlette.responses import JSONResponse
from starlette.routing import Match
from starlette.types import ASGIApp, Lifespan, Message, Receive, Scope, Send

from blendserve.batch.errors import error_response
from blendserve.batch.page import PAGE_PATHS

_PREFIXES = ("/v1/files", "/v1/batches", "/blendserve")


def is_own(path: str) -> bool:
    """Whether a path, decoded, is one of ours, with or without a route."""
    return any(path == prefix or path.startswith(f"{prefix}/") for prefix in _PREFIXES)


class OwnRoutes:
    """ASGI: our routes here, everything else in `rest`.

    Args:
        routers: have the routes.
        rest: gets the requests for other paths, and websockets.
        lifespan: of the whole; None if `rest` has it.
    """

    def __init__(
        self,
        routers: Sequence[APIRouter],
        rest: ASGIApp,
        lifespan: Lifespan[FastAPI] | None = None,
    ) -> None:
        self._own = FastAPI(
            lifespan=lifespan,
            openapi_url=None,
            docs_url=None,
            redoc_url=None,
            redirect_slashes=False,
            exception_handlers={404: self._not_found, 405: self._not_allowed},
        )
        self._routers = routers
        for router in routers:
            self._own.include_router(router)
        self._rest = rest
        self._has_life = lifespan is not None

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        kind = scope["type"]
        if kind == "lifespan":
            await (self._own if self._has_life else self._rest)(scope, receive, send)
        elif kind == "http" and is_own(scope["path"]):
            await self._answer(scope, receive, send)
        else:
            await self._rest(scope, receive, send)

    async def _answer(self, scope: Scope, receive: Receive, send: Send) -> None:
        path = scope["path"]
        if path.endswith("/") and path not in PAGE_PATHS:
            # Many clients join paths so. A redirect would need the name of a proxy in front.
            scope = {**scope, "path": path.rstrip("/")}
        if scope["method"] != "HEAD":
            await self._own(scope, receive, send)
            return

        async def send_head(message: Message) -> None:
            if message["type"] == "http.response.body":
                message = {**message, "body": b""}
            await send(message)

        await self._own({**scope, "method": "GET"}, receive, send_head)

    async def _not_found(self, request: Request, error: Exception) -> JSONResponse:
        return error_response(404, f"There is no route {request.scope['path'][:80]}.", "not_found")

    async def _not_allowed(self, request: Request, error: Exception) -> JSONResponse:
        allowed = self._methods(request.scope)
        message = f"{request.method} is not allowed here; allowed: {', '.join(allowed)}."
        return error_response(
            405, message, "method_not_allowed", headers={"Allow": ", ".join(allowed)}
        )

    def _methods(self, scope: Scope) -> list[str]:
        found: set[str] = set()
        for router in self._routers:
            for route in router.routes:
                if route.matches(scope)[0] is not Match.NONE:
                    found |= getattr(route, "methods", None) or set()
        return sorted(found | {"HEAD"} if "GET" in found else found)
