"""The HTTP routes of /v1/files and /v1/batches."""

from __future__ import annotations

import asyncio
import logging
import re
from collections.abc import Callable, Coroutine, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from functools import partial
from typing import Annotated, Any, BinaryIO, Literal, TypeVar

from fastapi import APIRouter, Depends, Header, Query, Request, Response
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse, StreamingResponse
from fastapi.routing import APIRoute
from starlette.exceptions import HTTPException
from starlette.types import Message, Receive

from blendserve.batch.errors import ApiError, reason_of
from blendserve.batch.limits import BatchLimits
from blendserve.batch.objects import (
    BatchObject,
    CreateBatch,
    ErrorBody,
    ErrorObject,
    FileDeleted,
    FileObject,
    Page,
)
from blendserve.batch.service import BatchService
from blendserve.batch.storage import DatabaseBusy, storage_fault
from blendserve.batch.upload import receive_upload, too_slow

logger = logging.getLogger(__name__)

Answer = TypeVar("Answer")

# Set by whoever checks keys in front of these routes; "" where nobody does.
TENANT_SCOPE_KEY = "blendserve.tenant"


def tenant_of(request: Request) -> str:
    """Whose objects a request may see."""
    return str(request.scope.get(TENANT_SCOPE_KEY, ""))


Tenant = Annotated[str, Depends(tenant_of)]

_BLOCK_BYTES = 256 * 1024
_UPLOAD_FORM = {
    "requestBody": {
        "required": True,
        "content": {
            "multipart/form-data": {
                "schema": {
                    "type": "object",
                    "required": ["file", "purpose"],
                    "properties": {
                        "file": {"type": "string", "format": "binary"},
                        "purpose": {"type": "string", "enum": ["batch"]},
                        "expires_after[anchor]": {"type": "string", "enum": ["created_at"]},
                        "expires_after[seconds]": {
                            "type": "integer",
                            "minimum": 3_600,
                            "maximum": 2_592_000,
                        },
                    },
                }
            }
        },
    }
}
_INTERNAL_ERROR = ApiError(
    500, "The server failed; its log tells why.", code="internal_error", kind="server_error"
)
# So many changes wait for the database at a time. The others wait in line, and reads for none.
_MAX_WRITERS = 4
_WRITER_SECONDS = 5.0
_ERRORS: dict[int | str, dict[str, Any]] = {
    status: {"model": ErrorObject} for status in (400, 404, 409, 413, 429, 500, 503, 507)
}


def build_router(service: BatchService) -> APIRouter:
    """The routes of `service`, to be included in any FastAPI application.

    Errors of these routes have OpenAI's shape whatever exception handlers the application has.
    """
    router = APIRouter(route_class=_route_class(service), responses=_ERRORS)
    change = _Writers()

    @router.post("/v1/files", openapi_extra=_UPLOAD_FORM)
    async def upload_file(request: Request, tenant: Tenant) -> FileObject:
        with ExitStack() as drafts:
            upload, draft = await receive_upload(
                request,
                lambda: drafts.enter_context(service.store.directory.draft()),
                service.limits,
            )
            return await change(service.add_upload, upload, draft, tenant)

    @router.get("/v1/files")
    def list_files(
        tenant: Tenant,
        after: str | None = None,
        limit: Annotated[int, Query(ge=1, le=10_000)] = 10_000,
        order: Literal["asc", "desc"] = "desc",
        purpose: str | None = None,
    ) -> Page[FileObject]:
        return service.list_files(
            after=after, limit=limit, order=order, purpose=purpose, tenant=tenant
        )

    @router.get("/v1/files/{file_id}")
    def retrieve_file(file_id: str, tenant: Tenant) -> FileObject:
        return service.retrieve_file(file_id, tenant)

    @router.get("/v1/files/{file_id}/content", response_class=StreamingResponse)
    def download_file(file_id: str, tenant: Tenant) -> StreamingResponse:
        file, stream = service.open_file(file_id, tenant)
        return StreamingResponse(
            _blocks(stream),
            media_type="application/octet-stream",
            headers={
                "Content-Length": str(file.bytes),
                "Content-Disposition": f'attachment; filename="{_plain(file.filename)}"',
                "X-Content-Type-Options": "nosniff",
            },
        )

    @router.delete("/v1/files/{file_id}")
    async def delete_file(file_id: str, tenant: Tenant) -> FileDeleted:
        return await change(service.delete_file, file_id, tenant)

    @router.post("/v1/batches")
    async def create_batch(
        body: CreateBatch,
        tenant: Tenant,
        idempotency_key: Annotated[str | None, Header()] = None,
    ) -> BatchObject:
        return await change(service.create, body, idempotency_key, tenant)

    @router.get("/v1/batches")
    def list_batches(
        tenant: Tenant,
        after: str | None = None,
        limit: Annotated[int, Query(ge=1, le=100)] = 20,
    ) -> Page[BatchObject]:
        return service.list(after=after, limit=limit, tenant=tenant)

    @router.get("/v1/batches/{batch_id}")
    def retrieve_batch(batch_id: str, tenant: Tenant) -> BatchObject:
        return service.retrieve(batch_id, tenant)

    @router.get("/v1/batches/{batch_id}/results", response_class=StreamingResponse)
    def batch_results(
        batch_id: str,
        tenant: Tenant,
        kind: Literal["output", "error"] = "output",
        after: Annotated[int, Query(ge=0)] = 0,
    ) -> StreamingResponse:
        """Ours: finished lines of a batch that may still run, behind the first `after`."""
        batch, lines = service.results(batch_id, kind, after, tenant)
        return StreamingResponse(
            _gathered(lines),
            media_type="application/x-ndjson",
            headers={"Blendserve-Batch-Status": batch.status, "X-Content-Type-Options": "nosniff"},
        )

    @router.post("/v1/batches/{batch_id}/cancel")
    async def cancel_batch(batch_id: str, tenant: Tenant) -> BatchObject:
        return await change(service.cancel, batch_id, tenant)

    return router


class _Writers:
    """Threads for what changes something, so that whoever only reads finds one free.

    DatabaseBusy if none is free in time.
    """

    def __init__(self) -> None:
        self._free = asyncio.Semaphore(_MAX_WRITERS)
        self._threads = ThreadPoolExecutor(_MAX_WRITERS, thread_name_prefix="blendserve-writer")

    async def __call__(self, function: Callable[..., Answer], *args: Any) -> Answer:
        try:
            async with asyncio.timeout(_WRITER_SECONDS):
                await self._free.acquire()
        except TimeoutError as error:
            raise DatabaseBusy from error
        try:
            loop = asyncio.get_running_loop()
            return await loop.run_in_executor(self._threads, partial(function, *args))
        finally:
            self._free.release()


def _route_class(service: BatchService) -> type[APIRoute]:
    limits = service.limits

    class BatchRoute(APIRoute):
        """A route whose errors are answered here, in OpenAI's shape, and not by the app."""

        def get_route_handler(self) -> Callable[[Request], Coroutine[Any, Any, Response]]:
            handle = super().get_route_handler()
            is_upload = self.openapi_extra is _UPLOAD_FORM

            async def handle_with_our_errors(request: Request) -> Response:
                try:
                    if not is_upload:
                        receive = _bounded(request.receive, limits)
                        request = Request(request.scope, receive)
                    return await handle(request)
                except ApiError as error:
                    return _error_response(error)
                except RequestValidationError as error:
                    return _error_response(_from_validation(error))
                except HTTPException as error:
                    cause = error.__cause__
                    if isinstance(cause, ApiError):
                        return _error_response(cause)
                    return _error_response(ApiError(error.status_code, str(error.detail)))
                except Exception as error:
                    fault = storage_fault(error, service.store.directory.database)
                    if fault is not None:
                        logger.error("%s", fault.remedy)
                        return _error_response(fault.answer)
                    logger.error("a request failed: %s", reason_of(error))
                    return _error_response(_INTERNAL_ERROR)

            return handle_with_our_errors

    return BatchRoute


def _bounded(receive: Receive, limits: BatchLimits) -> Receive:
    seen = 0
    whole = False
    deadline = asyncio.get_running_loop().time() + limits.upload_idle_seconds

    async def bounded_receive() -> Message:
        nonlocal seen, whole
        try:
            # What comes after the body is the client's going away, for which there is no hurry.
            async with asyncio.timeout_at(None if whole else deadline):
                message = await receive()
        except TimeoutError as error:
            raise too_slow(limits.upload_idle_seconds) from error
        whole = not message.get("more_body", False)
        seen += len(message.get("body", b""))
        if seen > limits.max_json_bytes:
            raise ApiError(
                413,
                f"The request body is larger than {limits.max_json_bytes} bytes.",
                code="body_too_large",
            )
        return message

    return bounded_receive


def _from_validation(error: RequestValidationError) -> ApiError:
    first = error.errors()[0]
    # ("body", "metadata", "key") -> "metadata.key"; list indexes and JSON offsets stay out.
    path = [str(part) for part in first["loc"][1:] if isinstance(part, str)]
    param = ".".join(part for part in path if part != "[key]") or None
    kind = first["type"]
    if kind == "json_invalid":
        return ApiError(400, "The request body is not valid JSON.", code="invalid_json")
    code = {
        "missing": "missing_required_parameter",
        "extra_forbidden": "unknown_parameter",
    }.get(kind, "invalid_value")
    message = str(first["msg"]).removeprefix("Value error, ")
    return ApiError(400, f"{param}: {message}" if param else message, code=code, param=param)


def _error_response(error: ApiError) -> JSONResponse:
    body = ErrorObject(
        error=ErrorBody(message=error.message, type=error.kind, param=error.param, code=error.code)
    )
    headers = {"Retry-After": str(error.retry_after_seconds)} if error.retry_after_seconds else None
    return JSONResponse(body.model_dump(), status_code=error.status_code, headers=headers)


def _blocks(stream: BinaryIO) -> Iterator[bytes]:
    with stream:
        while block := stream.read(_BLOCK_BYTES):
            yield block


def _gathered(lines: Iterator[bytes]) -> Iterator[bytes]:
    """Lines in blocks: each block costs a change of threads."""
    block = bytearray()
    for line in lines:
        block += line
        if len(block) >= _BLOCK_BYTES:
            yield bytes(block)
            block.clear()
    if block:
        yield bytes(block)


def _plain(filename: str) -> str:
    """The name without anything that could end the header's quoted string."""
    return re.sub(r"[^A-Za-z0-9._ -]", "_", filename)
