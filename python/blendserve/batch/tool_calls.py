"""Forced tool calls, which an engine without a parser for them answers as plain text."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

NEEDS_PARSER = (
    "tool_choice forces a tool call, and this server has no parser for the model's calls: it would "
    "answer the call as plain text. Start it with --tool-call-parser, or leave tool_choice away."
)


def forces_call(body: Mapping[str, Any]) -> bool:
    """Whether a chat completion asks for a call of some tool, or of a named one, whatever the model
    would rather do."""
    choice = body.get("tool_choice")
    return bool(body.get("tools")) and (choice == "required" or isinstance(choice, Mapping))
