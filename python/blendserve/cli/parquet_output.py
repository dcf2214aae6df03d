"""Result lines as a Parquet file: one row for each, with what is asked for most in columns."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import IO, Any

import orjson

from blendserve.batch.progress import usage_of
from blendserve.cli.carried import FIELD

_ROWS_AT_ONCE = 1024
_KINDS: Mapping[frozenset[type], str] = {
    frozenset({str}): "string",
    frozenset({int}): "int64",
    frozenset({float}): "float64",
    frozenset({int, float}): "float64",
    frozenset({bool}): "bool_",
}


def is_parquet(path: Path) -> bool:
    """Whether a result file is to be one, by its name."""
    return path.suffix.lower() in (".parquet", ".pq")


def write_parquet(results: Path, target: IO[bytes], carried: Sequence[str]) -> None:
    """Write the rows of a file of result lines. Carried columns of one type keep it; the values of
    others are JSON."""
    import pyarrow as pa
    from pyarrow import parquet

    kinds = {name: _kind(results, name) for name in carried}
    fields = [
        ("custom_id", pa.string()),
        ("status_code", pa.int32()),
        ("answer", pa.string()),
        ("embedding", pa.list_(pa.float32())),
        ("input_tokens", pa.int64()),
        ("output_tokens", pa.int64()),
        ("response", pa.string()),
        ("error", pa.string()),
    ]
    taken = {name for name, _ in fields}
    named = {name: f"input_{name}" if name in taken else name for name in carried}
    fields += [
        (named[name], getattr(pa, kind)() if kind else pa.string()) for name, kind in kinds.items()
    ]
    schema = pa.schema(fields)
    with parquet.ParquetWriter(target, schema) as writer:
        for group in _groups(results):
            rows = [_row(line) for line in group]
            for row, line in zip(rows, group, strict=True):
                values = line.get(FIELD) or {}
                row |= {named[n]: _value(values.get(n), kind) for n, kind in kinds.items()}
            writer.write_table(pa.Table.from_pylist(rows, schema=schema))


def answer_of(body: Mapping[str, Any]) -> str | None:
    """The text that a response body answers with; None for one without."""
    if isinstance(text := body.get("output_text"), str):
        return text
    try:
        if "choices" in body:
            first = body["choices"][0]
            text = first["message"]["content"] if "message" in first else first["text"]
        else:
            parts = [part for item in body["output"] for part in item.get("content") or ()]
            text = "".join(part["text"] for part in parts if part.get("type") == "output_text")
    except (KeyError, IndexError, TypeError, AttributeError):
        return None
    return text if isinstance(text, str) else None


def _row(line: Mapping[str, Any]) -> dict[str, Any]:
    response = line.get("response") or {}
    body = response.get("body") or {}
    usage = usage_of(body)
    return {
        "custom_id": line["custom_id"],
        "status_code": response.get("status_code"),
        "answer": answer_of(body),
        "embedding": _embedding(body),
        "input_tokens": usage.input_tokens,
        "output_tokens": usage.output_tokens,
        "response": orjson.dumps(body).decode() if body else None,
        "error": orjson.dumps(line["error"]).decode() if line.get("error") else None,
    }


def _embedding(body: Mapping[str, Any]) -> list[float] | None:
    """Of a line with one text; those of several are in the response."""
    data = body.get("data")
    if not isinstance(data, list) or len(data) != 1 or not isinstance(data[0], dict):
        return None
    vector = data[0].get("embedding")
    return vector if isinstance(vector, list) else None


def _groups(results: Path) -> Iterator[list[dict[str, Any]]]:
    group: list[dict[str, Any]] = []
    with results.open("rb") as lines:
        for line in lines:
            group.append(orjson.loads(line))
            if len(group) == _ROWS_AT_ONCE:
                yield group
                group = []
    if group:
        yield group


def _kind(results: Path, column: str) -> str | None:
    """The one type of a column's values; None for none, or several."""
    seen = frozenset(
        type(value) if type(value) is not int or -(2**63) <= value < 2**63 else object
        for group in _groups(results)
        for line in group
        if (value := (line.get(FIELD) or {}).get(column)) is not None
    )
    return _KINDS.get(seen)


def _value(value: Any, kind: str | None) -> Any:
    if value is None or kind is not None:
        return value
    return orjson.dumps(value).decode()
