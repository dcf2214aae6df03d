"""Whatever fails in the handling of one line is that line's answer, and no other's."""

from __future__ import annotations

import asyncio
from collections import Counter
from typing import Any

import pytest
from job_server import (
    COST_MODEL,
    FakeLines,
    FakeReader,
    FakeServer,
    Run,
    chat,
    finished,
    story,
)
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import JSONResponse, PlainTextResponse, Response
from starlette.routing import Route

from blendserve.batch.executor import BatchLine, LineResult
from blendserve.planner import PlannerConfig
from blendserve.runtime.line_client import LineClient
from blendserve.runtime.plan_worker import JobPlan, News, PlanWorker, PromptBatch
from blendserve.runtime.planner_process import PlannerDied

BAD = 40
ERRORS = [
    OverflowError("Python integer 1099511627776 out of bounds for int32"),
    AttributeError("'NoneType' object has no attribute 'strict'"),
    RecursionError("maximum recursion depth exceeded"),
    ValueError("no"),
]


def statuses(run: Run) -> dict[int, int | None]:
    return {result.index: result.status_code for result in run.answers}


def check_only_bad_failed(run: Run, count: int, cause: str) -> None:
    assert Counter(run.answered()) == Counter(range(count))
    assert statuses(run) == {index: None if index == BAD else 200 for index in range(count)}
    [error] = [result.error for result in run.answers if result.index == BAD]
    assert error is not None
    assert error.code == "internal_error"
    assert cause in error.message
    assert (run.runner.view.waiting, run.runner.view.in_flight) == (0, 0)
    assert run.server.overdrawn == []


@pytest.mark.parametrize("error", ERRORS, ids=lambda error: type(error).__name__)
@pytest.mark.parametrize("unplanned", [False, True])
def test_a_line_whose_task_fails_is_answered_with_the_cause(error, unplanned, monkeypatch):
    async def answer_of(self: FakeServer, sent: Any) -> LineResult:
        if sent.index == BAD:
            raise error
        result = await sent.answer
        return LineResult(result.index, "rid", 200, {})

    monkeypatch.setattr(FakeServer, "_answer_of", answer_of)
    lines = chat(100)
    if unplanned:
        lines[BAD]["unreadable"] = True
    run = finished(lines, refuses=lambda index: index == BAD)
    check_only_bad_failed(run, 100, f"{type(error).__name__}: {error}")


def test_a_line_whose_task_is_cancelled_by_the_server_is_answered(monkeypatch):
    async def answer_of(self: FakeServer, sent: Any) -> LineResult:
        if sent.index == BAD:
            raise asyncio.CancelledError
        return await sent.answer

    monkeypatch.setattr(FakeServer, "_answer_of", answer_of)
    run = finished(chat(100), refuses=lambda index: index == BAD)
    check_only_bad_failed(run, 100, "CancelledError")


@pytest.mark.parametrize("error", ERRORS, ids=lambda error: type(error).__name__)
def test_a_line_that_cannot_be_sent_is_answered_with_the_cause(error, monkeypatch):
    real = FakeServer.start

    def start(self: FakeServer, line: BatchLine, *args: Any) -> Any:
        if line.index == BAD:
            raise error
        return real(self, line, *args)

    monkeypatch.setattr(FakeServer, "start", start)
    check_only_bad_failed(finished(chat(100)), 100, str(error))


def test_a_line_that_cannot_be_read_from_the_file_costs_itself(monkeypatch):
    real = FakeLines.read

    def read(self: FakeLines, index: int) -> BatchLine:
        if index == BAD:
            raise ValueError("unexpected end of data: line 1 column 20")
        return real(self, index)

    monkeypatch.setattr(FakeLines, "read", read)
    check_only_bad_failed(finished(chat(100)), 100, "unexpected end of data")


@pytest.mark.parametrize("error", ERRORS, ids=lambda error: type(error).__name__)
def test_a_line_that_no_reader_foresees_goes_to_the_server_for_its_answer(error, monkeypatch):
    real = FakeReader.read

    def read(self: FakeReader, url: str, body: dict[str, Any]) -> Any:
        if body.get("odd"):
            raise error
        return real(self, url, body)

    monkeypatch.setattr(FakeReader, "read", read)
    lines = [*chat(30), story(1, odd=True), *chat(30)]
    run = finished(lines)
    assert [sent.index for sent in run.server.sent if sent.tag is None] == [30]
    assert statuses(run) == {index: 400 if index == 30 else 200 for index in range(61)}


class BrokenPlanner(PlanWorker):
    """Fails at the given call."""

    def __init__(self, fails_at: str, error: Exception) -> None:
        super().__init__(COST_MODEL, PlannerConfig())
        self._fails_at = fails_at
        self._error = error

    def append(self, job_id: str, batch: PromptBatch) -> None:
        if self._fails_at == "append":
            raise self._error
        super().append(job_id, batch)

    def plan(self, job_id: str, news: News) -> JobPlan:
        if self._fails_at == "plan":
            raise self._error
        return super().plan(job_id, news)


@pytest.mark.parametrize("fails_at", ["append", "plan"])
@pytest.mark.parametrize(
    "error", [ValueError("tokens must not be negative"), PlannerDied("it ended with code -9")]
)
def test_a_job_that_cannot_be_planned_runs_without_a_plan(fails_at, error):
    lines = [*chat(150), {"unreadable": True}]
    run = finished(lines, planner=BrokenPlanner(fails_at, error))
    assert Counter(run.answered()) == Counter(range(151))
    assert {sent.tag for sent in run.server.sent} == {None}
    assert run.runner.view.phase == "running"
    assert (run.runner.view.waiting, run.runner.view.in_flight) == (0, 0)


# -- the client


def nested(depth: int) -> Any:
    value: Any = 0
    for _ in range(depth):
        value = [value]
    return value


async def echo(request: Request) -> Response:
    body = await request.json()
    if body.get("fail"):
        raise RuntimeError("a fault of the server")
    if body.get("text"):
        return PlainTextResponse("no JSON")
    return JSONResponse([1] if body.get("list") else {"usage": {"completion_tokens": 1}})


def ask(body: dict[str, Any]) -> LineResult:
    async def scenario() -> LineResult:
        app = Starlette(routes=[Route("/v1/completions", echo, methods=["POST"])])
        client = LineClient(app, abort=lambda rid: None, tokens_so_far=lambda rid: 0, api_key=None)
        return await client.start(BatchLine(3, "a", "/v1/completions", body), None, 1)

    return asyncio.run(scenario())


@pytest.mark.parametrize(
    ("value", "cause"),
    [
        (nested(100_000), "RecursionError"),
        (float("nan"), "ValueError"),
        ("half a \ud800 pair", "UnicodeEncodeError"),
        ({1, 2}, "TypeError"),
    ],
    ids=["deep", "nan", "surrogate", "no JSON type"],
)
def test_a_body_that_cannot_be_written_is_refused_on_its_line(value, cause):
    result = ask({"prompt": "a", "unknown": value})
    assert (result.index, result.status_code, result.error) == (3, 400, None)
    assert result.body is not None
    error = result.body["error"]
    assert cause in error["message"]
    assert error["type"] == "invalid_request_error"
    result.body["error"]["message"].encode()


@pytest.mark.parametrize(("order", "status"), [("text", 200), ("list", 200), ("fail", 500)])
def test_an_answer_that_is_no_object_is_the_lines_own(order, status):
    result = ask({order: True})
    assert result.status_code == status
    assert result.body is not None
    assert result.body["error"]["type"] == "server_error"
