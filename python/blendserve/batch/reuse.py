"""Answers of earlier batches that a new one may take: same custom_id, same body, same engine."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import orjson

from blendserve.batch.ids import request_line_id
from blendserve.batch.journal import Record
from blendserve.batch.lines import iter_lines
from blendserve.batch.rests import with_rests
from blendserve.batch.tables import BatchRow

_GROUP_RECORDS = 512
# JSON that can be read and not written, above all what is nested too deep: it is computed.
_ODD = (ValueError, TypeError, KeyError, RecursionError)

ContentOf = Callable[[str], Path]
"""Where the bytes of a file lie, by its id."""


def reused_records(
    content_of: ContentOf, row: BatchRow, earlier: Sequence[BatchRow], max_line_bytes: int
) -> Iterator[list[bytes]]:
    """Journal records for the lines of `row` that a batch of `earlier` has answered, in groups.

    Earlier batches whose input or output file is gone have nothing to give. Memory: about 150
    bytes per line of `row`, for the digests.
    """
    wanted = dict(_digests(content_of, row, max_line_bytes))
    for batch in earlier:
        if not wanted or batch.output_file_id is None:
            continue
        try:
            yield from _answers_of(content_of, row, batch, wanted, max_line_bytes)
        except FileNotFoundError:
            continue


def _answers_of(
    content_of: ContentOf,
    row: BatchRow,
    batch: BatchRow,
    wanted: dict[bytes, int],
    max_line_bytes: int,
) -> Iterator[list[bytes]]:
    """Takes out of `wanted` what is found."""
    assert batch.output_file_id is not None
    same: dict[str, bytes] = {}
    for digest, _, custom_id in _identities(content_of, batch, max_line_bytes):
        if digest in wanted:
            same[custom_id] = digest
    group: list[bytes] = []
    with open(content_of(batch.output_file_id), "rb") as answers:
        for raw in answers if same else ():
            try:
                line: dict[str, Any] = orjson.loads(raw)
                known = same.pop(line["custom_id"], None)
                index = wanted.get(known) if known is not None else None
                if known is None or index is None:
                    continue
                line["id"] = request_line_id(row.id, index)
                group.append(Record(index, "output", line).encode())
            except _ODD:
                continue
            del wanted[known]
            if len(group) == _GROUP_RECORDS:
                yield group
                group = []
    if group:
        yield group


def _digests(
    content_of: ContentOf, batch: BatchRow, max_line_bytes: int
) -> Iterator[tuple[bytes, int]]:
    for digest, index, _ in _identities(content_of, batch, max_line_bytes):
        yield digest, index


def _identities(
    content_of: ContentOf, batch: BatchRow, max_line_bytes: int
) -> Iterator[tuple[bytes, int, str]]:
    """(digest of custom_id and body, index, custom_id) of each request of a validated file."""
    with open(content_of(batch.input_file_id), "rb") as file:
        for index, line in enumerate(with_rests(iter_lines(file, max_line_bytes))):
            if line.data is None:
                continue
            try:
                entry = orjson.loads(line.data)
                canonical = orjson.dumps(
                    [entry["custom_id"], entry["body"]], option=orjson.OPT_SORT_KEYS
                )
            except _ODD:
                continue
            digest = hashlib.blake2b(canonical, digest_size=16).digest()
            yield digest, index, entry["custom_id"]
