"""A flipped bit in a journal costs the record that it is in, and nothing else."""

from __future__ import annotations

from pathlib import Path

import orjson
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from blendserve.batch.journal import (
    Journal,
    Record,
    Suspect,
    read_records,
    read_records_in_order,
    tally_journal,
)

TOTAL = 1_000


def record(index: int) -> Record:
    line = {"custom_id": f"r{index}", "response": {"body": {"text": f"größer {index}"}}}
    return Record(index, "output", line)


RECORDS = [record(7).encode(), record(12).encode(), record(130).encode()]
JOURNAL = b"".join(RECORDS)


def write(path: Path, data: bytes) -> Path:
    path.write_bytes(data)
    return path


@settings(max_examples=400, deadline=None)
@given(bit=st.integers(0, 8 * len(JOURNAL) - 1))
def test_any_flipped_bit_is_seen(tmp_path_factory: pytest.TempPathFactory, bit: int) -> None:
    damaged = bytearray(JOURNAL)
    damaged[bit // 8] ^= 1 << bit % 8
    path = write(tmp_path_factory.mktemp("bit") / "journal", bytes(damaged))
    hit = sum(bit // 8 >= len(b"".join(RECORDS[: n + 1])) for n in range(len(RECORDS)))
    found = {entry.index: entry.line for entry in read_records(path, TOTAL)}
    intact = {r.index: r.line for n, r in enumerate(map(record, (7, 12, 130))) if n != hit}
    # A newline that is gone takes the record after it along, which then is computed again.
    assert found.items() <= intact.items()
    assert len(found) >= len(intact) - 1
    assert dict(found) == {r.index: r.line for r in read_records_in_order(path, TOTAL)}


def test_records_stay_lines_of_json() -> None:
    for raw in (*RECORDS, Suspect(3).encode()):
        assert raw.count(b"\n") == 1
        assert set(orjson.loads(raw)) <= {"index", "kind", "line", "crc32"}


def test_a_flipped_index_does_not_answer_another_line(tmp_path: Path) -> None:
    path = write(tmp_path / "journal", JOURNAL.replace(b'{"index":12,', b'{"index":13,'))
    assert [entry.index for entry in read_records(path, TOTAL)] == [7, 130]
    tally = tally_journal(path, TOTAL)
    assert not tally.is_done(12)
    assert not tally.is_done(13)


def plain(entry: Record) -> bytes:
    """As an earlier release has written it."""
    return orjson.dumps(
        {"index": entry.index, "kind": entry.kind, "line": entry.line},
        option=orjson.OPT_APPEND_NEWLINE,
    )


def test_records_of_an_earlier_release_count_and_new_ones_follow_them(tmp_path: Path) -> None:
    old = [plain(record(0)), b'{"index":5,"kind":"suspect"}\n', plain(record(2))]
    path = write(tmp_path / "journal", b"".join(old))
    journal = Journal(path)
    journal.append([record(1).encode(), Suspect(6).encode()])
    journal.close()
    tally = tally_journal(path, 8, lambda index: f"r{index}")
    assert (tally.completed, sorted(tally.suspects)) == (3, [5, 6])


def test_of_an_earlier_release_the_custom_id_must_be_the_lines(tmp_path: Path) -> None:
    moved = plain(record(3)).replace(b'{"index":3,', b'{"index":2,')
    path = write(tmp_path / "journal", plain(record(0)) + moved)
    assert [e.index for e in read_records(path, 8, lambda index: f"r{index}")] == [0]
    # Nobody can tell once the input is gone; what was answered is not thrown away.
    assert [e.index for e in read_records(path, 8, lambda _: None)] == [0, 2]


def test_an_input_is_not_read_for_records_that_have_checksums(tmp_path: Path) -> None:
    def never(_: int) -> str:
        raise AssertionError

    path = write(tmp_path / "journal", JOURNAL)
    assert len(list(read_records(path, TOTAL, never))) == 3
