"""Online requests of a coordinator: each goes to the engine that has the least to do.

Only what any engine answers alike is passed on. A route that steers or shows one engine would make
it unlike the others, so it must be asked of that engine itself.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import AsyncIterator

import httpx
from starlette.requests import Request
from starlette.responses import Response, StreamingResponse
from starlette.types import Receive, Scope, Send

from blendserve.batch import CACHE_SALT_HEADER, engine_client, error_response
from blendserve.cli.proxy import ANSWERED_ALIKE, MODEL_PREFIX, passed_headers
from blendserve.runtime.cluster import Cluster
from blendserve.runtime.member import Member


class ClusterProxy:
    """ASGI: passes requests on to engines that are up. 503 while there is none."""

    def __init__(self, cluster: Cluster) -> None:
        self._cluster = cluster
        self._client = engine_client()
        self._online: Counter[Member] = Counter()

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        request = Request(scope, receive)
        answer = await self._forward(request)
        await answer(scope, receive, send)

    async def close(self) -> None:
        await self._client.aclose()

    async def _forward(self, request: Request) -> Response:
        path = request.scope["path"]
        if path not in ANSWERED_ALIKE and not path.startswith(MODEL_PREFIX):
            return error_response(
                501,
                f"{path} is about one engine, and this server has several: ask the engine itself.",
                "one_engine_only",
                kind="server_error",
            )
        members = self._cluster.members
        if not members:
            return error_response(
                503,
                "No engine is up; files and batches are served meanwhile.",
                "engine_unavailable",
                kind="server_error",
                headers={"Retry-After": "5"},
            )
        member = min(members, key=lambda each: (self._online[each], each.in_flight))
        query = request.scope["query_string"]
        raw_path = request.scope["raw_path"] + (b"?" + query if query else b"")
        salt = request.headers.get(CACHE_SALT_HEADER, "")
        outgoing = self._client.build_request(
            request.method,
            httpx.URL(member.address.url).copy_with(raw_path=raw_path),
            headers=[
                *passed_headers(request.headers.raw),
                (b"authorization", f"Bearer {member.address.token}".encode()),
                (CACHE_SALT_HEADER.encode(), salt.encode()),
            ],
            content=request.stream() if _has_body(request) else None,
        )
        self._online[member] += 1
        try:
            answer = await self._client.send(outgoing, stream=True)
        except httpx.TransportError:
            self._ended(member)
            return error_response(
                503, "The engine is gone; ask again.", "engine_unavailable", kind="server_error"
            )
        response = StreamingResponse(self._body(answer, member), answer.status_code)
        response.raw_headers = passed_headers(answer.headers.raw)
        return response

    async def _body(self, answer: httpx.Response, member: Member) -> AsyncIterator[bytes]:
        # A client that goes away closes this, and that ends its request in the engine.
        try:
            async for block in answer.aiter_raw():
                yield block
        finally:
            self._ended(member)
            await answer.aclose()

    def _ended(self, member: Member) -> None:
        self._online[member] -= 1
        if self._online[member] <= 0:
            del self._online[member]


def _has_body(request: Request) -> bool:
    return "content-length" in request.headers or "transfer-encoding" in request.headers
