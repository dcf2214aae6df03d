"""Files, batches and idempotency keys, in SQLite beside the bytes that they describe."""

from __future__ import annotations

import logging
import os
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any, Literal, TypeVar

from sqlalchemy import exists, func, or_, select, update
from sqlalchemy.exc import DBAPIError
from sqlalchemy.orm import Session
from sqlalchemy.sql.elements import ColumnElement

from blendserve.batch.backlog import Backlog
from blendserve.batch.database import BLOCK_ROWS, Database
from blendserve.batch.directory import BatchDirectory, BatchDirectoryError, Draft
from blendserve.batch.errors import ApiError, bad_request, conflict, not_found
from blendserve.batch.orphans import clear_orphans
from blendserve.batch.outbox import Outbox
from blendserve.batch.storage import storage_fault
from blendserve.batch.tables import (
    OPEN_STATUSES,
    STAGES,
    TERMINAL_STATUSES,
    BatchRow,
    FileRow,
    IdempotencyRow,
    WebhookRow,
)

logger = logging.getLogger(__name__)

Row = TypeVar("Row", FileRow, BatchRow)

_ROOM_RETRY_SECONDS = 60
_STAMPS = (
    *("created_at", "in_progress_at", "finalizing_at", "cancelling_at"),
    *(f"{status}_at" for status in TERMINAL_STATUSES),
)


class BatchStore:
    """The objects of one batch directory. Every method may be called from any thread.

    Rows are handed out detached: they are snapshots, and changing one changes nothing. Raises
    BatchDirectoryError if the directory is in use, not usable, of a schema that is not known, or
    if its database lacks what lies beside it. Every call may raise what `storage_fault` knows.
    """

    def __init__(self, batch_dir: str | os.PathLike[str]) -> None:
        self.directory = BatchDirectory(batch_dir)
        with _opening(self.directory) as undo:
            self._database = _open_database(self.directory)
            undo.callback(self._database.close)
            with self._reading() as session:
                clear_orphans(self.directory, session)
            self.directory.hold_reserve()
        self.backlog = Backlog(self._database)
        self.outbox = Outbox(self._database)

    def close(self) -> None:
        """Closes the database and gives the directory free."""
        self._database.close()
        self.directory.close()

    # -- files

    def add_file(self, row: FileRow, draft: Draft) -> FileRow:
        """Makes the draft, whose digest the row has, a file: durable, or OSError and not there."""
        with self._publishing([(row, draft)]) as session:
            session.add(row)
        return row

    def content_of(self, file_id: str) -> Path:
        """Where the bytes of a file lie, if they are not deleted."""
        with self._reading() as session:
            query = select(FileRow.sha256).where(FileRow.id == file_id)
            return self.directory.content(session.scalars(query).one())

    def find_file(self, file_id: str, now: int, tenant: str) -> FileRow | None:
        """The tenant's file, unless it is unknown, deleted or expired."""
        with self._reading() as session:
            row = session.scalar(
                select(FileRow).where(FileRow.id == file_id, FileRow.tenant == tenant)
            )
            if row is None or row.deleted_at is not None:
                return None
            if not _is_expired(row, now) or _is_in_use(session, file_id):
                return row
        return None

    def list_files(
        self,
        *,
        now: int,
        tenant: str,
        after: str | None,
        limit: int,
        order: Literal["asc", "desc"],
        purpose: str | None,
    ) -> tuple[Sequence[FileRow], bool]:
        """One page of the files, and whether there are more. ApiError 400 on an unknown cursor."""
        query = select(FileRow).where(
            FileRow.tenant == tenant,
            FileRow.deleted_at.is_(None),
            or_(FileRow.expires_at.is_(None), FileRow.expires_at > now, _has_open_reader()),
        )
        if purpose is not None:
            query = query.where(FileRow.purpose == purpose)
        with self._reading() as session:
            if after is not None:
                seq = _cursor(session, FileRow, after, tenant)
                query = query.where(FileRow.seq > seq if order == "asc" else FileRow.seq < seq)
            query = query.order_by(FileRow.seq if order == "asc" else FileRow.seq.desc())
            return _page(session.scalars(query.limit(limit + 1)).all(), limit)

    def delete_file(self, file_id: str, now: int) -> None:
        """Deletes a file. ApiError 404 if there is none, 409 while a batch reads it."""
        with self._turn():
            with self._transaction() as session:
                row = session.scalar(
                    select(FileRow).where(FileRow.id == file_id, FileRow.deleted_at.is_(None))
                )
                if row is None:
                    raise not_found("file", file_id)
                if (reader := _is_in_use(session, file_id)) is not None:
                    raise conflict(
                        f"{file_id} is the input of {reader}, which has not ended. "
                        "Cancel that batch, or wait for it, and then delete the file.",
                        code="file_in_use",
                    )
                row.deleted_at = now
            self._remove_unowned([row.sha256])

    def bury_expired(self, now: int) -> bool:
        """Deletes files past their time that no open batch reads, a block of them.

        Returns:
            Whether there may be more.
        """
        due = (
            select(FileRow.seq)
            .where(FileRow.deleted_at.is_(None), FileRow.expires_at <= now, ~_has_open_reader())
            .limit(BLOCK_ROWS)
        )
        with self._reading() as session:
            if session.scalar(due.limit(1)) is None:
                return False
        bury = update(FileRow).where(FileRow.seq.in_(due.scalar_subquery()))
        with self._turn():
            with self._transaction() as session:
                digests = session.scalars(
                    bury.values(deleted_at=now).returning(FileRow.sha256),
                    execution_options={"synchronize_session": False},
                ).all()
            self._remove_unowned(digests)
        return len(digests) == BLOCK_ROWS

    # -- batches

    def add_batch(
        self,
        row: BatchRow,
        *,
        now: int,
        max_open: int,
        idempotency: tuple[str, str] | None = None,
        webhook: WebhookRow | None = None,
    ) -> BatchRow:
        """Creates a batch, or finds the one that the same idempotency key has created before.

        `idempotency` is (key, sha256 of the request); `webhook` is kept with the batch. ApiError
        404 if the input file is gone, 409 if the key came with another request, 429 if the tenant
        has `max_open` open batches.
        """
        with self._writing() as session:
            if idempotency is not None:
                known = session.get(IdempotencyRow, (row.tenant, idempotency[0]))
                if known is not None:
                    if known.request_sha256 != idempotency[1]:
                        raise conflict(
                            "This Idempotency-Key was used before with another request. "
                            "Send the same request, or another key.",
                            code="idempotency_key_reused",
                        )
                    return session.scalars(
                        select(BatchRow).where(BatchRow.id == known.batch_id)
                    ).one()
            file = session.scalar(
                select(FileRow).where(
                    FileRow.id == row.input_file_id,
                    FileRow.tenant == row.tenant,
                    FileRow.deleted_at.is_(None),
                )
            )
            if file is None or _is_expired(file, now):
                raise not_found("file", row.input_file_id, param="input_file_id")
            if file.purpose != "batch":
                raise bad_request(
                    f"{file.id} has purpose {file.purpose!r}; the input of a batch must have been "
                    "uploaded with purpose 'batch'",
                    code="invalid_file_purpose",
                    param="input_file_id",
                )
            _require_room(session, row.tenant, max_open)
            session.add(row)
            session.flush()
            if webhook is not None:
                session.add(webhook)
            if idempotency is not None:
                key, digest = idempotency
                made = IdempotencyRow(tenant=row.tenant, key=key, request_sha256=digest)
                made.batch_id, made.created_at = row.id, now
                session.add(made)
        return row

    def find_batch(self, batch_id: str) -> BatchRow | None:
        with self._reading() as session:
            return session.scalar(select(BatchRow).where(BatchRow.id == batch_id))

    def list_batches(
        self, *, tenant: str, after: str | None, limit: int
    ) -> tuple[Sequence[BatchRow], bool]:
        """One page of the batches, newest first. ApiError 400 on an unknown cursor."""
        query = select(BatchRow).where(BatchRow.tenant == tenant).order_by(BatchRow.seq.desc())
        with self._reading() as session:
            if after is not None:
                query = query.where(BatchRow.seq < _cursor(session, BatchRow, after, tenant))
            return _page(session.scalars(query.limit(limit + 1)).all(), limit)

    def answered_batches(self, like: BatchRow, fingerprint: str) -> Sequence[BatchRow]:
        """Ended batches whose answers `like` could have got from this engine, newest first."""
        query = select(BatchRow).where(
            BatchRow.tenant == like.tenant,
            BatchRow.endpoint == like.endpoint,
            BatchRow.fingerprint == fingerprint,
            BatchRow.output_file_id.is_not(None),
            BatchRow.id != like.id,
        )
        with self._reading() as session:
            return session.scalars(query.order_by(BatchRow.seq.desc())).all()

    def advance(self, batch_id: str, statuses: Sequence[str], **values: Any) -> BatchRow | None:
        """Sets columns of a batch that is in one of `statuses` and heads for no ending yet.

        None, and no change, if it is not: somebody else (a cancel, the clock) was faster.
        """
        with self._writing() as session:
            row = session.scalar(
                select(BatchRow).where(
                    BatchRow.id == batch_id,
                    BatchRow.status.in_(statuses),
                    BatchRow.ending.is_(None),
                )
            )
            if row is not None:
                _assign(row, values)
            return row

    def conclude(
        self, batch_id: str, files: Sequence[tuple[FileRow, Draft]], **values: Any
    ) -> None:
        """In one transaction: the result files come into being, and the batch ends."""
        with self._publishing(files) as session:
            row = session.scalars(select(BatchRow).where(BatchRow.id == batch_id)).one()
            session.add_all(file for file, _ in files)
            _assign(row, values)

    # -- inside

    @contextmanager
    def _reading(self) -> Iterator[Session]:
        with self._database.reading() as session:
            yield session

    @contextmanager
    def _turn(self) -> Iterator[None]:
        with self._database.turn():
            yield

    @contextmanager
    def _transaction(self) -> Iterator[Session]:
        with self._database.transaction() as session:
            yield session

    @contextmanager
    def _writing(self) -> Iterator[Session]:
        with self._turn(), self._transaction() as session:
            yield session

    @contextmanager
    def _publishing(self, files: Sequence[tuple[FileRow, Draft]]) -> Iterator[Session]:
        """A transaction in which the rows of these drafts are to be added."""
        for _, draft in files:
            draft.settle()
        # From when the bytes are in place until a row owns them, nobody may delete the same bytes
        # of another file: the lock spans both.
        with self._turn():
            try:
                for row, draft in files:
                    self.directory.publish(draft, row.sha256)
                with self._transaction() as session:
                    yield session
            except Exception:
                # Whatever it was, it is raised again; bytes without a row must not stay.
                self._remove_unowned([row.sha256 for row, _ in files])
                raise

    def _remove_unowned(self, digests: Sequence[str]) -> None:
        """Removes those of these bytes that no file has any more. Holds the write lock."""
        query = select(FileRow.sha256).where(
            FileRow.sha256.in_(digests), FileRow.deleted_at.is_(None)
        )
        with self._reading() as session:
            owned = set(session.scalars(query))
        for digest in set(digests) - owned:
            self.directory.content(digest).unlink(missing_ok=True)


def _open_database(directory: BatchDirectory) -> Database:
    try:
        return Database(directory)
    except (OSError, DBAPIError) as error:
        fault = storage_fault(error, directory.database)
        if fault is None or fault.kind != "full" or not directory.give_reserve():
            raise
        # On a full disk nothing new can be taken in, but what is there can be read.
        logger.error("%s", fault.remedy)
        return Database(directory)


@contextmanager
def _opening(directory: BatchDirectory) -> Iterator[ExitStack]:
    """Gives the directory free if what comes next fails, and says why in words."""
    with ExitStack() as undo:
        undo.callback(directory.close)
        try:
            yield undo
        except (OSError, DBAPIError) as error:
            fault = storage_fault(error, directory.database)
            raise BatchDirectoryError(fault.remedy if fault else str(error)) from error
        undo.pop_all()


def _is_expired(row: FileRow, now: int) -> bool:
    return row.expires_at is not None and row.expires_at <= now


def _is_in_use(session: Session, file_id: str) -> str | None:
    """The id of an unfinished batch that reads the file."""
    return session.scalar(
        select(BatchRow.id)
        .where(BatchRow.input_file_id == file_id, BatchRow.status.in_(OPEN_STATUSES))
        .limit(1)
    )


def _has_open_reader() -> ColumnElement[bool]:
    return exists().where(BatchRow.input_file_id == FileRow.id, BatchRow.status.in_(OPEN_STATUSES))


def _require_room(session: Session, tenant: str, max_open: int) -> None:
    of_tenant = select(BatchRow.seq).where(BatchRow.tenant == tenant, BatchRow.stage.in_(STAGES))
    count = session.scalar(select(func.count()).select_from(of_tenant.subquery())) or 0
    if count >= max_open:
        raise ApiError(
            429,
            f"There are {count} open batches of yours, and this server keeps at most {max_open}. "
            "Wait until some have ended, or cancel some.",
            code="too_many_open_batches",
            kind="rate_limit_error",
            retry_after_seconds=_ROOM_RETRY_SECONDS,
        )


def _cursor(session: Session, table: type[Row], identifier: str, tenant: str) -> int:
    seq = session.scalar(select(table.seq).where(table.id == identifier, table.tenant == tenant))
    if seq is None:
        raise bad_request(
            f"after: no such object: {identifier[:80]}", code="invalid_cursor", param="after"
        )
    return seq


def _page(rows: Sequence[Row], limit: int) -> tuple[Sequence[Row], bool]:
    return rows[:limit], len(rows) > limit


def _assign(row: BatchRow, values: dict[str, Any]) -> None:
    for name, value in values.items():
        if name not in BatchRow.__table__.columns:
            raise AttributeError(f"a batch has no column {name!r}")
        if name in _STAMPS and value is not None:
            # A clock that was put back must not turn a batch's life round.
            value = max([value, *(at for at in map(row.__getattribute__, _STAMPS) if at)])
        setattr(row, name, value)
