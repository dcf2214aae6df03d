"""Columns of the input that results are to have beside them (``run-batch --carry``)."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Mapping, Sequence
from decimal import Decimal
from pathlib import Path
from typing import IO, Any

import orjson

from blendserve.batch.publication import one_line
from blendserve.cli.batch_input import InputError

FIELD = "input"
"""Of a result line: the carried columns."""


class Carried:
    """The carried values of a job's requests. Memory: about 150 bytes a request.

    Args:
        file: lines of a custom_id and its values.
        columns: their names.
        digest: of all of it.
    """

    def __init__(self, file: IO[bytes], columns: Sequence[str], digest: str) -> None:
        self.columns = tuple(columns)
        self.digest = digest
        self._file = file
        self._places: dict[str, tuple[int, int]] = {}
        file.seek(0)
        offset = 0
        for line in file:
            self._places[orjson.loads(line)[0]] = offset, len(line)
            offset += len(line)

    def join(self, results: Path, sink: IO[bytes]) -> None:
        """Write the lines of a result file with their columns."""
        with results.open("rb") as lines:
            for line in lines:
                entry: dict[str, Any] = orjson.loads(line)
                place = self._places.get(entry["custom_id"])
                if place is not None:
                    data = os.pread(self._file.fileno(), place[1], place[0])
                    entry[FIELD] = orjson.loads(data)[1]
                sink.write(one_line(entry))


class CarryWriter:
    """Collects what is to be carried."""

    def __init__(self, file: IO[bytes], columns: Sequence[str]) -> None:
        self.columns = tuple(columns)
        self._file = file
        self._digest = hashlib.sha256()

    def add(self, custom_id: str, values: Mapping[str, Any]) -> None:
        """Raises InputError for a value that JSON has no form for."""
        try:
            data = orjson.dumps(
                [custom_id, values], default=_plain, option=orjson.OPT_APPEND_NEWLINE
            )
        except TypeError as error:
            raise InputError(f"a column of --carry has a value that JSON lacks: {error}") from error
        self._digest.update(data)
        self._file.write(data)

    def carried(self) -> Carried:
        """All of it."""
        self._file.flush()
        return Carried(self._file, self.columns, self._digest.hexdigest())


def _plain(value: Any) -> Any:
    if isinstance(value, Decimal):
        return str(value)
    raise TypeError(f"type {type(value).__name__}")


def read_columns(text: str | None) -> list[str]:
    """`a,b` of the command line. Raises InputError."""
    names = [name.strip() for name in (text or "").split(",")] if text is not None else []
    if "" in names or len(set(names)) < len(names):
        raise InputError(f"--carry {text}: name each column once, with commas between them")
    return names
