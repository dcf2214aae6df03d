"""A forced tool call that the engine could not read is refused, not answered as plain text."""

from __future__ import annotations

import asyncio
from typing import Any

from whole_server import whole_server

from blendserve.runtime.default_model import resolve_model_path

URL = "/v1/chat/completions"
NAMED = {"type": "function", "function": {"name": "f"}}
BODY: dict[str, Any] = {
    "messages": [{"role": "user", "content": "Say it."}],
    "max_tokens": 4,
    "tools": [{"type": "function", "function": {"name": "f", "parameters": {"type": "object"}}}],
}


def test_forced_calls_are_refused_in_lines_and_online_and_others_are_not() -> None:
    choices: list[Any] = ["required", NAMED, "auto", "none"]
    lines = [(URL, {**BODY, "tool_choice": choice}) for choice in choices]
    with whole_server(resolve_model_path("smollm2-135m")) as server:
        answers = {answer.index: answer for answer in asyncio.run(server.run(lines))}
        online = asyncio.run(server.ask(URL, {**BODY, "tool_choice": "required"}))
    assert [answers[index].status_code for index in range(4)] == [400, 400, 200, 200]
    assert online.status_code == 400
    assert "--tool-call-parser" in online.text
    assert "--tool-call-parser" in str(answers[0].body)
