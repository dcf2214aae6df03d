"""Runs one line through the server's own route, in process, as if a client had sent it."""

from __future__ import annotations

import asyncio
import json
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
_ROUTED = frozenset({"/v1/completions", "/v1/chat/completions", "/v1/score"})
# Whose answer is a list.
_RANKS = "/v1/rerank"
_EMBEDS = frozenset({"/v1/embeddings", "/v1/classify"})


class MemberLost(Exception):
    """The engine that had this line is gone, one of several: another one is to run the line.

    Attributes:
        died: by itself, perhaps because of one of its lines; False if it was asked to leave.
    """

    def __init__(self, message: str, *, died: bool) -> None:
        super().__init__(message)
        self.died = died


class LineSender(Protocol):
    """Sends lines to the engine, or to one of several."""

    def start(
        self, line: BatchLine, tag: PlanTag | None, sequences: int, replica: int | None = None
    ) -> asyncio.Task[LineResult]:
        """Send a line, to a replica if one is named; the task ends with its answer, whatever the
        HTTP status. Its name is the request's id. It raises MemberLost."""
        ...

    def tokens_so_far(self, task: asyncio.Task[LineResult]) -> int:
        """Output tokens that the engine is known to have produced for a line in flight."""
        ...

    async def abort_all(self) -> None:
        """End everything in flight, and wait until the engine has let go of it."""
        ...


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
        body = request_body(line, rid, self._model, tag, sequences, replica)
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
            return LineResult(line.index, rid, 400, unwritable(error))
        response = await self._http.send(request)
        body = answer_body(line.url, response.content)
        return LineResult(line.index, rid, response.status_code, body)


def request_body(
    line: BatchLine,
    rid: str,
    model: str,
    tag: PlanTag | None,
    sequences: int,
    dp_rank: int | None,
) -> dict[str, Any]:
    """A line's body as the server's route gets it."""
    body = {"model": model, **line.body}
    if sequences == 1 and not _has_several(line):
        # SGLang makes ids of its own for several sequences, and could not be told to abort.
        body["rid"] = rid
    if line.url == "/v1/responses":
        # SGLang would keep every answer in memory, to be asked for again.
        body.setdefault("store", False)
    if dp_rank is not None and line.url in _ROUTED:
        body["routed_dp_rank"] = dp_rank
    if tag is not None:
        body["custom_params"] = {**(body.get("custom_params") or {}), **tag.to_params()}
    return body


def _has_several(line: BatchLine) -> bool:
    """Whether an embedding line has a list of texts, of which SGLang wants a list of ids."""
    given = line.body.get("input") if line.url in _EMBEDS else None
    return isinstance(given, list) and bool(given) and not isinstance(given[0], int)


def answer_body(url: str, content: bytes) -> dict[str, Any]:
    """What the server's route answered; in OpenAI's shape of an error if it is no JSON."""
    try:
        body = json.loads(content)
    except (ValueError, RecursionError):
        body = None
    if isinstance(body, dict):
        return body
    if isinstance(body, list) and url == _RANKS:
        return _ranking(body)
    text = content.decode("utf-8", "replace")
    return {"error": {"message": text, "type": "server_error"}}


def _ranking(answer: list[Any]) -> dict[str, Any]:
    """A reranker's answer as an object, as the body of a result is, with its tokens."""
    found = (one.get("meta_info") if isinstance(one, dict) else None for one in answer)
    told = [meta["prompt_tokens"] for meta in found if meta and "prompt_tokens" in meta]
    tokens = sum(told)
    return {"results": answer, "usage": {"prompt_tokens": tokens, "total_tokens": tokens}}


def unwritable(error: Exception) -> dict[str, Any]:
    """An answer in OpenAI's shape to a body that cannot be sent."""
    return {
        "error": {
            "message": f"The body cannot be written as JSON. {cause_of(error)}",
            "type": "invalid_request_error",
            "param": "body",
            "code": "invalid_json",
        }
    }
