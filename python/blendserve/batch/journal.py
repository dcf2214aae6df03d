"""The result journal: the truth about which lines of a batch are done.

One JSON record per finished line, appended and synced before the line is counted. A record is
valid if it ends with a newline, parses, and has the checksum that stands in it as its last field,
`crc32` (eight hex digits, over the record without that field); the first valid record of an index
wins. A process that dies while it writes leaves at most one unterminated record, which `Journal`
cuts off. Records of earlier releases have no checksum: they count if their custom_id is that of
their line in the input.

A second kind of record marks suspects: lines that were with the engine when it died.
"""

from __future__ import annotations

import logging
import os
import re
import threading
import zlib
from array import array
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import orjson

from blendserve.batch.directory import FILE_MODE, fsync_folder
from blendserve.batch.progress import Usage, usage_of
from blendserve.batch.rests import with_rests

logger = logging.getLogger(__name__)

RecordKind = Literal["output", "error"]
CustomIdOf = Callable[[int], str | None]
"""The custom_id of a line by its index, as it stands in the input; None if nobody can tell."""

_TAIL_BLOCK_BYTES = 64 * 1024
_CHECKSUM = re.compile(rb',"crc32":"([0-9a-f]{8})"}\n\Z')
_CHECKSUM_BYTES = len(b',"crc32":"01234567"}\n')
_FIELDS = {"index", "kind", "line"}


@dataclass(frozen=True)
class Record:
    """A finished line: its index, the file it belongs to, and the final line of that file."""

    index: int
    kind: RecordKind
    line: dict[str, Any]

    def encode(self) -> bytes:
        """The record as it stands in the journal. TypeError if the line is not proper JSON."""
        return _with_checksum({"index": self.index, "kind": self.kind, "line": self.line})

    @property
    def usage(self) -> Usage:
        response = self.line.get("response")
        return usage_of(response.get("body")) if isinstance(response, dict) else Usage()


@dataclass(frozen=True)
class Suspect:
    """A line that was with the engine when it died; every death adds one more such record."""

    index: int

    def encode(self) -> bytes:
        """The record as it stands in the journal."""
        return _with_checksum({"index": self.index, "kind": "suspect"})


@dataclass
class Tally:
    """Which lines are done, and what they add up to: one byte of memory per line.

    `suspects` are the lines not done that were with the engine when it died, with how often.
    """

    total: int
    completed: int = 0
    failed: int = 0
    usage: Usage = field(default_factory=Usage)
    suspects: Counter[int] = field(default_factory=Counter)

    def __post_init__(self) -> None:
        self._done = bytearray(self.total)

    def add(self, record: Record) -> bool:
        """Counts the record, unless its line is done already (then False)."""
        if self._done[record.index]:
            return False
        self._done[record.index] = 1
        self.suspects.pop(record.index, None)
        if record.kind == "output":
            self.completed += 1
        else:
            self.failed += 1
        self.usage = self.usage.plus(record.usage)
        return True

    def suspect(self, index: int) -> None:
        """The engine died with this line, which is not done."""
        if not self._done[index]:
            self.suspects[index] += 1

    def is_done(self, index: int) -> bool:
        return self._done[index] == 1

    @property
    def remaining(self) -> int:
        """How many lines are not done."""
        return self.total - self.completed - self.failed

    def pending(self) -> Sequence[int]:
        """The indexes of all lines that are not done, suspects among them."""
        flags = with_rests(enumerate(self._done))
        return array("Q", (index for index, done in flags if not done))

    def next_lines(self, suspects_at_once: int) -> Sequence[int]:
        """What may run together next: all lines that are above suspicion; when they are done,
        lines that saw the engine die once, in small groups; and those that saw more, one by one.
        """
        if not self.suspects:
            return self.pending()
        trusted = array("Q", (index for index in self.pending() if index not in self.suspects))
        if trusted:
            return trusted
        once = sorted(index for index, deaths in self.suspects.items() if deaths == 1)
        return once[:suspects_at_once] or [min(self.suspects)]


class Journal:
    """An open journal. Creating it repairs a torn tail, and makes durable what a process that was
    killed has written; `append` returns once all is durable.
    """

    def __init__(self, path: Path) -> None:
        self._fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, FILE_MODE)
        # Appending happens in a worker thread; closing must not pull the file away from it.
        self._lock = threading.Lock()
        try:
            self._durable_bytes = _cut_torn_tail(self._fd)
            if self._durable_bytes:
                os.fsync(self._fd)
            fsync_folder(path.parent)
        except OSError:
            self.close()
            raise

    def append(self, records: Sequence[bytes]) -> None:
        """Writes and syncs encoded records. On OSError none is there, and none may be counted."""
        data = memoryview(b"".join(records))
        with self._lock:
            position = self._durable_bytes
            try:
                while data:
                    written = os.pwrite(self._fd, data, position)
                    position += written
                    data = data[written:]
                os.fdatasync(self._fd)
            except OSError:
                # Half a group would otherwise stand there as results that nobody counted.
                os.ftruncate(self._fd, self._durable_bytes)
                raise
            self._durable_bytes = position

    @property
    def durable_bytes(self) -> int:
        """How much of the file is on disk, and counts."""
        return self._durable_bytes

    def close(self) -> None:
        with self._lock:
            if self._fd >= 0:
                os.close(self._fd)
                self._fd = -1


def read_records(
    path: Path, total: int, custom_id_of: CustomIdOf | None = None
) -> Iterator[Record]:
    """The results in a journal in the order of their writing, one in memory at a time.

    `total` is the number of lines of the batch. A missing journal has no records.
    """
    entries = _entries(path, total, custom_id_of)
    return (entry for entry in entries if isinstance(entry, Record))


def read_records_in_order(
    path: Path, total: int, custom_id_of: CustomIdOf | None = None
) -> Iterator[Record]:
    """The first result of each line, by its place in the input: 8 bytes of memory per line."""
    places = array("Q", bytes(8 * total))
    end = 0
    for raw, entry in _raw_entries(path, total, custom_id_of):
        if isinstance(entry, Record) and not places[entry.index]:
            places[entry.index] = end + 1
        end += len(raw)
    if not end:
        return
    with open(path, "rb") as file:
        for place in places:
            if place:
                file.seek(place - 1)
                entry = _decode(file.readline(), total, custom_id_of)
                assert isinstance(entry, Record)
                yield entry


def read_span(path: Path, total: int, start: int, end: int) -> Iterator[tuple[Record | None, int]]:
    """The entries between two places of a journal, in bytes, each with the place behind it; None
    for what is no result. `start` is the beginning or a place that this gave before."""
    place = start
    for raw, entry in _raw_entries(path, total, None, start):
        place += len(raw)
        if place > end:
            return
        yield (entry if isinstance(entry, Record) else None), place


def tally_journal(path: Path, total: int, custom_id_of: CustomIdOf | None = None) -> Tally:
    """What a journal says is done."""
    tally = Tally(total)
    for entry in _entries(path, total, custom_id_of):
        if isinstance(entry, Record):
            tally.add(entry)
        else:
            tally.suspect(entry.index)
    return tally


def _entries(path: Path, total: int, custom_id_of: CustomIdOf | None) -> Iterator[Record | Suspect]:
    entries = _raw_entries(path, total, custom_id_of)
    return (entry for _, entry in entries if entry is not None)


def _raw_entries(
    path: Path, total: int, custom_id_of: CustomIdOf | None, start: int = 0
) -> Iterator[tuple[bytes, Record | Suspect | None]]:
    """All whole lines of a journal; None stands for one that cannot be read."""
    if not path.exists():
        return
    with open(path, "rb") as file:
        file.seek(start)
        for raw in with_rests(file):
            if not raw.endswith(b"\n"):
                return
            entry = _decode(raw, total, custom_id_of)
            if entry is None:
                # Damage from outside; the line counts as not done and is computed again.
                logger.warning("journal %s has an unreadable record, which is ignored", path.name)
            yield raw, entry


def _with_checksum(record: dict[str, Any]) -> bytes:
    data = orjson.dumps(record)
    return b'%s,"crc32":"%08x"}\n' % (data[:-1], zlib.crc32(data))


def _decode(raw: bytes, total: int, custom_id_of: CustomIdOf | None) -> Record | Suspect | None:
    checksum = _CHECKSUM.search(raw, max(0, len(raw) - _CHECKSUM_BYTES))
    if checksum is not None:
        raw = raw[:-_CHECKSUM_BYTES] + b"}"
        if zlib.crc32(raw) != int(checksum[1], 16):
            return None
    try:
        entry = orjson.loads(raw)
    except orjson.JSONDecodeError:
        return None
    # A checksum whose own name is damaged would be a field that no record has.
    if not isinstance(entry, dict) or not entry.keys() <= _FIELDS:
        return None
    index, kind, line = entry.get("index"), entry.get("kind"), entry.get("line")
    if type(index) is not int or not 0 <= index < total:
        return None
    if kind == "suspect":
        return Suspect(index)
    if not isinstance(line, dict):
        return None
    if kind != "output" and kind != "error":
        return None
    if checksum is None and custom_id_of is not None:
        custom_id = custom_id_of(index)
        if custom_id is not None and custom_id != line.get("custom_id"):
            return None
    return Record(index, kind, line)


def _cut_torn_tail(descriptor: int) -> int:
    """Truncates after the last newline and returns the size that is left, in bytes."""
    size = os.fstat(descriptor).st_size
    end = size
    while end > 0:
        start = max(0, end - _TAIL_BLOCK_BYTES)
        newline = os.pread(descriptor, end - start, start).rfind(b"\n")
        if newline >= 0:
            end = start + newline + 1
            break
        end = start
    if end < size:
        os.ftruncate(descriptor, end)
        os.fsync(descriptor)
    return end
