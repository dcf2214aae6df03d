"""Unpacks .gz, .zst, .bz2 and .xz block by block; what was cut off is never taken for whole."""

from __future__ import annotations

import bz2
import gzip
import lzma
import shutil
from collections.abc import Callable
from typing import IO, Protocol

BLOCK_BYTES = 1 << 20
# A block of zstd, 4 bytes at least, gives 128 KiB at most: 1 KiB of them is 32 MiB in memory.
_ZSTD_BLOCK_BYTES = 1 << 10
# What `zstd --long=27` needs at the other end. Larger windows take a flag there, too.
_MAX_WINDOW_BYTES = 1 << 27
_MARKS = {
    b"\x1f\x8b": "gz",
    b"\x28\xb5\x2f\xfd": "zst",
    b"BZh": "bz2",
    b"\xfd7zXZ\x00": "xz",
}
SUFFIXES = (".gz", ".zst", ".bz2", ".xz")


class Sink(Protocol):
    """Takes what has been unpacked."""

    def write(self, data: bytes, /) -> int: ...


class _Decompressor(Protocol):
    """What bz2 and lzma have in common."""

    @property
    def eof(self) -> bool: ...
    @property
    def needs_input(self) -> bool: ...
    @property
    def unused_data(self) -> bytes: ...
    def decompress(self, data: bytes, max_length: int = -1) -> bytes: ...


def packing_of(name: str, beginning: bytes) -> str | None:
    """How a file is packed: as its name says, else as its first bytes do; None for plain ones."""
    for suffix in SUFFIXES:
        if name.endswith(suffix):
            return suffix[1:]
    return next((kind for mark, kind in _MARKS.items() if beginning.startswith(mark)), None)


def unpack(kind: str, stream: IO[bytes], sink: Sink) -> None:
    """Write the plain bytes of a packed stream.

    Raises:
        OSError, EOFError, ValueError: it is not packed so, damaged, or cut off.
    """
    if kind == "gz":
        with gzip.GzipFile(fileobj=stream) as plain:
            shutil.copyfileobj(plain, sink, BLOCK_BYTES)
    elif kind == "zst":
        _unzstd(stream, sink)
    elif kind == "bz2":
        _frames(stream, sink, bz2.BZ2Decompressor)
    else:
        _frames(stream, sink, lambda: lzma.LZMADecompressor(lzma.FORMAT_XZ))


def _frames(stream: IO[bytes], sink: Sink, make: Callable[[], _Decompressor]) -> None:
    """One packed part after the other. The libraries' own file objects would pass over what
    follows the first and is none."""
    frame: _Decompressor | None = None
    block = stream.read(BLOCK_BYTES)
    while block or (frame is not None and not frame.needs_input):
        if frame is None:
            frame = make()
        try:
            sink.write(frame.decompress(block, BLOCK_BYTES))
        except lzma.LZMAError as error:
            raise ValueError(str(error)) from error
        block = b""
        if frame.eof:
            block, frame = frame.unused_data, None
        if not block and (frame is None or frame.needs_input):
            block = stream.read(BLOCK_BYTES)
    if frame is not None:
        raise EOFError("it ends in the middle")


def _unzstd(stream: IO[bytes], sink: Sink) -> None:
    import zstandard

    frame = None
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
