"""What all stages of a batch's life work with, and what they do alike."""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

from blendserve.batch.executor import Executor
from blendserve.batch.job import Offload
from blendserve.batch.journal import Journal, Record, Tally, tally_journal
from blendserve.batch.limits import BatchLimits
from blendserve.batch.lines import IdsOfInput
from blendserve.batch.progress import Progress
from blendserve.batch.storage import storage_fault
from blendserve.batch.store import BatchStore
from blendserve.batch.tables import BatchRow

logger = logging.getLogger(__name__)

SavedRecords = Callable[[str, Sequence[Record]], None]


@dataclass
class Surroundings:
    """What all stages work with. `live` has the progress of open batches by id, and `journals` the
    journals of those that run: written on the event loop, read from any thread. `is_stopped` tells
    whether to let go of a batch, `in_order` whether result files are sorted."""

    store: BatchStore
    executor: Executor
    limits: BatchLimits
    now: Callable[[], int]
    offload: Offload
    is_stopped: Callable[[str], bool]
    on_saved: SavedRecords | None = None
    in_order: bool = False
    live: dict[str, Progress] = field(default_factory=dict)
    journals: dict[str, Journal] = field(default_factory=dict)

    async def take_up(self, row: BatchRow) -> None:
        """Reads what the journal of a batch of an earlier process holds."""
        try:
            tally = await self.offload(self._read_durably, row)
            self.live[row.id] = progress_of_tally(tally, recovered=tally.completed + tally.failed)
            if tally.remaining == 0 and row.status == "in_progress":
                # It needs no engine any more, whichever comes up.
                await self.end(row, "completed", status="finalizing", finalizing_at=self.now())
        except Exception as error:
            fault = storage_fault(error, self.store.directory.database)
            if fault is None:
                raise
            # One batch is no reason not to start. Whoever works on it will meet the same, and wait.
            logger.error("%s cannot be taken up yet: %s", row.id, fault.remedy)
            self.live.setdefault(row.id, Progress(total=row.total or 0))

    def _read_durably(self, row: BatchRow) -> Tally:
        path = self.store.directory.journal(row.id)
        if path.exists():
            # What the process before has written may have been in memory only.
            Journal(path).close()
        return self.read_journal(row)

    def read_journal(self, row: BatchRow) -> Tally:
        """What is done of a batch. Blocking."""
        path = self.store.directory.journal(row.id)
        with self.ids_of_input(row) as custom_id_of:
            return tally_journal(path, row.total or 0, custom_id_of)

    def durable_bytes(self, row: BatchRow) -> int:
        """How much of a batch's journal counts. Any thread; FileNotFoundError without one."""
        journal = self.journals.get(row.id)
        if journal is not None:
            return journal.durable_bytes
        # Nobody writes: whoever did has synced it, and so does the start after a crash.
        return self.store.directory.journal(row.id).stat().st_size

    def ids_of_input(self, row: BatchRow) -> IdsOfInput:
        """The custom_ids of a batch's input, to be closed."""
        path = self.store.content_of(row.input_file_id)
        return IdsOfInput(path, self.limits.max_line_bytes)

    async def end(self, row: BatchRow, ending: str, **values: Any) -> None:
        """Sends a running batch to its end, unless it heads for another already."""
        await self.offload(
            lambda: self.store.advance(row.id, ["in_progress"], ending=ending, **values)
        )


def progress_of_tally(tally: Tally, *, recovered: int) -> Progress:
    """What a journal's tally says of a batch that waits to run."""
    return Progress(
        total=tally.total,
        completed=tally.completed,
        failed=tally.failed,
        usage=tally.usage,
        recovered=recovered,
        suspects=len(tally.suspects),
    )
