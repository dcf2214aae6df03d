"""Files and journals that the database does not know: what a crash leaves, or signs of a lost one.

Bytes get their row, and a journal its batch, under one lock, so a crash leaves two files without a
row at most, and never a journal without a batch. More than a few mean that the database is older
than what lies beside it: nothing is touched then.
"""

from __future__ import annotations

import logging
import time

from sqlalchemy import select
from sqlalchemy.orm import Session

from blendserve.batch.directory import BatchDirectory, BatchDirectoryError
from blendserve.batch.tables import TERMINAL_STATUSES, BatchRow, FileRow

logger = logging.getLogger(__name__)

_MAX_LEFT_BY_CRASHES = 4
_NAMED = 3


def refuse_empty_database(directory: BatchDirectory) -> None:
    """BatchDirectoryError if there are files or journals, which a database without tables lacks."""
    files, journals = list(directory.stored_digests()), list(directory.stored_journal_ids())
    if files or journals:
        path = directory.database
        what = f"{path} is {'empty' if path.exists() else 'missing'}"
        raise _lost(directory, what, len(files), len(journals))


def clear_orphans(directory: BatchDirectory, session: Session) -> None:
    """Ends deletions that a crash cut short, and moves what has no owner to `lost/`.

    Raises:
        BatchDirectoryError: there is more of it than crashes leave. Nothing was touched.
    """
    digests_of = select(FileRow.sha256)
    owned = set(session.scalars(digests_of.where(FileRow.deleted_at.is_(None))))
    deleted = set(session.scalars(digests_of.where(FileRow.deleted_at.is_not(None))))
    ended = BatchRow.status.in_(TERMINAL_STATUSES)
    unfinished = set(session.scalars(select(BatchRow.id).where(~ended)))
    finished = set(session.scalars(select(BatchRow.id).where(ended)))
    digests, journals = set(directory.stored_digests()), set(directory.stored_journal_ids())
    unknown = digests - owned - deleted
    strange = {
        batch_id
        for batch_id in journals - unfinished - finished
        if directory.journal(batch_id).stat().st_size
    }
    if len(unknown) > _MAX_LEFT_BY_CRASHES or strange:
        raise _lost(
            directory,
            f"{directory.database} is older than what lies beside it",
            len(unknown),
            len(strange),
            sorted([*unknown, *(f"{batch_id}.jsonl" for batch_id in strange)]),
        )
    if owned - digests:
        logger.warning(
            "%d files that %s has are not in its folder any more: they cannot be downloaded",
            len(owned - digests),
            directory.database,
        )
    for digest in digests & (deleted - owned):
        directory.content(digest).unlink(missing_ok=True)
    for digest in unknown:
        directory.set_aside(directory.content(digest))
    for batch_id in journals - unfinished:
        directory.journal(batch_id).unlink(missing_ok=True)
    directory.clear_lost(time.time())


def _lost(
    directory: BatchDirectory, what: str, files: int, journals: int, names: list[str] | None = None
) -> BatchDirectoryError:
    held = " and ".join(
        f"{count} {kind}" for count, kind in ((files, "files"), (journals, "journals")) if count
    )
    named = f" ({', '.join(names[:_NAMED])}, ...)" if names else ""
    return BatchDirectoryError(
        f"{what}: {directory.root} holds {held}{named} that it does not know. Was it restored or "
        "copied without its -wal file? Nothing has been changed. Put the right blendserve.db and "
        "its -wal file back; or move files/ and journals/ to another place to begin with what "
        "the database knows."
    )
