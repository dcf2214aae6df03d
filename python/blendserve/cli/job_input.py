"""All inputs of ``run-batch`` as one file of requests, and where each of its lines came from."""

from __future__ import annotations

import bisect
import contextlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, Any

import orjson

from blendserve.batch.lines import iter_lines
from blendserve.cli.batch_input import InputError, Spool, path_of, plain_file, spool
from blendserve.cli.carried import Carried, CarryWriter
from blendserve.cli.row_mapping import RowMapping, check_columns
from blendserve.cli.rows import read_table
from blendserve.cli.sources import Source
from blendserve.cli.unpack import BLOCK_BYTES

_UTF8_BOM = b"\xef\xbb\xbf"


@dataclass
class Places:
    """Which source a line of the whole has come from.

    starts: lines before each source. names, units: see `Source` and `Table`.
    """

    starts: list[int] = field(default_factory=list)
    names: list[str] = field(default_factory=list)
    units: list[str] = field(default_factory=list)

    def add(self, lines_before: int, name: str, unit: str) -> None:
        self.starts.append(lines_before)
        self.names.append(name)
        self.units.append(unit)

    def __call__(self, number: int) -> str:
        """`line 7`; of several sources, `b.csv, row 7`."""
        at = max(bisect.bisect_left(self.starts, number) - 1, 0)
        place = f"{self.units[at]} {number - self.starts[at]}"
        return place if len(self.names) == 1 else f"{self.names[at]}, {place}"


@dataclass(frozen=True)
class JobInput:
    """name: as a message begins with it. carried: columns for the results, if there are any."""

    path: Path
    name: str
    places: Places
    carried: Carried | None = None


@contextlib.contextmanager
def job_input(
    sources: Sequence[Source],
    mapping: RowMapping,
    carry: Sequence[str],
    folder: Path,
    max_line_bytes: int,
) -> Iterator[JobInput]:
    """The requests of all sources, one behind the other; `folder` has room for a copy.

    Raises:
        InputError: a source cannot be read, or a column is missing.
    """
    name = sources[0].label if len(sources) == 1 else f"the input of {len(sources)} files"
    places = Places()
    if len(sources) == 1 and not carry and _holds_requests(sources[0], mapping):
        places.add(0, name, "line")
        with plain_file(sources[0].name, folder) as plain:
            yield JobInput(plain, name, places)
        return
    with spool(folder) as file, contextlib.ExitStack() as stack:
        writer = CarryWriter(stack.enter_context(spool(folder)), carry) if carry else None
        whole = _Whole(file, folder, mapping, writer, max_line_bytes)
        for source in sources:
            places.add(whole.lines, source.label, whole.add(source))
        file.flush()
        carried = writer.carried() if writer is not None else None
        yield JobInput(path_of(file), name, places, carried)


def _holds_requests(source: Source, mapping: RowMapping) -> bool:
    return source.format == "jsonl" and not mapping.given


class _Whole:
    """Writes one source after the other."""

    def __init__(
        self,
        file: IO[bytes],
        folder: Path,
        mapping: RowMapping,
        carry: CarryWriter | None,
        max_line_bytes: int,
    ) -> None:
        self._sink = Spool(file, folder)
        self._folder = folder
        self._mapping = mapping
        self._carry = carry
        self._max_line_bytes = max_line_bytes
        self.lines = self._rows = 0

    def add(self, source: Source) -> str:
        """Returns what counts its lines: "line" or "row"."""
        with contextlib.ExitStack() as stack:
            if source.format == "dataset":
                path = Path(source.name)
            else:
                path = stack.enter_context(plain_file(source.name, self._folder))
            try:
                if not _holds_requests(source, self._mapping):
                    return self._add_rows(source, path)
                if self._carry is None:
                    self._copy(path)
                else:
                    self._add_requests(source, path, self._carry)
            except ValueError as error:
                # The disk is too small.
                raise InputError(f"input {source.label} cannot be read: {error}") from error
        return "line"

    def _copy(self, path: Path) -> None:
        with path.open("rb") as stream:
            if stream.read(len(_UTF8_BOM)) != _UTF8_BOM:
                stream.seek(0)
            last = b"\n"
            while block := stream.read(BLOCK_BYTES):
                self.lines += block.count(b"\n")
                self._sink.write(block)
                last = block[-1:]
        if last != b"\n":
            self._write(b"")

    def _add_requests(self, source: Source, path: Path, carry: CarryWriter) -> None:
        """Lines of requests that have more fields than a request has; those are carried."""
        start = self.lines
        found: set[str] = set()
        with path.open("rb") as stream:
            for line in iter_lines(stream, self._max_line_bytes):
                while self.lines - start < line.number - 1:
                    self._write(b"")
                data = line.data if line.data is not None else b"?" * (self._max_line_bytes + 1)
                with contextlib.suppress(ValueError):
                    entry = orjson.loads(data)
                    if isinstance(entry, dict):
                        values = {name: entry.pop(name, None) for name in carry.columns}
                        found |= {name for name in values if values[name] is not None}
                        carry.add(str(entry.get("custom_id")), values)
                        data = orjson.dumps(entry)
                self._write(data)
        self._check_found(source, carry, found)

    def _add_rows(self, source: Source, path: Path) -> str:
        table = read_table(source, path, self._max_line_bytes)
        mapping, carry = self._mapping, self._carry
        if table.columns is not None:
            mapping = mapping.chosen(source.label, table.columns)
            check_columns(source.label, carry.columns if carry is not None else (), table.columns)
        found: set[str] = set()
        first: list[str] = []
        for number, row in enumerate(table.rows, start=1):
            if row is None:
                self._write(b"")
                continue
            self._rows += 1
            first = first or list(row)
            try:
                request = mapping.request(row, self._rows)
                if carry is not None:
                    values = {name: row.get(name) for name in carry.columns}
                    found |= values.keys() & row.keys()
                    carry.add(str(request["custom_id"]), values)
            except InputError as error:
                raise InputError(f"{source.label}, {table.unit} {number}: {error}") from error
            self._write(orjson.dumps(request))
            if table.columns is None:
                found |= row.keys() & set(mapping.columns())
        if table.columns is None and first:
            wanted = [*mapping.columns(), *(carry.columns if carry is not None else ())]
            missing = [column for column in wanted if column not in found]
            # Not each line needs to have it, but one does.
            if missing:
                raise InputError(
                    f"no line of {source.label} has a column {', '.join(map(repr, missing))}; the "
                    f"first has {', '.join(first)}"
                )
        return table.unit

    def _check_found(self, source: Source, carry: CarryWriter | None, found: set[str]) -> None:
        missing = [name for name in (carry.columns if carry else ()) if name not in found]
        if missing and self.lines:
            raise InputError(f"no line of {source.label} has a field {', '.join(missing)} to carry")

    def _write(self, data: Any) -> None:
        self._sink.write(data + b"\n")
        self.lines += 1
