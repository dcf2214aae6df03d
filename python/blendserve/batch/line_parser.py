"""One line of an input file, read so that only an unreadable envelope is anybody else's matter.

orjson reads nearly every line. It refuses some that others write and take: NaN and Infinity, halves
of surrogate pairs, numbers beyond a double, and nesting beyond 1,024 levels. Their envelope can be
read all the same, so that such a line is answered on its own.
"""

from __future__ import annotations

import json
import re
from dataclasses import dataclass
from typing import Any

import orjson

from blendserve.batch.executor import LineFault
from blendserve.batch.rests import with_rests

MAX_BODY_DEPTH = 200
"""Levels of lists and objects in a body. What handles bodies later (orjson's writer, Python's json,
pydantic) ends at 254 to 1,000 of them."""

# Each escape of a string as one match, so that the backslash of `\\ud83d` is never taken for the
# beginning of another. A pair is one match too.
_ESCAPE = re.compile(
    rb"\\(?:u[dD][89abAB][0-9a-fA-F]{2}\\u[dD][c-fC-F][0-9a-fA-F]{2}|u[0-9a-fA-F]{4}|.)", re.DOTALL
)
_HALF = re.compile(rb"\\u[dD][89a-fA-F][0-9a-fA-F]{2}\Z")
_STRUCTURE = re.compile(r'"[^"\\]*(?:\\.[^"\\]*)*"|[{}\[\],:]', re.DOTALL)
_OPENER = {"}": "{", "]": "["}
_MAX_DIGITS = 20
_NESTED = frozenset({dict, list})


class UnreadableLine(ValueError):
    """The line is not a JSON object in UTF-8; says where."""


@dataclass(frozen=True)
class Entry:
    """A line's fields.

    `body_fault` tells why the body was not read; then `body` is an empty object or list.
    `broken_id`: the custom_id holds half of a surrogate pair. In the body such a half is read as
    U+FFFD.
    """

    fields: dict[str, Any]
    body_fault: LineFault | None = None
    broken_id: bool = False


def read_entry(data: bytes) -> Entry:
    """The envelope and, where it can be read, the body. Raises UnreadableLine."""
    try:
        return Entry(_object(orjson.loads(data)))
    except orjson.JSONDecodeError as error:
        return _read_odd(data, error)


def is_too_deep(body: dict[str, Any]) -> bool:
    """Whether a body is nested deeper than that."""
    # Without recursion, and with one pass in C where a list is a prompt of token ids.
    level: list[Any] = [body]
    for _ in range(MAX_BODY_DEPTH):
        members = [one.values() if type(one) is dict else one for one in level]
        level = [
            inner
            for values in members
            if not _NESTED.isdisjoint(map(type, values))
            for inner in values
            if type(inner) in _NESTED
        ]
        if not level:
            return False
    return True


def too_deep(param: str) -> LineFault:
    return LineFault(
        "nesting_too_deep",
        f"Lists and objects are nested more than {MAX_BODY_DEPTH} levels deep.",
        param,
    )


def _read_odd(data: bytes, error: orjson.JSONDecodeError) -> Entry:
    try:
        data.decode("utf-8")
    except UnicodeDecodeError as bad:
        raise UnreadableLine(
            f"The line is not UTF-8 (byte {bad.start + 1} of the line)."
        ) from error
    whole = _without_halves(data, rb"\ufffd")
    if whole == data:
        return _read_lax(data)
    entry = _read_lax(whole)
    other = _read_lax(_without_halves(data, b"?"))
    broken = entry.fields.get("custom_id") != other.fields.get("custom_id")
    return Entry(entry.fields, entry.body_fault, broken)


def _without_halves(data: bytes, instead: bytes) -> bytes:
    return _ESCAPE.sub(lambda match: instead if _HALF.match(match[0]) else match[0], data)


def _read_lax(data: bytes) -> Entry:
    text = data.decode("utf-8")
    try:
        # NaN and numbers beyond a double are found in the body later, with their places.
        return Entry(_object(json.loads(text, parse_int=_as_orjson_reads)))
    except json.JSONDecodeError as error:
        raise UnreadableLine(
            f"The line is not valid JSON: {error.msg} (column {error.colno})."
        ) from error
    except RecursionError:
        return _read_deep(text)


def _as_orjson_reads(digits: str) -> int | float:
    if len(digits) <= _MAX_DIGITS and -(2**63) <= (value := int(digits)) < 2**64:
        return value
    return float(digits)


def _read_deep(text: str) -> Entry:
    """The fields of an object that is nested too deep to be read; where it is, they are empty."""
    fields: dict[str, Any] = {}
    fault = None
    for key, value in _members(text):
        try:
            name = json.loads(key)
            try:
                fields[name] = json.loads(value, parse_int=_as_orjson_reads)
            except RecursionError:
                fields[name] = {} if value.startswith("{") else []
                if name == "body":
                    fault = too_deep("body")
        except json.JSONDecodeError as error:
            raise UnreadableLine(f"The line is not valid JSON: {error.msg}.") from error
    return Entry(fields, fault)


def _members(text: str) -> list[tuple[str, str]]:
    """The members of the outermost object as text. Follows brackets and strings, nothing else."""
    stack: list[str] = []
    members: list[tuple[str, str]] = []
    key = ""
    start = end = 0
    for match in with_rests(_STRUCTURE.finditer(text)):
        mark = match[0]
        if mark in "{[":
            stack.append(mark)
            start = match.end() if len(stack) == 1 else start
        elif mark in "}]" and (not stack or stack.pop() != _OPENER[mark]):
            raise UnreadableLine(
                f"The line is not valid JSON: {mark} closes nothing (column {match.start() + 1})."
            )
        elif len(stack) == 1 and mark == ":":
            key, start = text[start : match.start()].strip(), match.end()
        if (len(stack) == 1 and mark == ",") or not stack:
            members.append((key, text[start : match.start()].strip()))
            start = end = match.end()
        if not stack:
            break
    if stack or not text.startswith("{") or text[end:].strip():
        raise UnreadableLine("The line is not valid JSON: its brackets do not match.")
    return members


def _object(value: Any) -> dict[str, Any]:
    if not isinstance(value, dict):
        raise UnreadableLine("The line is JSON, but not an object.")
    return value
