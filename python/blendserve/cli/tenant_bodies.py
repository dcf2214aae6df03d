"""Bodies of requests that tenants without `admin` send to the engine, read and checked."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import orjson
from starlette.requests import Request

from blendserve.batch import (
    ApiError,
    LineFault,
    content_faults,
    steering_faults,
    steering_headers,
    timely,
)

# As large as a prompt with pictures and sound may well be.
_MAX_BODY_BYTES = 64 * 1024 * 1024
# Parsed in a worker thread: more would hold up everybody.
_LARGE_BYTES = 1024 * 1024
# Fields of a tenant's own that the engine adds to the tenant's salt.
_SALTS = frozenset({"cache_salt", "extra_key"})


class TenantBodies:
    """Reads one body at a time into memory.

    Args:
        idle_seconds: how long a body may stay silent, see `timely`.
        allow_remote_urls: whether a body may name http(s) media.
        media_root: folder below which it may name files.
    """

    def __init__(
        self, idle_seconds: float, *, allow_remote_urls: bool, media_root: Path | None = None
    ) -> None:
        self._idle_seconds = idle_seconds
        self._allow_remote_urls = allow_remote_urls
        self._media_root = media_root

    async def checked(self, request: Request) -> bytes | None:
        """The body to pass on: what has been checked, written anew, so that the engine reads no
        other. None for methods that have no body, and for an empty one.

        Raises ApiError: 400 for what a tenant may not say, in a header either, or what is no JSON
        object, 408 for a body that falls silent, 413 for one that is too large, 415 for a coded
        one.
        """
        for fault in steering_headers(request.headers):
            raise ApiError(400, fault.message, code=fault.code, param=fault.param)
        if request.method in ("GET", "HEAD"):
            return None
        if request.headers.get("content-encoding", "identity").lower() != "identity":
            raise ApiError(
                415, "Send the body without a Content-Encoding.", code="unsupported_encoding"
            )
        body = bytearray()
        async for block in timely(request.stream(), self._idle_seconds):
            body += block
            if len(body) > _MAX_BODY_BYTES:
                raise ApiError(
                    413,
                    f"The request body is larger than {_MAX_BODY_BYTES} bytes.",
                    code="body_too_large",
                )
        if not body:
            return None
        path = request.scope["path"]
        if len(body) < _LARGE_BYTES:
            return self._rewritten(path, body)
        return await asyncio.to_thread(self._rewritten, path, body)

    def _rewritten(self, path: str, data: bytearray) -> bytes:
        try:
            body = orjson.loads(data)
        except ValueError as error:
            raise ApiError(
                400, f"The request body is not valid JSON: {error}", code="invalid_json"
            ) from error
        if not isinstance(body, dict):
            raise ApiError(400, "The request body must be a JSON object.", code="invalid_type")
        for fault in self._faults(path, body):
            # The faults are those of lines, which have their body in a field.
            param = (fault.param or "").removeprefix("body.")
            raise ApiError(400, fault.message, code=fault.code, param=param or None)
        if path == "/v1/responses":
            # The engine would keep the answer, and hand it to whoever has its id.
            body["store"] = False
        try:
            return orjson.dumps(body)
        except (TypeError, ValueError) as error:
            raise ApiError(
                400, "The request body is nested too deeply.", code="invalid_value"
            ) from error

    def _faults(self, path: str, body: dict[str, Any]) -> Iterator[LineFault]:
        yield from steering_faults({name: body[name] for name in body.keys() - _SALTS})
        yield from content_faults(
            body, allow_remote_urls=self._allow_remote_urls, media_root=self._media_root
        )
        if path == "/v1/responses" and body.get("previous_response_id") is not None:
            yield LineFault(
                "unsupported_parameter",
                "Responses are not stored; send the conversation in `input`.",
                "previous_response_id",
            )
