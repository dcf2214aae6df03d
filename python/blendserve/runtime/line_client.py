"""Runs one line through the server's own route, in process, as if a client had sent it."""

from __future__ import annotations

import asyncio
import uuid
from collections.abc import Callable
from typing import Any, Protocol

import httpx

from blendserve.batch import CACHE_SALT_HEADER
from blendserve.batch.errors import cause_of
from blendserve.batch.executor import BatchLine, LineResult
from blendserve.runtime.pacing import is_batch_line
from blendserve.runtime.plan_tag import PlanTag

_ABORT_INTERVAL_SECONDS = 0.05
# Routes whose bodies may name a data-parallel replica.
_ROUTED = frozenset({"/v1/completions", "/v1/chat/completions"})


class Sender(Protocol):
    """Sends the lines of a job; see `LineClient`."""

    def start(
        self, line: BatchLine, tag: PlanTag | None, sequences: int, replica: int | None = None
    ) -> asyncio.Task[LineResult]: ...

    def tokens_so_far(self, task: asyncio.Task[LineResult]) -> int: ...

    async def abort_all(self) -> None: ...


class LineClient:
    """Calls SGLang's application without a socket, so that a batched answer is the online one.

    Args:
        app: SGLang's HTTP application.
        abort: SGLang's way to end a request by its id; ids it does not know are ignored.
        tokens_so_far: output tokens that have arrived of a request by its id, 0 if it is not known.
        api_key: key that the application asks for, if any.
        model: served name, for lines that name none.
        salt: of the lines' tenant; see `cache_salt`.
    """

    def __init__(
        self,
        app: Any,
        abort: Callable[[str], None],
        tokens_so_far: Callable[[str], int],
        api_key: str | None,
        model: str,
        salt: str = "",
    ) -> None:
        headers = {"Authorization": f"Bearer {api_key}"} if api_key else {}
        if salt:
            headers[CACHE_SALT_HEADER] = salt
        self._http = httpx.AsyncClient(
            # A handler that fails answers 500, as it would online; that is the line's answer.
            transport=httpx.ASGITransport(app=app, raise_app_exceptions=False),
            base_url="http://engine",
            headers=headers,
        )
        self._model = model
        self._abort = abort
        self._tokens_so_far = tokens_so_far
        self._in_flight: dict[str, asyncio.Task[LineResult]] = {}

    def start(
        self, line: BatchLine, tag: PlanTag | None, sequences: int, replica: int | None = None
    ) -> asyncio.Task[LineResult]:
        """Send a line, to a data-parallel replica if one is named; the task ends with its answer,
        whatever the HTTP status."""
        rid = uuid.uuid4().hex
        body = {"model": self._model, **line.body}
        if sequences == 1:
            # SGLang makes ids of its own for several sequences, and could not be told to abort.
            body["rid"] = rid
        if line.url == "/v1/responses":
            # SGLang would keep every answer in memory, to be asked for again.
            body.setdefault("store", False)
        if replica is not None and line.url in _ROUTED:
            body["routed_dp_rank"] = replica
        if tag is not None:
            body["custom_params"] = {**(body.get("custom_params") or {}), **tag.to_params()}
        task = asyncio.create_task(self._call(line, rid, body), name=rid)
        self._in_flight[rid] = task
        task.add_done_callback(lambda _: self._in_flight.pop(rid, None))
        return task

    def tokens_so_far(self, task: asyncio.Task[LineResult]) -> int:
        """Output tokens that the engine is known to have produced for a line in flight."""
        return self._tokens_so_far(task.get_name())

    async def abort_all(self) -> None:
        """End everything in flight, and wait until the engine has let go of it."""
        while self._in_flight:
            for rid in list(self._in_flight):
                # Asked again until it ends: a request is not known before it is tokenised.
                self._abort(rid)
            await asyncio.wait(self._in_flight.values(), timeout=_ABORT_INTERVAL_SECONDS)

    async def _call(self, line: BatchLine, rid: str, body: dict[str, Any]) -> LineResult:
        is_batch_line.set(True)
        try:
            request = self._http.build_request("POST", line.url, json=body, timeout=None)
        except (ValueError, TypeError, RecursionError) as error:
            # Nested too deeply, or a number or a text that JSON does not have.
            return LineResult(line.index, rid, 400, _unwritable(error))
        response = await self._http.send(request)
        try:
            content = response.json()
        except (ValueError, RecursionError):
            content = None
        if not isinstance(content, dict):
            content = {"error": {"message": response.text, "type": "server_error"}}
        return LineResult(
            index=line.index,
            request_id=rid,
            status_code=response.status_code,
            body=content,
        )


def _unwritable(error: Exception) -> dict[str, Any]:
    """An answer in OpenAI's shape to a body that cannot be sent."""
    return {
        "error": {
            "message": f"The body cannot be written as JSON. {cause_of(error)}",
            "type": "invalid_request_error",
            "param": "body",
            "code": "invalid_json",
        }
    }
