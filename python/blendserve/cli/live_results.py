"""Answers readable while a job runs: files that grow beside the final ones' places.

The final files appear whole, at the end; these are for looking on. They are made again from the
journal at every start, so they never hold a line that is not durable.
"""

from __future__ import annotations

import os
import threading
from collections.abc import Sequence
from pathlib import Path
from typing import BinaryIO

from blendserve.batch.journal import Record, read_records
from blendserve.batch.publication import result_line


class LiveResults:
    """`OUTPUT.partial` and `ERRORS.partial`. Methods may be called from any thread."""

    def __init__(self, output: Path, errors: Path) -> None:
        self._paths = {
            "output": output.with_name(output.name + ".partial"),
            "error": errors.with_name(errors.name + ".partial"),
        }
        self._files: dict[str, BinaryIO] = {}
        self._lock = threading.Lock()

    @property
    def paths(self) -> list[Path]:
        return list(self._paths.values())

    def restore(self, journal: Path, total: int) -> None:
        """Begin with what an earlier run has finished."""
        for record in read_records(journal, total):
            self._write(record)
        self._flush()

    def add(self, _batch_id: str, records: Sequence[Record]) -> None:
        """Append a group of results. OSError if the disk is full."""
        with self._lock:
            for record in records:
                self._write(record)
            self._flush()

    def close(self) -> None:
        """No more comes; the files stay for whoever wants to look."""
        with self._lock:
            for file in self._files.values():
                file.close()
            self._files.clear()

    def remove(self) -> None:
        """The final files have taken their place."""
        self.close()
        for path in self._paths.values():
            path.unlink(missing_ok=True)

    def _write(self, record: Record) -> None:
        file = self._files.get(record.kind)
        if file is None:
            file = self._files[record.kind] = _private(self._paths[record.kind])
        file.write(result_line(record))

    def _flush(self) -> None:
        for file in self._files.values():
            file.flush()


def _private(path: Path) -> BinaryIO:
    """The file for writing from its beginning, for its owner alone: it holds prompts' answers."""
    path.unlink(missing_ok=True)
    return os.fdopen(
        os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600), "wb"
    )
