"""Results of a batch so far, as the lines that its result files begin with.

A journal has the lines of both files in the order in which they became durable, and the files are
written from it in that order. So what is told here while a batch runs is the beginning of the file
that is there in the end, and whoever has N lines may ask for those behind them at any time.
"""

from __future__ import annotations

import threading
from collections import OrderedDict
from collections.abc import Callable, Iterator
from pathlib import Path

from blendserve.batch.journal import RecordKind, read_span
from blendserve.batch.publication import result_line
from blendserve.batch.store import BatchStore
from blendserve.batch.tables import TERMINAL_STATUSES, BatchRow

# Places that are remembered: a client that asks again goes on without reading all of the journal.
_MAX_PLACES = 4_096


class PartialResults:
    """Reads results of batches in any state. Blocking; any thread.

    `durable_bytes` tells how much of a batch's journal counts, FileNotFoundError without one.
    """

    def __init__(self, store: BatchStore, durable_bytes: Callable[[BatchRow], int]) -> None:
        self._store = store
        self._durable_bytes = durable_bytes
        self._places: OrderedDict[tuple[str, RecordKind], tuple[int, int]] = OrderedDict()
        self._lock = threading.Lock()

    def lines(
        self, row: BatchRow, kind: RecordKind, after: int, now: int
    ) -> Iterator[bytes] | None:
        """The lines of one kind behind the first `after`; None if the batch has moved on since the
        row was read: read it again. `now`: unix seconds.

        Raises:
            FileNotFoundError: the batch has ended, and its result file was deleted.
        """
        if row.status in TERMINAL_STATUSES:
            file_id = row.output_file_id if kind == "output" else row.error_file_id
            if file_id is None:
                return iter(())
            file = self._store.find_file(file_id, now, row.tenant)
            if file is None:
                raise FileNotFoundError(file_id)
            return _behind(self._store.directory.content(file.sha256), after)
        if row.total is None:
            # What the check has refused so far counts only once the file is accepted.
            return iter(())
        try:
            end = self._durable_bytes(row)
        except FileNotFoundError:
            again = self._store.find_batch(row.id)
            ended = again is not None and again.status in TERMINAL_STATUSES
            return None if ended else iter(())
        return self._of_journal(row, kind, after, end)

    def _of_journal(self, row: BatchRow, kind: RecordKind, after: int, end: int) -> Iterator[bytes]:
        path = self._store.directory.journal(row.id)
        count, place = self._place(row.id, kind, after, end)
        for record, behind in read_span(path, row.total or 0, place, end):
            if record is not None and record.kind == kind:
                count += 1
                if count > after:
                    yield result_line(record)
            place = behind
        self._remember(row.id, kind, count, place)

    def _place(self, batch_id: str, kind: RecordKind, after: int, end: int) -> tuple[int, int]:
        """Lines of the kind before a place of the journal that is not behind `after` lines."""
        with self._lock:
            count, place = self._places.get((batch_id, kind), (0, 0))
        # A journal is cut where a write failed, but never before what was durable.
        return (count, place) if count <= after and place <= end else (0, 0)

    def _remember(self, batch_id: str, kind: RecordKind, count: int, place: int) -> None:
        with self._lock:
            self._places[batch_id, kind] = (count, place)
            self._places.move_to_end((batch_id, kind))
            if len(self._places) > _MAX_PLACES:
                self._places.popitem(last=False)


def _behind(path: Path, after: int) -> Iterator[bytes]:
    """Opens the file now, so that it stays readable if it is deleted meanwhile."""
    file = path.open("rb")

    def lines() -> Iterator[bytes]:
        with file:
            for number, line in enumerate(file):
                if number >= after:
                    yield line

    return lines()
