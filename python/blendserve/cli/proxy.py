"""What is not a file or a batch goes to the engine, and its answer back, as they are."""

from __future__ import annotations

from collections.abc import AsyncIterator

import httpx
from fastapi import APIRouter, Request, Response
from fastapi.responses import JSONResponse, StreamingResponse

from blendserve.batch import ADMIN_SCOPE_KEY, RemoteExecutor, engine_client

_METHODS = ["GET", "POST", "PUT", "PATCH", "DELETE", "OPTIONS", "HEAD"]
# Between two hops, not from end to end (RFC 9110, 7.6.1); the key is the front's own affair.
_HOP_HEADERS = frozenset(
    (
        *("connection", "keep-alive", "te", "trailer", "transfer-encoding", "upgrade"),
        *("proxy-authenticate", "proxy-authorization", "proxy-connection"),
        *("authorization", "host"),
    )
)
# What any tenant may ask of the engine; the rest steers it, and is for admins.
_TENANT_PATHS = frozenset(
    (
        *("/health", "/health_generate", "/metrics", "/metrics/", "/ping", "/openapi.json"),
        *("/generate", "/tokenize", "/detokenize", "/v1/tokenize", "/v1/detokenize"),
        *("/model_info", "/get_model_info", "/v1/models", "/v1/chat/completions"),
        *("/v1/completions", "/v1/embeddings", "/v1/responses", "/v1/rerank", "/v1/score"),
    )
)


class EngineProxy:
    """Passes requests on to the engine that is up. 503 while there is none."""

    def __init__(self, executor: RemoteExecutor) -> None:
        self._executor = executor
        self._client = engine_client()

    def router(self) -> APIRouter:
        """To be included last: it takes every path."""
        router = APIRouter()
        router.add_api_route("/{path:path}", self._forward, methods=_METHODS, response_model=None)
        return router

    async def close(self) -> None:
        await self._client.aclose()

    async def _forward(self, request: Request) -> Response:
        path = request.scope["path"]
        # The engine's batch routes are this process's alone; and dots would be resolved on the way.
        if path.startswith("/blendserve") or {".", ".."} & set(path.split("/")):
            return _error(404, "There is no such route.", "not_found")
        if not request.scope.get(ADMIN_SCOPE_KEY) and path not in _TENANT_PATHS:
            return _error(403, "This route is for keys marked `admin`.", "admin_only")
        address = self._executor.address
        if address is None:
            return _unavailable()
        query = request.scope["query_string"]
        raw_path = request.scope["raw_path"] + (b"?" + query if query else b"")
        headers = [
            *((name, value) for name, value in request.headers.raw if _passes(name)),
            (b"authorization", f"Bearer {address.token}".encode()),
        ]
        has_body = "content-length" in request.headers or "transfer-encoding" in request.headers
        outgoing = self._client.build_request(
            request.method,
            httpx.URL(address.url).copy_with(raw_path=raw_path),
            headers=headers,
            content=request.stream() if has_body else None,
        )
        try:
            answer = await self._client.send(outgoing, stream=True)
        except httpx.TransportError:
            return _unavailable()
        response = StreamingResponse(_body(answer), answer.status_code)
        response.raw_headers = [
            (name.lower(), value) for name, value in answer.headers.raw if _passes(name)
        ]
        return response


def _passes(name: bytes) -> bool:
    return name.decode("latin-1").lower() not in _HOP_HEADERS


async def _body(answer: httpx.Response) -> AsyncIterator[bytes]:
    # A client that goes away closes this, and that ends its request in the engine.
    try:
        async for block in answer.aiter_raw():
            yield block
    finally:
        await answer.aclose()


def _unavailable() -> JSONResponse:
    return _error(
        503,
        "The engine is loading or restarting; files and batches are served meanwhile.",
        "engine_unavailable",
        "server_error",
    )


def _error(
    status: int, message: str, code: str, kind: str = "invalid_request_error"
) -> JSONResponse:
    error = {"message": message, "type": kind, "param": None, "code": code}
    headers = {"Retry-After": "5"} if status == 503 else None
    return JSONResponse({"error": error}, status, headers=headers)
