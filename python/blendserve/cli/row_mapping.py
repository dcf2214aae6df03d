"""A row of a table as a request: which column is the prompt, and what goes with it."""

from __future__ import annotations

import argparse
import string
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import orjson

from blendserve.batch.endpoints import ENDPOINTS, did_you_mean
from blendserve.cli.batch_input import InputError
from blendserve.cli.rows import PROMPT

_MESSAGES = "messages"
# Where a prompt stands in a body.
_FIELDS = {
    "/v1/chat/completions": _MESSAGES,
    "/v1/completions": "prompt",
    "/v1/embeddings": "input",
    "/v1/responses": "input",
    "/v1/classify": "input",
}


@dataclass(frozen=True)
class RowMapping:
    """How rows become requests.

    prompt_column: its text is the prompt, a list the messages; None: see `template`.
    template: a text with {column} in it. Without both: the column `prompt`, or `messages`.
    system: a text before every prompt. body: fields of every request. id_column: custom_ids.
    """

    prompt_column: str | None = None
    template: str | None = None
    system: str | None = None
    endpoint: str = "/v1/chat/completions"
    body: Mapping[str, Any] = field(default_factory=dict)
    id_column: str | None = None

    @property
    def given(self) -> bool:
        """Whether JSON lines are rows, too, and not requests."""
        return self.prompt_column is not None or self.template is not None

    def columns(self) -> list[str]:
        """Those that every table must have."""
        named = [name for name in (self.prompt_column, self.id_column) if name is not None]
        return [*named, *_columns_of(self.template or "")]

    def chosen(self, name: str, columns: Sequence[str]) -> RowMapping:
        """The mapping with a prompt, which the table's columns give where the user does not.

        Raises:
            InputError: there is no such column.
        """
        check_columns(name, self.columns(), columns)
        if self.given:
            return self
        found = next((one for one in (PROMPT, _MESSAGES) if one in columns), None)
        if found is None:
            raise InputError(
                f"{name}: which column is the prompt? Give --prompt-column NAME, or --template "
                f"with {{NAME}} in a text. It has {', '.join(columns)}"
            )
        return RowMapping(found, None, self.system, self.endpoint, self.body, self.id_column)

    def request(self, row: Mapping[str, Any], number: int) -> dict[str, Any]:
        """The line of the row `number`, from 1. A prompt without a value is left out, for the line
        to be answered with that."""
        custom_id = f"row-{number}" if self.id_column is None else row.get(self.id_column)
        body = {**self.body}
        prompt = self._prompt(row)
        if prompt is not None:
            body[_FIELDS[self.endpoint]] = prompt
        return {
            "custom_id": custom_id if custom_id is None else str(custom_id),
            "method": "POST",
            "url": self.endpoint,
            "body": body,
        }

    def _prompt(self, row: Mapping[str, Any]) -> Any:
        if self.template is not None:
            value: Any = _filled(self.template, row)
        else:
            value = row.get(self.prompt_column or PROMPT)
            if self.prompt_column == _MESSAGES and isinstance(value, str):
                value = _read_messages(value)
            if not isinstance(value, list):
                value = _text(value)
        if value is None or value == "":
            return None
        talks = self.endpoint in ("/v1/chat/completions", "/v1/responses")
        if isinstance(value, list):
            value = [_without_none(one) for one in value]
        elif self.endpoint == "/v1/chat/completions":
            value = [{"role": "user", "content": value}]
        if self.system is not None and talks:
            if isinstance(value, str):
                value = [{"role": "user", "content": value}]
            value = [{"role": "system", "content": self.system}, *value]
        return value


def add_mapping_flags(parser: argparse.ArgumentParser) -> None:
    """The flags of a `RowMapping`."""
    group = parser.add_argument_group("rows of a table as requests")
    group.add_argument("--prompt-column", metavar="NAME", help="the column with the prompts")
    group.add_argument(
        "--template", metavar="TEXT", help="prompts from {column}s; @FILE reads it from a file"
    )
    group.add_argument("--system", metavar="TEXT", help="a system message before every prompt")
    group.add_argument(
        "--endpoint",
        metavar="URL",
        default="/v1/chat/completions",
        help="what rows ask for (default: /v1/chat/completions)",
    )
    group.add_argument(
        "--body", metavar="JSON", help="fields of every request, as '{\"max_tokens\": 100}'"
    )
    group.add_argument("--id-column", metavar="NAME", help="custom_ids (default: row-1, row-2 ...)")


def read_mapping(options: argparse.Namespace) -> RowMapping:
    """Raises InputError."""
    if options.prompt_column is not None and options.template is not None:
        raise InputError("give --prompt-column or --template, not both")
    if options.endpoint not in _FIELDS:
        known = ", ".join(sorted(_FIELDS))
        hint = (
            "write lines of it as a batch file"
            if options.endpoint in ENDPOINTS
            else f"use one of {known}.{did_you_mean(options.endpoint, _FIELDS)}"
        )
        raise InputError(f"--endpoint {options.endpoint}: rows cannot ask for that; {hint}")
    return RowMapping(
        options.prompt_column,
        _template(options.template),
        options.system,
        options.endpoint,
        _body(options.body),
        options.id_column,
    )


def check_columns(name: str, wanted: Sequence[str], columns: Sequence[str]) -> None:
    """Raises InputError for one that is not there."""
    missing = [column for column in wanted if column not in columns]
    if missing:
        raise InputError(
            f"{name} has no column {', '.join(map(repr, missing))}; it has {', '.join(columns)}"
        )


def _template(text: str | None) -> str | None:
    if text is not None and text.startswith("@"):
        try:
            text = Path(text[1:]).read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError) as error:
            raise InputError(f"--template {text}: {error}") from error
    if text is not None and not _columns_of(text):
        raise InputError("--template names no column; write one in braces, as {question}")
    return text


def _body(text: str | None) -> dict[str, Any]:
    try:
        body = {} if text is None else orjson.loads(text)
    except ValueError as error:
        raise InputError(f"--body is not JSON: {error}") from error
    if not isinstance(body, dict):
        raise InputError("--body must be a JSON object, as '{\"max_tokens\": 100}'")
    return body


def _columns_of(template: str) -> list[str]:
    try:
        parts = list(string.Formatter().parse(template))
    except ValueError as error:
        raise InputError(
            f"--template: {error}. Columns stand in braces; write {{{{ and }}}} for braces alone"
        ) from error
    for _, name, form, conversion in parts:
        if name == "" or form or conversion:
            raise InputError("--template: write a column's name in braces, and nothing else there")
    return [name for _, name, _, _ in parts if name is not None]


def _filled(template: str, row: Mapping[str, Any]) -> str | None:
    """The text, None where a column that it names has no value."""
    parts = []
    for text, name, _, _ in string.Formatter().parse(template):
        parts.append(text)
        if name is not None:
            value = _text(row.get(name))
            if value is None:
                return None
            parts.append(value)
    return "".join(parts)


def _text(value: Any) -> str | None:
    if value is None or isinstance(value, str):
        return value
    try:
        return orjson.dumps(value).decode()
    except TypeError as error:
        raise InputError(f"a value of type {type(value).__name__} is no prompt: {error}") from error


def _read_messages(text: str) -> Any:
    """Messages as CSV has them: JSON in a text; a text that is none is the prompt."""
    try:
        value = orjson.loads(text)
    except ValueError:
        return text
    return value if isinstance(value, list) else text


def _without_none(value: Any) -> Any:
    """A message of a Parquet file, where each has the fields of all."""
    if not isinstance(value, dict):
        return value
    return {key: one for key, one in value.items() if one is not None}
