"""The input of ``run-batch``: from a file, stdin, .gz or .zst, and checked before a model loads."""

from __future__ import annotations

import contextlib
import gzip
import json
import shutil
import sys
import tempfile
from collections.abc import AsyncIterator, Callable, Iterator, Sequence
from pathlib import Path
from typing import BinaryIO, cast

from blendserve.batch import BatchFault, BatchLimits, BatchLine, LineFault, LineResult, LineSource
from blendserve.batch.executor import ENDPOINTS
from blendserve.batch.validation import validate_file

_MAX_LISTED_FAULTS = 50
_BLOCK_BYTES = 1 << 20


class InputError(RuntimeError):
    """The input cannot be read or run; the message names the place and the remedy."""


@contextlib.contextmanager
def plain_file(source: str, folder: Path) -> Iterator[Path]:
    """The input as a file of plain lines: the file itself, or a temporary one in `folder`.

    Raises:
        InputError: not a file, not what its name promises, or the folder is full.
    """
    if source != "-" and not Path(source).is_file():
        raise InputError(f"input {source} is not a file")
    unpack = _unpacker(source)
    if unpack is None:
        yield Path(source)
        return
    with tempfile.NamedTemporaryFile(dir=folder, prefix=".input-", suffix=".jsonl") as spool:
        try:
            unpack(cast(BinaryIO, spool))
            spool.flush()
        except (OSError, EOFError, ValueError) as error:
            raise InputError(f"input {source} cannot be unpacked: {error}") from error
        yield Path(spool.name)


def check(path: Path, name: str, limits: BatchLimits) -> str:
    """The endpoint of a file that can be run; every fault of a file that cannot is told.

    Raises:
        InputError: lists the bad lines.
    """
    endpoint = _first_url(path, name)
    verdict = validate_file(path, endpoint, _AnyEngine(), limits, lambda: False, lambda _: None)
    if verdict.faults:
        raise InputError("\n".join([f"{name} cannot be run:", *fault_lines(verdict.faults)]))
    return endpoint


def fault_lines(faults: Sequence[BatchFault]) -> list[str]:
    """Faults as lines of text, and how many more there are."""
    listed = [
        f"  line {fault.line}: {fault.message} ({fault.code})"
        if fault.line
        else f"  {fault.message} ({fault.code})"
        for fault in faults[:_MAX_LISTED_FAULTS]
    ]
    if len(faults) > _MAX_LISTED_FAULTS:
        listed.append(f"  and {len(faults) - _MAX_LISTED_FAULTS} more")
    return listed


def _unpacker(source: str) -> Callable[[BinaryIO], None] | None:
    """Writes the plain lines into a file; None if they are plain already."""
    if source == "-":
        return lambda sink: shutil.copyfileobj(sys.stdin.buffer, sink, _BLOCK_BYTES)
    if source.endswith(".gz"):
        return lambda sink: _ungzip(source, sink)
    if source.endswith(".zst"):
        return lambda sink: _unzstd(source, sink)
    return None


def _ungzip(source: str, sink: BinaryIO) -> None:
    with gzip.open(source, "rb") as stream:
        shutil.copyfileobj(stream, sink, _BLOCK_BYTES)


def _unzstd(source: str, sink: BinaryIO) -> None:
    import zstandard

    frame = None
    with open(source, "rb") as stream:
        while block := stream.read(_BLOCK_BYTES):
            while block:
                if frame is None:
                    frame = zstandard.ZstdDecompressor().decompressobj()
                try:
                    sink.write(frame.decompress(block))
                except zstandard.ZstdError as error:
                    raise ValueError(str(error)) from error
                block = frame.unused_data
                frame = None if frame.eof else frame
    if frame is not None:
        # The library's own file object would take a file that was cut off for a whole one.
        raise EOFError("it ends in the middle")


def _first_url(path: Path, name: str) -> str:
    """The url of the first request; the check finds the lines that have another one."""
    with path.open("rb") as lines:
        for number, line in enumerate(lines, start=1):
            text = line.removeprefix(b"\xef\xbb\xbf") if number == 1 else line
            if not text.strip():
                continue
            try:
                url = str(json.loads(text)["url"])
            except (ValueError, KeyError, TypeError) as error:
                raise InputError(
                    f"{name}, line {number} is not a batch request: it must be a JSON object with "
                    "custom_id, method, url and body"
                ) from error
            if url not in ENDPOINTS:
                raise InputError(
                    f"{name}, line {number}: there is no endpoint {url[:80]!r}; "
                    f"use one of {', '.join(sorted(ENDPOINTS))}"
                )
            return url
    raise InputError(f"{name} has no requests")


class _AnyEngine:
    """Stands for an engine that is not there yet: it takes every endpoint and every model."""

    endpoints = ENDPOINTS
    models: frozenset[str] = frozenset()
    fingerprint = ""

    def check(self, line: BatchLine) -> LineFault | None:
        return None

    def run(
        self,
        job_id: str,
        lines: LineSource,
        pending: Sequence[int],
        on_start: Callable[[int], None],
        deadline: float | None = None,
    ) -> AsyncIterator[LineResult]:
        raise NotImplementedError("it is there to check against")
