"""One input of ``run-batch`` as a file that can be read twice: from a file, a pipe, or packed."""

from __future__ import annotations

import contextlib
import os
import shutil
import stat
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import IO

from blendserve.cli.unpack import BLOCK_BYTES, packing_of, unpack

_SPACE_CHECK_BYTES = 16 << 20
_MARK_BYTES = 8


class InputError(RuntimeError):
    """The input cannot be read or run; the message names the place and the remedy."""


@contextlib.contextmanager
def plain_file(source: str, folder: Path) -> Iterator[Path]:
    """The input as a plain file: the file itself, or a temporary one in `folder`.

    `-` is stdin; a pipe is read once, whole.

    Raises:
        InputError: not a file, not what its name promises, or too large for the disk.
    """
    if not is_readable(source):
        raise InputError(f"input {source} is not a file")
    with contextlib.ExitStack() as stack:
        if source == "-":
            stream: IO[bytes] = sys.stdin.buffer
        else:
            stream = stack.enter_context(_open(source))
        path = None if source == "-" or not Path(source).is_file() else Path(source)
        beginning = _beginning(stream, path)
        packing = packing_of(source, beginning)
        if path is not None and packing is None:
            yield path
            return
        with spool(folder) as file:
            _fill(file, stream, beginning, packing, source, folder)
            yield path_of(file)


def is_readable(source: str) -> bool:
    """Whether it is stdin, a file, or a pipe, as `<(command)` gives one."""
    if source == "-":
        return True
    try:
        mode = os.stat(source).st_mode
    except OSError:
        return False
    return stat.S_ISREG(mode) or stat.S_ISFIFO(mode)


def spool(folder: Path) -> IO[bytes]:
    """A temporary file in `folder` without a name: nothing is left of it, however this ends."""
    return tempfile.TemporaryFile(dir=folder)


def path_of(file: IO[bytes]) -> Path:
    """Under which this process may open a spool."""
    return Path(f"/proc/self/fd/{file.fileno()}")


def _open(source: str) -> IO[bytes]:
    try:
        return open(source, "rb")
    except OSError as error:
        raise InputError(f"input {source} cannot be read: {error.strerror}") from error


def _beginning(stream: IO[bytes], path: Path | None) -> bytes:
    """The first bytes. Those of a pipe are gone from it; a file is as it was."""
    found = b""
    while len(found) < _MARK_BYTES and (more := stream.read(_MARK_BYTES - len(found))):
        found += more
    if path is not None:
        stream.seek(0)
        return found
    return found


def _fill(
    file: IO[bytes],
    stream: IO[bytes],
    beginning: bytes,
    packing: str | None,
    source: str,
    folder: Path,
) -> None:
    """Write a pipe, or what is packed, into a spool."""
    sink = Spool(file, folder)
    try:
        if not stream.seekable():
            if packing is None:
                sink.write(beginning)
            else:
                stream = _whole(stream, beginning, folder)
        if packing is None:
            shutil.copyfileobj(stream, sink, BLOCK_BYTES)
        else:
            with stream:
                unpack(packing, stream, sink)
        file.flush()
    except (OSError, EOFError, ValueError) as error:
        did = "read" if packing is None else "unpacked"
        raise InputError(f"input {source} cannot be {did}: {error}") from error


def _whole(stream: IO[bytes], beginning: bytes, folder: Path) -> IO[bytes]:
    """A packed pipe in a file, from its beginning."""
    packed = spool(folder)
    packed.write(beginning)
    shutil.copyfileobj(stream, Spool(packed, folder), BLOCK_BYTES)
    packed.seek(0)
    return packed


class Spool:
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
