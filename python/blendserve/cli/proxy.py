"""What is not a file or a batch goes to the engine, and its answer back, as they are.

But for what keeps tenants apart: a tenant's bodies are read and checked first, and all that is
passed on names whose KV it may share. The engine's own key never comes back.
"""

from __future__ import annotations

from collections.abc import AsyncIterator, Iterable
from pathlib import Path

import httpx
from fastapi import APIRouter
from starlette.requests import ClientDisconnect, Request
from starlette.responses import Response, StreamingResponse
from starlette.types import Receive, Scope, Send
from starlette.websockets import WebSocketClose

from blendserve.batch import (
    ADMIN_SCOPE_KEY,
    CACHE_SALT_HEADER,
    ApiError,
    ApiKeys,
    RemoteExecutor,
    engine_client,
    error_response,
    tenant_of,
    timely,
)
from blendserve.cli.tenant_bodies import TenantBodies

# OPTIONS is not among them: the engine would let pages of any origin in.
_METHODS = ("DELETE", "GET", "HEAD", "PATCH", "POST", "PUT")
# Between two hops, not from end to end (RFC 9110, 7.6.1), as what `Connection` names; the key and
# the salt are the front's own affair.
_HOP_HEADERS = frozenset(
    (
        *("connection", "keep-alive", "te", "trailer", "transfer-encoding", "upgrade"),
        *("proxy-authenticate", "proxy-authorization", "proxy-connection"),
        *("authorization", "host", CACHE_SALT_HEADER),
    )
)
# Of an answer: this process writes its own.
_OWN_HEADERS = frozenset({"date", "server"})
# Programs of the frontend that run as a job: the one of our own routes that the engine answers.
PROGRAMS_PATH = "/blendserve/programs"
# What any tenant may ask of the engine, and any engine of several answers; the rest steers it, and
# is for admins. Stored responses are not here: the engine does not know whose they are.
ANSWERED_ALIKE = frozenset(
    (
        *("/health", "/health_generate", "/metrics", "/metrics/", "/ping", "/openapi.json"),
        *("/generate", "/tokenize", "/detokenize", "/v1/tokenize", "/v1/detokenize"),
        *("/model_info", "/get_model_info", "/v1/models", "/v1/chat/completions"),
        *("/v1/completions", "/v1/embeddings", "/v1/responses", "/v1/rerank", "/v1/score"),
        *("/v1/classify", "/v1/messages", "/v1/messages/count_tokens"),
    )
)
MODEL_PREFIX = "/v1/models/"
_IDLE_SECONDS = 60.0


class EngineProxy:
    """ASGI: passes requests on to the engine that is up. 503 while there is none."""

    def __init__(
        self,
        executor: RemoteExecutor,
        keys: ApiKeys,
        *,
        allow_remote_urls: bool = False,
        media_root: Path | None = None,
    ) -> None:
        self._executor = executor
        self._keys = keys
        self._bodies = TenantBodies(
            _IDLE_SECONDS, allow_remote_urls=allow_remote_urls, media_root=media_root
        )
        self._client = engine_client()

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "websocket":
            await WebSocketClose()(scope, receive, send)
            return
        request = Request(scope, receive)
        try:
            answer = await self._forward(request)
        except ApiError as error:
            answer = error_response(
                error.status_code, error.message, error.code or "", param=error.param
            )
        except ClientDisconnect:
            answer = error_response(400, "The request ended early.", "request_incomplete")
        await answer(scope, receive, send)

    def programs_router(self) -> APIRouter:
        """For `OwnRoutes`: the paths of ours that are passed on, too."""
        router = APIRouter()
        for path in (PROGRAMS_PATH, f"{PROGRAMS_PATH}/{{job_id}}"):
            router.add_route(path, self)  # type: ignore[arg-type]
        return router

    async def close(self) -> None:
        await self._client.aclose()

    async def _forward(self, request: Request) -> Response:
        path = request.scope["path"]
        if request.method not in _METHODS:
            return error_response(
                *(405, f"{request.method} is not allowed here.", "method_not_allowed"),
                headers={"Allow": ", ".join(_METHODS)},
            )
        # Dots would be resolved on the way, and lead to the engine's own batch routes.
        if {".", ".."} & set(path.split("/")):
            return error_response(404, "There is no such route.", "not_found")
        is_admin = bool(request.scope.get(ADMIN_SCOPE_KEY))
        is_for_tenants = path in (*ANSWERED_ALIKE, PROGRAMS_PATH) or path.startswith(
            (MODEL_PREFIX, f"{PROGRAMS_PATH}/")
        )
        if not is_admin and not is_for_tenants:
            return error_response(403, "This route is for keys marked `admin`.", "admin_only")
        address = self._executor.address
        if address is None:
            return _unavailable()
        headers = [
            *_passed(request.headers.raw, _HOP_HEADERS),
            (b"authorization", f"Bearer {address.token}".encode()),
            (CACHE_SALT_HEADER.encode(), self._keys.cache_salt(tenant_of(request)).encode()),
        ]
        content: AsyncIterator[bytes] | bytes | None
        if is_admin:
            named = request.headers
            has_body = "content-length" in named or "transfer-encoding" in named
            content = timely(request.stream(), _IDLE_SECONDS) if has_body else None
        else:
            content = await self._bodies.checked(request)
            headers = [pair for pair in headers if pair[0] != b"content-length"]
        query = request.scope["query_string"]
        raw_path = request.scope["raw_path"] + (b"?" + query if query else b"")
        outgoing = self._client.build_request(
            request.method,
            httpx.URL(address.url).copy_with(raw_path=raw_path),
            headers=headers,
            content=content,
        )
        try:
            answer = await self._client.send(outgoing, stream=True)
        except httpx.TransportError:
            return _unavailable()
        blocks = _body(answer)
        if not is_for_tenants:
            # Routes that show the engine's settings show its key, too.
            blocks = without(address.token.encode(), blocks)
        response = StreamingResponse(blocks, answer.status_code)
        response.raw_headers = _passed(answer.headers.raw, _HOP_HEADERS | _OWN_HEADERS)
        return response


def passed_headers(headers: Iterable[tuple[bytes, bytes]]) -> list[tuple[bytes, bytes]]:
    """Of a request or an answer, what is not between two hops only."""
    return _passed(headers, _HOP_HEADERS | _OWN_HEADERS)


def _passed(
    headers: Iterable[tuple[bytes, bytes]], kept_back: frozenset[str]
) -> list[tuple[bytes, bytes]]:
    lower = [(name.lower(), value) for name, value in headers]
    named = {
        word.strip().lower()
        for name, value in lower
        if name == b"connection"
        for word in value.split(b",")
    }
    return [
        (name, value)
        for name, value in lower
        if name.decode("latin-1") not in kept_back and name not in named
    ]


async def _body(answer: httpx.Response) -> AsyncIterator[bytes]:
    # A client that goes away closes this, and that ends its request in the engine.
    try:
        async for block in answer.aiter_raw():
            yield block
    finally:
        await answer.aclose()


async def without(secret: bytes, blocks: AsyncIterator[bytes]) -> AsyncIterator[bytes]:
    """The blocks with stars in place of a secret, wherever it is cut, of the same length."""
    stars = b"*" * len(secret)
    rest = b""
    try:
        async for block in blocks:
            rest = (rest + block).replace(secret, stars)
            # The longest end that may be the beginning of one.
            held = next(
                length
                for length in range(min(len(secret) - 1, len(rest)), -1, -1)
                if rest.endswith(secret[:length])
            )
            whole = len(rest) - held
            if whole:
                yield rest[:whole]
            rest = rest[whole:]
        if rest:
            yield rest
    finally:
        close = getattr(blocks, "aclose", None)
        if close is not None:
            await close()


def _unavailable() -> Response:
    return error_response(
        503,
        "The engine is loading or restarting; files and batches are served meanwhile.",
        "engine_unavailable",
        kind="server_error",
        headers={"Retry-After": "5"},
    )
