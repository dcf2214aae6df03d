"""Reading one line: what JSON's writers make in practice, and what truly is no JSON."""

from __future__ import annotations

import json
import math
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from blendserve.batch import content_faults
from blendserve.batch.line_parser import MAX_BODY_DEPTH, UnreadableLine, is_too_deep, read_entry

JSON_VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(st.characters(codec=None)),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(), inner, max_size=4),
    max_leaves=12,
)


def line(body: str, rest: str = "") -> bytes:
    return f'{{"custom_id": "a", "url": "/v1/completions", "body": {body}{rest}}}'.encode()


def mended(value: Any) -> Any:
    """As a reader that knows no halves of pairs, and no integers beyond 64 bits, has it."""
    if isinstance(value, str):
        return value.encode("utf-16-le", "surrogatepass").decode("utf-16-le", "replace")
    if isinstance(value, list):
        return [mended(item) for item in value]
    if isinstance(value, dict):
        return {mended(key): mended(item) for key, item in value.items()}
    if type(value) is int and not -(2**63) <= value < 2**64:
        return float(value)
    return None if value != value else value


@given(JSON_VALUES)
def test_whatever_pythons_json_writes_is_read(value: Any) -> None:
    entry = read_entry(line(json.dumps({"x": value})))
    assert entry.body_fault is None
    assert mended(entry.fields["body"]) == mended({"x": value})
    assert entry.fields["custom_id"] == "a"
    assert not entry.broken_id


@pytest.mark.parametrize("number", ["NaN", "Infinity", "-Infinity", "1e400", "9" * 5_000])
def test_a_number_that_json_does_not_have_is_read_as_one_that_is_not_finite(number: str) -> None:
    body = read_entry(line(f'{{"temperature": {number}, "n": 2}}')).fields["body"]
    assert not math.isfinite(body["temperature"])
    assert body["n"] == 2


def test_half_a_pair_is_read_as_the_replacement_character_and_a_pair_is_kept() -> None:
    text = r'{"prompt": "a\ud83d b\\ud83d c\ud83d\ude00 d\ude00\ud83d"}'
    prompt = read_entry(line(text)).fields["body"]["prompt"]
    assert prompt == "a\ufffd b\\ud83d c\N{GRINNING FACE} d\ufffd\ufffd"


def test_half_a_pair_in_a_custom_id_is_told() -> None:
    halved = line(r'{"prompt": "\ud83d"}').replace(b'"a"', rb'"a\udc00"')
    assert read_entry(halved).broken_id
    real = line(r'{"prompt": "\ud83d"}').replace(b'"a"', '"a\ufffd"'.encode())
    assert not read_entry(real).broken_id


@pytest.mark.parametrize("depth", [990, 1_024, 5_000, 200_000])
def test_the_envelope_of_a_body_nested_too_deep_is_read(depth: int) -> None:
    nested = "[" * depth + "]" * depth
    data = line(f'{{"prompt": "}}]", "x": {nested}}}', ', "more": [1, {"a": ","}]')
    entry = read_entry(data)
    assert entry.fields["custom_id"] == "a"
    assert entry.fields["url"] == "/v1/completions"
    assert entry.fields["more"] == [1, {"a": ","}]
    if depth > 1_024:
        assert entry.body_fault is not None
        assert entry.body_fault.code == "nesting_too_deep"
        assert entry.fields["body"] == {}


def test_of_a_key_that_stands_twice_the_last_counts_however_it_is_read() -> None:
    nested = "[" * 3_000 + "]" * 3_000
    for body in ('{"n": 1}', '{"n": NaN}', f'{{"x": {nested}}}'):
        data = line(body, ', "url": "/v1/embeddings"')
        assert read_entry(data).fields["url"] == "/v1/embeddings"


DEEP = b"[" * 3_000


@pytest.mark.parametrize(
    ("data", "said"),
    [
        (b"{nope", "column 2"),
        (b'{"a": 1,}', "column"),
        (b'{"a": 1} {}', "column 10"),
        (b"{'a': 1}", "column 2"),
        (b'{"a": "\t"}', "column 8"),
        (b'{"a": NaN', "column 10"),
        (b'{"a": nan}', "column 7"),
        (b'{"a": "\xff"}', "not UTF-8 (byte 8"),
        (b'{"a": "\xed\xa0\xbd"}', "not UTF-8 (byte 8"),
        (b'{"a": ' + DEEP, "brackets do not match"),
        (b'{"a": ' + DEEP + b"]" * 3_000 + b"]}", "closes nothing"),
        (b'{"a": ' + DEEP + b"]" * 3_000 + b"} {}", "brackets do not match"),
        (b'{"a": ' + DEEP + b"]" * 3_000 + b", b: 1}", "not valid JSON"),
        (b'{"a": ' + DEEP + b"]" * 2_999 + b"}}", "closes nothing"),
        (DEEP + b"]" * 3_000, "not"),
        (b"[1, NaN]", "not an object"),
        (b"17", "not an object"),
        (b"null", "not an object"),
        (b'"a"', "not an object"),
        (b"\x00", "column 1"),
    ],
)
def test_what_is_no_json_object_is_told_with_its_place(data: bytes, said: str) -> None:
    with pytest.raises(UnreadableLine, match=said.replace("(", r"\(")):
        read_entry(data)


@pytest.mark.parametrize("wrap", [lambda value: [value, 1], lambda value: {"k": value, "l": "m"}])
@pytest.mark.parametrize(("depth", "deep"), [(MAX_BODY_DEPTH, False), (MAX_BODY_DEPTH + 1, True)])
def test_lines_and_online_bodies_may_be_equally_deep(wrap: Any, depth: int, deep: bool) -> None:
    value: Any = []
    for _ in range(depth - 2):
        value = wrap(value)
    body = {"short": [1, 2, 3], "long": value}
    assert is_too_deep(body) is deep
    assert [fault.code for fault in content_faults(body)] == ["nesting_too_deep"] * deep
