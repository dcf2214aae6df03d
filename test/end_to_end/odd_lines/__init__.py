"""Odd request bodies of every kind that we could think of, for engines that must outlive them all.

Each is something that a data frame, another SDK, another server's extension, a slip of the hand or
ill will would send. None may cost the engine, a neighbour or itself more than a 4xx.
"""

from __future__ import annotations

from odd_lines.chat import chat
from odd_lines.completions import completions
from odd_lines.deadly import DEADLY
from odd_lines.embeddings import embeddings
from odd_lines.parts import CHAT, COMPLETIONS, EMBEDDINGS, RESPONSES, Body
from odd_lines.responses import responses

__all__ = ["CHAT", "COMPLETIONS", "DEADLY", "EMBEDDINGS", "KINDS", "RESPONSES", "Body", "bodies"]

KINDS = {CHAT: chat, COMPLETIONS: completions, RESPONSES: responses, EMBEDDINGS: embeddings}
"""The generator of each endpoint."""


def bodies(url: str, model: str) -> list[Body]:
    """All odd bodies of an endpoint, for a served model. Short answers, where a body allows it."""
    limit = "max_output_tokens" if url == RESPONSES else "max_tokens"
    common: Body = {"model": model}
    if url != EMBEDDINGS:
        common[limit] = 4
    return [{**common, **body} for body in KINDS[url]()]
