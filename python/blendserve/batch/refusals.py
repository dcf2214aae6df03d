"""Lines that are answered while the file is checked, because no engine could answer them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from blendserve.batch.directory import fsync_folder
from blendserve.batch.executor import LineFault
from blendserve.batch.ids import request_line_id
from blendserve.batch.journal import Journal, Record

_GROUP_RECORDS = 512


@dataclass(frozen=True)
class RefusedLine:
    """A line with a good envelope and a body that can never run. `number` is its line's, from 1."""

    index: int
    number: int
    custom_id: str
    faults: Sequence[LineFault]


class RefusalJournal:
    """Puts refused lines into a batch's journal, which begins anew: a check that was cut short may
    have left one. Call it in a worker thread."""

    def __init__(self, batch_id: str, path: Path) -> None:
        self._batch_id = batch_id
        self._path = path
        self._group: list[bytes] = []
        self._journal: Journal | None = None
        self.discard()

    def add(self, refused: RefusedLine) -> None:
        """Durable once `close` returns. OSError where it cannot be."""
        self._group.append(refusal_record(self._batch_id, refused).encode())
        if len(self._group) == _GROUP_RECORDS:
            self._flush()

    def close(self) -> None:
        try:
            self._flush()
        finally:
            if self._journal is not None:
                self._journal.close()

    def discard(self) -> None:
        """The file is refused as a whole, or checked from its beginning."""
        if self._path.exists():
            self._path.unlink()
            fsync_folder(self._path.parent)

    def _flush(self) -> None:
        if not self._group:
            return
        if self._journal is None:
            self._journal = Journal(self._path)
        self._journal.append(self._group)
        self._group = []


def refusal_record(batch_id: str, refused: RefusedLine) -> Record:
    """The finished line of the error file: what the server would have answered online."""
    line_id = request_line_id(batch_id, refused.index)
    first = refused.faults[0]
    error = {
        "message": " ".join(fault.message for fault in refused.faults),
        "type": "invalid_request_error",
        "param": first.param,
        "code": first.code,
    }
    response = {"status_code": 400, "request_id": line_id, "body": {"error": error}}
    line = {
        "id": line_id,
        "custom_id": refused.custom_id,
        "response": response,
        "error": None,
    }
    return Record(refused.index, "error", line)
