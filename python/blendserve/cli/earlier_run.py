"""The results of a ``run-batch`` that has ended, to run again what has no answer in them."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from pathlib import Path
from typing import IO, Any

import orjson

from blendserve.batch.line_parser import read_entry
from blendserve.batch.lines import iter_lines
from blendserve.cli.batch_input import InputError, path_of, spool

_MAX_SHOWN = 80


class EarlierRun:
    """An output file and its input. Memory: about 150 bytes per line."""

    def __init__(self, output: Path, errors: Path, source: Path, max_line_bytes: int) -> None:
        self._output = output
        self._errors = errors
        self._source = source
        self._max_line_bytes = max_line_bytes

    @contextlib.contextmanager
    def unanswered(self, folder: Path) -> Iterator[tuple[Path, int]]:
        """A temporary file, in `folder`, of the input's lines without an answer, and their number.

        Raises:
            InputError: the output is not one of this input.
        """
        if not self._output.exists() and not self._errors.exists():
            raise InputError(
                f"neither {self._output} nor {self._errors} is there: nothing has failed yet. Run "
                "the command without --retry-failed"
            )
        answered = set(self._answered())
        known: set[str] = set()
        count = 0
        with spool(folder) as file:
            for custom_id, data in self._requests():
                if custom_id in answered:
                    known.add(custom_id)
                    continue
                file.write(data + b"\n")
                count += 1
            if strangers := answered - known:
                raise InputError(
                    f"{self._output} answers {min(strangers)[:_MAX_SHOWN]!r}, which the input does "
                    "not have. Give the input and the output of one run"
                )
            file.flush()
            yield path_of(file), count

    def merge(self, fresh: Path | None, sink: IO[bytes], *, in_order: bool) -> int:
        """Writes the earlier answers and those in `fresh`, and returns how many there are.

        May be repeated over an output that it was merged into already. `in_order`: as the input is.
        """
        places: dict[str, tuple[int, int, int]] = {}
        with contextlib.ExitStack() as files:
            paths = [path for path in (self._output, fresh) if path is not None and path.exists()]
            streams = [files.enter_context(path.open("rb")) for path in paths]
            for number, stream in enumerate(streams):
                offset = 0
                for line in stream:
                    # The later file counts: what an earlier merge has written stands in both.
                    places[orjson.loads(line)["custom_id"]] = (number, offset, len(line))
                    offset += len(line)
            names = (name for name, _ in self._requests()) if in_order else iter(places)
            for name in names:
                if name in places:
                    number, offset, size = places[name]
                    streams[number].seek(offset)
                    sink.write(streams[number].read(size))
        return len(places)

    def _answered(self) -> Iterator[str]:
        if not self._output.exists():
            return
        with self._output.open("rb") as lines:
            for number, line in enumerate(lines, start=1):
                try:
                    entry: Any = orjson.loads(line)
                    if not line.endswith(b"\n"):
                        raise ValueError
                    yield entry["custom_id"]
                except (ValueError, KeyError, TypeError) as error:
                    raise InputError(
                        f"{self._output}, line {number} is no answer of an earlier run; give the "
                        "output of one, whole"
                    ) from error

    def _requests(self) -> Iterator[tuple[str, bytes]]:
        with self._source.open("rb") as stream:
            for line in iter_lines(stream, self._max_line_bytes):
                assert line.data is not None, "the input was checked"
                yield read_entry(line.data).fields["custom_id"], line.data
