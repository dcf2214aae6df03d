"""Reading an input file line by line, and by index, with nothing but offsets in memory."""

from __future__ import annotations

import os
from array import array
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

from blendserve.batch.executor import BatchLine
from blendserve.batch.line_parser import read_entry
from blendserve.batch.rests import with_rests

_UTF8_BOM = b"\xef\xbb\xbf"


@dataclass(frozen=True)
class RawLine:
    """A request line as it stands in the file.

    `number` counts physical lines from 1, as an editor shows them. `data` has no byte order mark
    and no surrounding whitespace, and is None for a line above the size limit.
    """

    number: int
    offset: int
    size: int
    data: bytes | None


def iter_lines(file: BinaryIO, max_line_bytes: int) -> Iterator[RawLine]:
    """All lines that are not blank. Reads at most `max_line_bytes` of any one into memory."""
    offset = 0
    number = 0
    while chunk := file.readline(max_line_bytes + 2):
        number += 1
        start = offset
        offset += len(chunk)
        fits = chunk.endswith(b"\n") or len(chunk) <= max_line_bytes
        while not fits and not chunk.endswith(b"\n"):
            chunk = file.readline(1 << 20)
            if not chunk:
                break
            offset += len(chunk)
        if not fits:
            yield RawLine(number, start, offset - start, None)
            continue
        if number == 1 and chunk.startswith(_UTF8_BOM):
            start += len(_UTF8_BOM)
            chunk = chunk[len(_UTF8_BOM) :]
        data = chunk.strip()
        if data:
            yield RawLine(number, start, len(chunk), data)


class FileLineSource:
    """The requests of one input file by index: 16 bytes of memory per line (a `LineSource`).

    Reads with pread, so any number of threads may share it. Close it when the job ends.
    """

    def __init__(self, path: Path, max_line_bytes: int) -> None:
        self.path = path
        self.max_line_bytes = max_line_bytes
        self._offsets = array("Q")
        self._sizes = array("Q")
        with open(path, "rb") as file:
            for line in with_rests(iter_lines(file, max_line_bytes)):
                self._offsets.append(line.offset)
                self._sizes.append(line.size)
        self._fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)

    def __len__(self) -> int:
        return len(self._offsets)

    def read(self, index: int) -> BatchLine:
        """The line at `index`; the file was validated, so its envelope is known to be there.

        A body without a model says nothing of it: engines take that for the one they serve.
        """
        data = os.pread(self._fd, self._sizes[index], self._offsets[index])
        fields = read_entry(data.strip()).fields
        body = fields["body"]
        if body.get("model") is None:
            body.pop("model", None)
        return BatchLine(index, fields["custom_id"], fields["url"], body)

    def custom_id(self, index: int) -> str:
        return self.read(index).custom_id

    def close(self) -> None:
        if self._fd >= 0:
            os.close(self._fd)
            self._fd = -1


class IdsOfInput:
    """The custom_ids of an input file by index; it is read at the first question. Close it.

    None for every line of a file that is gone.
    """

    def __init__(self, path: Path, max_line_bytes: int) -> None:
        self._path = path
        self._max_line_bytes = max_line_bytes
        self._source: FileLineSource | None = None

    def __call__(self, index: int) -> str | None:
        if self._source is None:
            if not self._path.exists():
                return None
            self._source = FileLineSource(self._path, self._max_line_bytes)
        return self._source.custom_id(index)

    def __enter__(self) -> IdsOfInput:
        return self

    def __exit__(self, *_: object) -> None:
        if self._source is not None:
            self._source.close()
