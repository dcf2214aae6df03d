"""Turning a journal into the output and error files of a batch that ends.

Every step may be repeated: ids are derived from the batch, and files and batch change only in the
last step, one transaction of the store's. A crash at any point leaves either the batch open, to be
published again, or all of it done.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import orjson

from blendserve.batch.directory import Draft
from blendserve.batch.executor import LineError
from blendserve.batch.ids import derived_file_id, request_line_id
from blendserve.batch.job import unanswered
from blendserve.batch.journal import (
    CustomIdOf,
    Record,
    RecordKind,
    Tally,
    read_records,
    read_records_in_order,
)
from blendserve.batch.lines import FileLineSource
from blendserve.batch.rests import with_rests
from blendserve.batch.tables import BatchRow, FileRow

_LINE_ENDS = (
    ("\u0085".encode(), rb"\u0085"),
    ("\u2028".encode(), rb"\u2028"),
    ("\u2029".encode(), rb"\u2029"),
)


@dataclass(frozen=True)
class Results:
    """The result files (at most one of each kind), still drafts, and what they hold."""

    output: tuple[FileRow, Draft] | None
    error: tuple[FileRow, Draft] | None
    tally: Tally


class JournalIncomplete(Exception):
    """A batch that was thought to be at its end has lines without a result."""


def write_results(
    batch: BatchRow,
    input_path: Path,
    journal: Path,
    outputs: Draft,
    errors: Draft,
    *,
    max_line_bytes: int,
    unfinished: LineError | None,
    now: Callable[[], int],
    in_order: bool = False,
    custom_id_of: CustomIdOf | None = None,
) -> Results:
    """Fills the drafts of a validated batch; lines without a result get `unfinished`.

    Without `unfinished` every line must have one: JournalIncomplete.

    `in_order` sorts each file by the lines' places in the input; those without a result come last.

    Blocking: call it in a worker thread. OSError when the disk is full.
    """
    total = batch.total or 0
    tally = Tally(total)
    writers = {
        "output": _ResultWriter(batch, "output", outputs),
        "error": _ResultWriter(batch, "error", errors),
    }
    read = read_records_in_order if in_order else read_records
    for record in read(journal, total, custom_id_of):
        if tally.add(record):
            writers[record.kind].write(record)
    if unfinished is None and tally.remaining:
        raise JournalIncomplete
    if unfinished is not None:
        for record in _unfinished_records(batch, input_path, tally, max_line_bytes, unfinished):
            tally.add(record)
            writers[record.kind].write(record)
    return Results(writers["output"].result(now()), writers["error"].result(now()), tally)


def _unfinished_records(
    batch: BatchRow, input_path: Path, tally: Tally, max_line_bytes: int, error: LineError
) -> Iterator[Record]:
    pending = tally.pending()
    if not pending or not input_path.exists():
        # Without the input nobody knows the ids of what is left; the batch says so in its errors.
        return
    source = FileLineSource(input_path, max_line_bytes)
    try:
        for index in with_rests(pending):
            line_id = request_line_id(batch.id, index)
            yield unanswered(index, line_id, source.custom_id(index), error)
    finally:
        source.close()


def result_line(record: Record) -> bytes:
    """The line of a result file, with its newline.

    JSON allows some characters in strings that many readers take for the end of a line; they are
    escaped. Those below U+0020 always are.
    """
    return one_line(record.line)


def one_line(entry: dict[str, Any]) -> bytes:
    """A JSON object as the only line that any reader finds in it."""
    data = orjson.dumps(entry, option=orjson.OPT_APPEND_NEWLINE)
    for raw, escaped in _LINE_ENDS:
        data = data.replace(raw, escaped)
    return data


class _ResultWriter:
    def __init__(self, batch: BatchRow, kind: RecordKind, draft: Draft) -> None:
        self._batch = batch
        self._kind = kind
        self._draft = draft
        self._digest = hashlib.sha256()
        self._size_bytes = 0

    def write(self, record: Record) -> None:
        data = result_line(record)
        self._digest.update(data)
        self._size_bytes += len(data)
        self._draft.file.write(data)

    def result(self, now: int) -> tuple[FileRow, Draft] | None:
        """The file's row and draft; None if there was nothing to put into it."""
        if self._size_bytes == 0:
            return None
        lifetime = self._batch.output_expires_after_seconds
        row = FileRow(
            id=derived_file_id(self._batch.id, self._kind),
            tenant=self._batch.tenant,
            purpose="batch_output",
            filename=f"{self._batch.id}_{self._kind}.jsonl",
            size_bytes=self._size_bytes,
            sha256=self._digest.hexdigest(),
            created_at=now,
            expires_at=None if lifetime is None else now + lifetime,
        )
        return row, self._draft
