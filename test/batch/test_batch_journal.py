"""The journal survives a torn last record, damage, and a disk that is full."""

from __future__ import annotations

import errno
import os
from pathlib import Path
from typing import Any

import pytest
from batch_fakes import open_descriptors
from hypothesis import given, settings
from hypothesis import strategies as st

from blendserve.batch.journal import Journal, Record, Tally, read_records, tally_journal
from blendserve.batch.progress import Usage, usage_of


def record(index: int, text: str = "answer", kind: str = "output") -> Record:
    body = {"text": text, "usage": {"prompt_tokens": 2, "completion_tokens": 1}}
    response = {"status_code": 200, "request_id": "r", "body": body}
    return Record(index, "output" if kind == "output" else "error", {"response": response})


def write(path: Path, *records: Record) -> None:
    journal = Journal(path)
    journal.append([item.encode() for item in records])
    journal.close()


def test_the_last_record_may_be_torn_at_every_byte(tmp_path: Path) -> None:
    path = tmp_path / "journal"
    write(path, record(0), record(1, "größer"))
    committed = path.read_bytes()
    torn = record(2, "never seen ü").encode()
    for length in range(len(torn)):
        path.write_bytes(committed + torn[:length])
        journal = Journal(path)
        assert path.read_bytes() == committed, length
        tally = tally_journal(path, 4)
        assert (tally.completed, list(tally.pending())) == (2, [2, 3]), length
        journal.append([record(3).encode()])
        journal.close()
        assert [found.index for found in read_records(path, 4)] == [0, 1, 3], length


@settings(max_examples=60, deadline=None)
@given(
    sizes=st.lists(st.integers(min_value=0, max_value=400), min_size=1, max_size=8),
    cut=st.integers(min_value=0, max_value=4_000),
)
def test_a_cut_anywhere_leaves_a_prefix_of_the_records(
    tmp_path_factory: pytest.TempPathFactory, sizes: list[int], cut: int
) -> None:
    path = tmp_path_factory.mktemp("cut") / "journal"
    write(path, *(record(index, "x" * size) for index, size in enumerate(sizes)))
    whole = path.read_bytes()
    path.write_bytes(whole[:cut])
    Journal(path).close()
    kept = [found.index for found in read_records(path, len(sizes))]
    assert kept == list(range(whole[:cut].count(b"\n")))


def test_a_torn_record_longer_than_a_block_is_cut_off(tmp_path: Path) -> None:
    path = tmp_path / "journal"
    write(path, record(0))
    size = path.stat().st_size
    with open(path, "ab") as file:
        file.write(b"\0" * 200_000)
    Journal(path).close()
    assert path.stat().st_size == size


@pytest.mark.parametrize(
    "damage",
    [
        b"rubbish\n",
        b"\0\0\0\n",
        b"[]\n",
        b'{"index": 9, "kind": "output", "line": {}}\n',
        b'{"index": true, "kind": "output", "line": {}}\n',
        b'{"index": 1, "kind": "other", "line": {}}\n',
    ],
)
def test_damage_in_the_middle_costs_only_the_damaged_record(tmp_path: Path, damage: bytes) -> None:
    path = tmp_path / "journal"
    path.write_bytes(record(0).encode() + damage + record(2).encode())
    Journal(path).close()
    assert list(tally_journal(path, 3).pending()) == [1]


def test_the_first_record_of_a_line_counts(tmp_path: Path) -> None:
    tally = Tally(2)
    assert tally.add(record(1))
    assert not tally.add(record(1, kind="error"))
    assert (tally.completed, tally.failed, tally.usage) == (1, 0, Usage(2, 0, 1, 0))


def test_a_failed_write_leaves_no_half_group(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "journal"
    journal = Journal(path)
    journal.append([record(0).encode()])
    committed = path.read_bytes()
    real_write = os.pwrite

    def full_disk(descriptor: int, data: bytes, position: int) -> int:
        if position > len(committed):
            raise OSError(errno.ENOSPC, "No space left on device")
        return real_write(descriptor, data[:5], position)

    with monkeypatch.context() as patch:
        patch.setattr(os, "pwrite", full_disk)
        with pytest.raises(OSError, match="No space"):
            journal.append([record(1).encode(), record(2).encode()])
    assert path.read_bytes() == committed
    journal.append([record(2).encode()])
    journal.close()
    assert [found.index for found in read_records(path, 3)] == [0, 2]


def test_closing_twice_is_harmless_and_leaks_nothing(tmp_path: Path) -> None:
    before = open_descriptors()
    journal = Journal(tmp_path / "journal")
    journal.close()
    journal.close()
    assert open_descriptors() == before


def test_tokens_are_read_in_every_spelling() -> None:
    chat = {
        "prompt_tokens": 9,
        "completion_tokens": 4,
        "prompt_tokens_details": {"cached_tokens": 5},
        "completion_tokens_details": {"reasoning_tokens": 2},
    }
    assert usage_of({"usage": chat}) == Usage(9, 5, 4, 2)
    responses = {
        "input_tokens": 9,
        "output_tokens": 4,
        "input_tokens_details": {"cached_tokens": 5},
        "output_tokens_details": {"reasoning_tokens": 2},
    }
    assert usage_of({"usage": responses}) == Usage(9, 5, 4, 2)
    embeddings = {"prompt_tokens": 9, "total_tokens": 9, "prompt_tokens_details": None}
    assert usage_of({"usage": embeddings}) == Usage(9, 0, 0, 0)
    strange: list[Any] = [None, [], {"prompt_tokens": "9"}, {"prompt_tokens": -1}]
    for body in [None, {}, *({"usage": usage} for usage in strange)]:
        assert usage_of(body) == Usage()
