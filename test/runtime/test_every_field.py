"""Every JSON type and extreme value in every field of every request class: a line's own affair."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from pydantic import BaseModel
from sglang.srt.entrypoints.openai.protocol import (
    ChatCompletionRequest,
    CompletionRequest,
    ResponsesRequest,
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
    *(nested(150), nested(150, "k")),
]
# Lines of a file are never so deep; what SGLang cannot send back of them is no matter here.
DEEP = [nested(300), nested(990), nested(300, "k")]
USER = {"role": "user", "content": "Say it."}
REQUESTS: dict[str, tuple[type[BaseModel], dict[str, Any]]] = {
    "/v1/chat/completions": (ChatCompletionRequest, {"messages": [USER], "max_tokens": 4}),
    "/v1/completions": (CompletionRequest, {"prompt": "Say it.", "max_tokens": 4}),
    "/v1/responses": (ResponsesRequest, {"input": "Say it.", "max_output_tokens": 4}),
}
# A batch cannot stream, nor leave its answers behind: such lines never reach an engine.
NOT_OF_LINES = {"stream", "background", "model"}


@pytest.fixture(scope="module")
def server() -> Iterator[WholeServer]:
    with whole_server(str(Path(resolve_model_path("smollm2-135m")))) as server:
        yield server


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


@pytest.mark.parametrize("url", REQUESTS)
def test_every_value_in_every_field_costs_its_own_line_at_most(
    server: WholeServer, url: str
) -> None:
    fields = REQUESTS[url][0].model_fields.keys() - NOT_OF_LINES
    values = VALUES if url == "/v1/responses" else [*VALUES, *DEEP]
    check(server, url, [{field: value} for field in sorted(fields) for value in values])


json_values = st.recursive(
    st.sampled_from(VALUES) | st.integers() | st.floats() | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner),
    max_leaves=6,
)


@pytest.mark.parametrize("url", REQUESTS)
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
