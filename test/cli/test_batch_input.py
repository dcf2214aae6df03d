"""Packed input: read whole or refused; one that was cut off is never taken for a shorter one."""

from __future__ import annotations

import bz2
import gzip
import lzma
import os
import threading
from pathlib import Path

import pytest
import zstandard

from blendserve.cli import batch_input
from blendserve.cli.batch_input import InputError, plain_file
from blendserve.cli.unpack import unpack

TEXT = b"".join(b'{"line": %d}\n' % number for number in range(1_000))


def packed(kind: str, text: bytes) -> bytes:
    if kind == "gz":
        return gzip.compress(text)
    if kind == "bz2":
        return bz2.compress(text)
    if kind == "xz":
        return lzma.compress(text)
    return bytes(zstandard.ZstdCompressor().compress(text))


@pytest.fixture(params=["gz", "zst", "bz2", "xz"])
def kind(request: pytest.FixtureRequest) -> str:
    return str(request.param)


def test_packed_input_is_unpacked_and_the_copy_goes_away(tmp_path: Path, kind: str) -> None:
    source = tmp_path / f"in.jsonl.{kind}"
    source.write_bytes(packed(kind, TEXT))
    with plain_file(str(source), tmp_path) as plain:
        assert plain.read_bytes() == TEXT
    assert list(tmp_path.iterdir()) == [source]


def test_several_packed_parts_in_one_file_are_one_input(tmp_path: Path, kind: str) -> None:
    source = tmp_path / f"in.{kind}"
    source.write_bytes(packed(kind, TEXT) + packed(kind, b"more"))
    with plain_file(str(source), tmp_path) as plain:
        assert plain.read_bytes() == TEXT + b"more"


def test_a_file_that_was_cut_off_or_is_not_packed_is_refused(tmp_path: Path, kind: str) -> None:
    source = tmp_path / f"in.{kind}"
    whole = packed(kind, TEXT)
    for data in (whole[:-3], whole[: len(whole) // 2], b"plain text", whole + b"rest"):
        source.write_bytes(data)
        with pytest.raises(InputError, match="cannot be unpacked"):  # noqa: SIM117
            with plain_file(str(source), tmp_path):
                pass
        assert list(tmp_path.iterdir()) == [source]


def test_a_plain_file_is_used_where_it_lies(tmp_path: Path) -> None:
    source = tmp_path / "in.jsonl"
    source.write_bytes(TEXT)
    with plain_file(str(source), tmp_path) as plain:
        assert plain == source


class Counted:
    """Takes everything, and knows the largest block."""

    def __init__(self) -> None:
        self.size = self.largest = 0

    def write(self, data: bytes) -> int:
        self.size += len(data)
        self.largest = max(self.largest, len(data))
        return len(data)


def test_a_bomb_is_unpacked_block_by_block(tmp_path: Path) -> None:
    source = tmp_path / "in.zst"
    packer = zstandard.ZstdCompressor().compressobj()
    with source.open("wb") as file:
        for _ in range(512):
            file.write(packer.compress(b" " * (1 << 20)))
        file.write(packer.flush())
    sink = Counted()
    with source.open("rb") as stream:
        unpack("zst", stream, sink)
    assert sink.size == 512 << 20
    assert sink.largest <= 40 << 20


def test_a_frame_with_a_huge_window_is_refused(tmp_path: Path) -> None:
    source = tmp_path / "in.zst"
    parameters = zstandard.ZstdCompressionParameters(window_log=28)
    packer = zstandard.ZstdCompressor(compression_params=parameters).compressobj()
    source.write_bytes(packer.compress(TEXT) + packer.flush())
    with pytest.raises(InputError, match="too much memory"):  # noqa: SIM117
        with plain_file(str(source), tmp_path):
            pass


def test_what_does_not_fit_on_the_disk_is_refused_with_a_remedy(
    tmp_path: Path, kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = tmp_path / f"in.{kind}"
    source.write_bytes(packed(kind, b" " * (80 << 20)))
    usage = batch_input.shutil.disk_usage(tmp_path)
    small = usage._replace(free=40 << 20)
    monkeypatch.setattr(batch_input.shutil, "disk_usage", lambda _: small)
    with pytest.raises(InputError, match=r"40 MiB free\. Free some space"):  # noqa: SIM117
        with plain_file(str(source), tmp_path):
            pass
    assert list(tmp_path.iterdir()) == [source]


@pytest.mark.parametrize("packing", ["bz2", "xz"])
def test_a_bomb_of_another_kind_is_unpacked_block_by_block(packing: str, tmp_path: Path) -> None:
    source = tmp_path / "in"
    source.write_bytes(packed(packing, b" " * (64 << 20)))
    sink = Counted()
    with source.open("rb") as stream:
        unpack(packing, stream, sink)
    assert sink.size == 64 << 20
    assert sink.largest <= 1 << 20


def test_packed_input_is_known_without_a_name_that_says_so(tmp_path: Path, kind: str) -> None:
    source = tmp_path / "in.jsonl"
    source.write_bytes(packed(kind, TEXT))
    with plain_file(str(source), tmp_path) as plain:
        assert plain.read_bytes() == TEXT


@pytest.mark.parametrize("packing", [None, "gz", "zst"])
def test_a_pipe_is_read_once_whole(tmp_path: Path, packing: str | None) -> None:
    pipe = tmp_path / "pipe"
    os.mkfifo(pipe)
    data = TEXT if packing is None else packed(packing, TEXT)
    writer = threading.Thread(target=pipe.write_bytes, args=(data,), daemon=True)
    writer.start()
    with plain_file(str(pipe), tmp_path) as plain:
        assert plain.read_bytes() == TEXT
    writer.join(10)
    assert list(tmp_path.iterdir()) == [pipe]


def test_a_short_pipe_is_read_whole(tmp_path: Path) -> None:
    pipe = tmp_path / "pipe"
    os.mkfifo(pipe)
    writer = threading.Thread(target=pipe.write_bytes, args=(b"{}",), daemon=True)
    writer.start()
    with plain_file(str(pipe), tmp_path) as plain:
        assert plain.read_bytes() == b"{}"
    writer.join(10)
