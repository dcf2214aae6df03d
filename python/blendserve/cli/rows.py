"""Rows of a table as input: CSV, TSV, Parquet, a data set, JSON lines, or one prompt a line."""

from __future__ import annotations

import csv
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import orjson

from blendserve.batch.lines import iter_lines
from blendserve.cli.arrow import dataset_rows, parquet_rows
from blendserve.cli.batch_input import InputError
from blendserve.cli.sources import Source

PROMPT = "prompt"
"""The column of a plain list of prompts."""


@dataclass(frozen=True)
class Table:
    """Columns and rows of one source.

    columns: None where each row has its own. rows: None for a blank line. unit: what counts them,
    as the user finds them: "row" without the heading, or "line".
    """

    columns: list[str] | None
    rows: Iterator[dict[str, Any] | None]
    unit: str = "row"


def read_table(source: Source, path: Path, max_line_bytes: int) -> Table:
    """Open a source. path: its plain bytes; for a data set, its folder.

    Raises:
        InputError: now or while rows are read; names the source, the row and the remedy.
    """
    if source.format == "parquet":
        return Table(*parquet_rows(path, source.label))
    if source.format == "dataset":
        return Table(*dataset_rows(path))
    if source.format == "txt":
        return Table([PROMPT], _prompts(source.label, path, max_line_bytes), "line")
    if source.format == "jsonl":
        return Table(None, _objects(source.label, path, max_line_bytes), "line")
    return _delimited(source.label, path, "\t" if source.format == "tsv" else ",", max_line_bytes)


def _prompts(name: str, path: Path, max_line_bytes: int) -> Iterator[dict[str, Any] | None]:
    for number, data in _lines(name, path, max_line_bytes):
        try:
            yield {PROMPT: data.decode()} if data else None
        except UnicodeDecodeError as error:
            raise InputError(
                f"{name}, line {number} is not UTF-8; save the file as UTF-8"
            ) from error


def _objects(name: str, path: Path, max_line_bytes: int) -> Iterator[dict[str, Any] | None]:
    for number, data in _lines(name, path, max_line_bytes):
        try:
            row = orjson.loads(data) if data else None
        except ValueError as error:
            raise InputError(f"{name}, line {number} is not JSON: {error}") from error
        if row is not None and not isinstance(row, dict):
            raise InputError(f"{name}, line {number} is no JSON object of columns and values")
        yield row


def _lines(name: str, path: Path, max_line_bytes: int) -> Iterator[tuple[int, bytes]]:
    """Every line with its number from 1, blank ones as b""."""
    next_number = 1
    with path.open("rb") as stream:
        for line in iter_lines(stream, max_line_bytes):
            for blank in range(next_number, line.number):
                yield blank, b""
            next_number = line.number + 1
            if line.data is None:
                raise InputError(
                    f"{name}, line {line.number} has {line.size} bytes; at most {max_line_bytes} "
                    "are taken"
                )
            yield line.number, line.data


def _delimited(name: str, path: Path, delimiter: str, max_bytes: int) -> Table:
    csv.field_size_limit(max_bytes)
    reader = _records(name, path, delimiter)
    heading = next(reader, [])
    wrong = [column for column in heading if not column.strip() or heading.count(column) > 1]
    if not heading or wrong:
        raise InputError(
            f"{name} begins with {', '.join(heading)[:80]!r}; its first line must name each column "
            "once"
        )

    def rows() -> Iterator[dict[str, Any]]:
        for number, values in enumerate(reader, start=1):
            if len(values) != len(heading):
                raise InputError(
                    f"{name}, row {number} has {len(values)} values for {len(heading)} columns; "
                    "put values with commas or line breaks in quotes"
                )
            yield dict(zip(heading, values, strict=True))

    return Table(heading, rows())


def _records(name: str, path: Path, delimiter: str) -> Iterator[list[str]]:
    with path.open(encoding="utf-8-sig", newline="") as stream:
        reader = csv.reader(stream, delimiter=delimiter, strict=True)
        try:
            for values in reader:
                # A blank line is none of a table's.
                if values:
                    yield values
        except UnicodeDecodeError as error:
            raise InputError(f"{name} is not UTF-8 behind line {reader.line_num}") from error
        except csv.Error as error:
            raise InputError(f"{name}, line {reader.line_num}: {error}") from error
