"""The input of ``run-batch`` as a file of plain lines: from a file, stdin, .gz or .zst."""

from __future__ import annotations

import contextlib
import gzip
import shutil
import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import IO, BinaryIO

_BLOCK_BYTES = 1 << 20
# A block of zstd, 4 bytes at least, gives 128 KiB at most: 1 KiB of them is 32 MiB in memory.
_ZSTD_BLOCK_BYTES = 1 << 10
# What `zstd --long=27` needs at the other end. Larger windows take a flag there, too.
_MAX_WINDOW_BYTES = 1 << 27
_SPACE_CHECK_BYTES = 16 << 20


class InputError(RuntimeError):
    """The input cannot be read or run; the message names the place and the remedy."""


@contextlib.contextmanager
def plain_file(source: str, folder: Path) -> Iterator[Path]:
    """The input as a file of plain lines: the file itself, or a temporary one in `folder`.

    Raises:
        InputError: not a file, not what its name promises, or too large for the disk.
    """
    if source != "-" and not Path(source).is_file():
        raise InputError(f"input {source} is not a file")
    unpack = _unpacker(source)
    if unpack is None:
        yield Path(source)
        return
    with spool(folder) as file:
        try:
            unpack(_Spool(file, folder))
            file.flush()
        except (OSError, EOFError, ValueError) as error:
            raise InputError(f"input {source} cannot be unpacked: {error}") from error
        yield path_of(file)


def spool(folder: Path) -> IO[bytes]:
    """A temporary file in `folder` without a name: nothing is left of it, however this ends."""
    return tempfile.TemporaryFile(dir=folder)


def path_of(file: IO[bytes]) -> Path:
    """Under which this process may open a spool."""
    return Path(f"/proc/self/fd/{file.fileno()}")


class _Spool:
    """Writes, as long as the disk has room for the file and for the copy that a job makes of it."""

    def __init__(self, file: IO[bytes], folder: Path) -> None:
        self._file = file
        self._folder = folder
        self._size = 0
        self._unchecked = _SPACE_CHECK_BYTES

    def write(self, data: bytes) -> int:
        self._unchecked += len(data)
        if self._unchecked >= _SPACE_CHECK_BYTES:
            self._unchecked = 0
            free = shutil.disk_usage(self._folder).free
            if free < 2 * len(data) + self._size + _SPACE_CHECK_BYTES:
                raise ValueError(
                    f"it has more than {(self._size + len(data)) >> 20} MiB, and twice that does "
                    f"not fit into {self._folder}, which has {free >> 20} MiB free. Free some "
                    "space, give an -o on a larger disk, or split the file"
                )
        self._size += len(data)
        return self._file.write(data)


def _unpacker(source: str) -> Callable[[_Spool], None] | None:
    """Writes the plain lines into a file; None if they are plain already."""
    if source == "-":
        return lambda sink: shutil.copyfileobj(sys.stdin.buffer, sink, _BLOCK_BYTES)
    if source.endswith(".gz"):
        return lambda sink: _ungzip(source, sink)
    if source.endswith(".zst"):
        return lambda sink: _unzstd(source, sink)
    return None


def _ungzip(source: str, sink: _Spool | BinaryIO) -> None:
    with gzip.open(source, "rb") as stream:
        shutil.copyfileobj(stream, sink, _BLOCK_BYTES)


def _unzstd(source: str, sink: _Spool | BinaryIO) -> None:
    import zstandard

    frame = None
    with open(source, "rb") as stream:
        # The library's own file object would take a file that was cut off for a whole one.
        while block := stream.read(_ZSTD_BLOCK_BYTES):
            while block:
                if frame is None:
                    decompressor = zstandard.ZstdDecompressor(max_window_size=_MAX_WINDOW_BYTES)
                    frame = decompressor.decompressobj()
                try:
                    sink.write(frame.decompress(block))
                except zstandard.ZstdError as error:
                    raise ValueError(str(error)) from error
                block = frame.unused_data
                frame = None if frame.eof else frame
    if frame is not None:
        raise EOFError("it ends in the middle")
