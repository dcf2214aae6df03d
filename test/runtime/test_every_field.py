"""Every JSON type and extreme value in every field of every request class: a line's own affair."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from pydantic import BaseModel
from sglang.srt.entrypoints.openai.protocol import (
    ChatCompletionRequest,
    ClassifyRequest,
    CompletionRequest,
    EmbeddingRequest,
    ResponsesRequest,
    ScoringRequest,
    V1RerankReqInput,
)
from whole_server import Line, WholeServer, whole_server

from blendserve.batch.executor import LineResult
from blendserve.runtime.default_model import resolve_model_path


def nested(depth: int, key: str | None = None) -> Any:
    value: Any = 1
    for _ in range(depth):
        value = [value] if key is None else {key: value}
    return value


VALUES: list[Any] = [
    None,
    True,
    False,
    *(0, 1, -1, 2, 21, 100_000, 2**31, 2**40, 2**63, 2**70, -(2**63), -(2**70)),
    *(0.5, -0.0, 5e-324, 1e38, 1e308, -1e308),
    *("", "1", "text", "auto", "\x00", "\ud800", "x" * 3000),
    *([], [None], [0], [-5], [2**31], [2**63], [1.5], ["a"], ["a", 1], [[]], [[], [1]], [[[]]]),
    *([{}], {}, {"a": None}, {"type": "json_schema"}, {"type": None, "function": 5}),
    *({"5": 1e300}, {"5": None}, {"role": "user"}, [{"role": "user"}], [{"type": "function"}]),
    *(nested(150), nested(150, "k"), nested(300), nested(990), nested(300, "k")),
]
USER = {"role": "user", "content": "Say it."}
REQUESTS: dict[str, tuple[type[BaseModel], dict[str, Any]]] = {
    "/v1/chat/completions": (ChatCompletionRequest, {"messages": [USER], "max_tokens": 4}),
    "/v1/completions": (CompletionRequest, {"prompt": "Say it.", "max_tokens": 4}),
    "/v1/responses": (ResponsesRequest, {"input": "Say it.", "max_output_tokens": 4}),
    "/v1/embeddings": (EmbeddingRequest, {"input": "Say it."}),
    "/v1/classify": (ClassifyRequest, {"input": "Say it."}),
    "/v1/rerank": (V1RerankReqInput, {"query": "Say it.", "documents": ["One.", "Two."]}),
    "/v1/score": (ScoringRequest, {"query": "Say", "items": [" it.", " so."]}),
}
EMBEDS = frozenset({"/v1/embeddings", "/v1/classify", "/v1/rerank", "/v1/score"})
# A batch cannot stream, nor leave its answers behind: such lines never reach an engine.
NOT_OF_LINES = {"stream", "background", "model"}


@pytest.fixture(scope="module")
def server(request: pytest.FixtureRequest) -> Iterator[WholeServer]:
    """Of the kind of the parameter: one that answers, or one that embeds."""
    with whole_server(resolve_model_path("smollm2-135m"), embeds=request.param) as server:
        yield server


on_every_route = pytest.mark.parametrize(
    ("server", "url"),
    [(url in EMBEDS, url) for url in REQUESTS],
    indirect=["server"],
    ids=list(REQUESTS),
    scope="module",
)


def check(server: WholeServer, url: str, odd: list[dict[str, Any]]) -> None:
    """Every line is answered, odd ones with 200 or 4xx, and the plain ones beside them with 200."""
    plain = REQUESTS[url][1]
    lines: list[Line] = []
    for body in odd:
        lines.append((url, {**plain, **body}))
    lines += [(url, plain)] * 3
    answers = asyncio.run(asyncio.wait_for(server.run(lines), 300))
    by_index = {answer.index: answer for answer in answers}
    assert sorted(by_index) == list(range(len(lines)))
    assert len(answers) == len(lines)
    wrong = [
        (str(body)[:200], _told(by_index[index]))
        for index, (_, body) in enumerate(lines)
        if not _own(by_index[index])
    ]
    assert wrong == []
    assert [by_index[len(odd) + k].status_code for k in range(3)] == [200] * 3
    assert server.scheduler.deadly == []


def _own(answer: LineResult) -> bool:
    status = answer.status_code
    return status is not None and (status == 200 or 400 <= status < 500)


def _told(answer: LineResult) -> str:
    return f"{answer.status_code} {str(answer.error or answer.body)[:300]}"


@on_every_route
def test_every_value_in_every_field_costs_its_own_line_at_most(
    server: WholeServer, url: str
) -> None:
    fields = REQUESTS[url][0].model_fields.keys() - NOT_OF_LINES
    check(server, url, [{field: value} for field in sorted(fields) for value in VALUES])


json_values = st.recursive(
    st.sampled_from(VALUES) | st.integers() | st.floats() | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner),
    max_leaves=6,
)


@on_every_route
@settings(
    deadline=None,
    database=None,
    derandomize=True,
    max_examples=5,
    suppress_health_check=list(HealthCheck),
)
@given(data=st.data())
def test_several_odd_fields_at_once_cost_their_own_line_at_most(
    server: WholeServer, url: str, data: st.DataObject
) -> None:
    fields = sorted(REQUESTS[url][0].model_fields.keys() - NOT_OF_LINES)
    body = st.dictionaries(st.sampled_from(fields), json_values, min_size=1, max_size=3)
    check(server, url, data.draw(st.lists(body, min_size=1, max_size=15)))


@pytest.mark.parametrize("server", [False], indirect=True, scope="module")
@pytest.mark.parametrize(
    ("header", "values", "urls"),
    [
        ("X-Data-Parallel-Rank", ("1", "-1", "7", "x", "", "1.0", "9" * 40), list(REQUESTS)[:3]),
        ("X-Override-Routed-Dp-Rank", ("1", "-1", "x", "9" * 40), ["/generate"]),
        ("X-Override-Priority", ("x", "9" * 40), ["/generate"]),
        ("X-Override-Bootstrap-Room", ("x", "9" * 40), ["/generate"]),
        ("X-Override-Rid", ("", "x" * 600), ["/generate"]),
    ],
)
def test_a_header_that_sets_a_field_is_checked_like_the_field(
    server: WholeServer,
    header: str,
    values: tuple[str, ...],
    urls: list[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    # SGLang takes some of them only if it is told to.
    monkeypatch.setenv("SGLANG_ENABLE_REQUEST_HEADER_OVERRIDES", "1")
    for url in urls:
        body = {"text": "Say it."} if url == "/generate" else REQUESTS[url][1]
        for value in values:
            asked = server.ask(url, body, **{header: value})
            answer = asyncio.run(asyncio.wait_for(asked, 60))
            assert (url, value, answer.status_code) == (url, value, 400), answer.text[:300]
        if header.endswith("Rank"):
            asked = server.ask(url, body, **{header: "0"})
            assert asyncio.run(asyncio.wait_for(asked, 60)).status_code == 200
    assert server.scheduler.deadly == []


def a_schema(inner: Any) -> dict[str, Any]:
    return {"type": "object", "x-note": inner}


@pytest.mark.parametrize("server", [False], indirect=True, scope="module")
@pytest.mark.parametrize(
    "field",
    [
        lambda value: {"metadata": {"a": value}},
        lambda value: {"tools": [{"type": "function", "name": "f", "parameters": a_schema(value)}]},
        lambda value: {
            "text": {"format": {"type": "json_schema", "name": "s", "schema": a_schema(value)}}
        },
    ],
    ids=["metadata", "tools", "text"],
)
def test_what_an_answer_could_not_repeat_is_refused_online(server: WholeServer, field: Any) -> None:
    body = REQUESTS["/v1/responses"][1]
    for depth, status in ((150, 200), (300, 400), (600, 400)):
        asked = server.ask("/v1/responses", {**body, **field(nested(depth))})
        answer = asyncio.run(asyncio.wait_for(asked, 60))
        assert (depth, answer.status_code) == (depth, status), answer.text[:300]
        assert status == 200 or answer.json()["error"]["message"]
