"""What odd bodies are made of."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

Body = dict[str, Any]

CHAT = "/v1/chat/completions"
COMPLETIONS = "/v1/completions"
RESPONSES = "/v1/responses"
EMBEDDINGS = "/v1/embeddings"

PIXEL = (
    "data:image/png;base64,iVBORw0KGgoAAAANSUhEUgAAAAEAAAABCAYAAAAfFcSJAAAADUlEQVR42mNk+M9QDwADhgGA"
    "WjR9awAAAABJRU5ErkJggg=="
)
HUGE = (2**31 - 1, 2**31, 2**53 + 1, 2**63 - 1, 2**63, 2**64 - 1, 2**64, 2**70, -(2**63) - 1)
NUMBERS = (-1, 0, 1e308, -1e308, 5e-324, -0.0, 3.7, "8", True, None, [], {}, *HUGE)
TEXTS = ("", " ", "\x00", "\u2028", "\ufeff", "\U0010ffff", "e\u0301" * 50, "x" * 20_000)
SHAPES = (None, True, False, 0, 1, "", "text", [], [None], [[]], {}, {"a": None})


def say(text: Any = "Say it.") -> Body:
    return {"role": "user", "content": text}


def nested(depth: int, leaf: Any = None, key: str | None = None) -> Any:
    """A value so many lists, or objects, deep."""
    for _ in range(depth):
        leaf = [leaf] if key is None else {key: leaf}
    return leaf


def function(name: Any = "f", parameters: Any = None) -> Body:
    return {"type": "function", "function": {"name": name, "parameters": parameters}}


def schema_format(schema: Any, **more: Any) -> Body:
    return {"type": "json_schema", "json_schema": {"name": "s", "schema": schema, **more}}


def one_each(name: str, values: Any) -> Iterator[Body]:
    for value in values:
        yield {name: value}
