"""Files, batches and idempotency keys, in SQLite beside the bytes that they describe."""

from __future__ import annotations

import os
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal, TypeVar

from sqlalchemy import create_engine, event, func, select
from sqlalchemy.exc import DatabaseError
from sqlalchemy.orm import Session

from blendserve.batch.directory import BatchDirectory, BatchDirectoryError, Draft
from blendserve.batch.errors import bad_request, conflict, not_found
from blendserve.batch.tables import (
    SCHEMA_VERSION,
    TERMINAL_STATUSES,
    Base,
    BatchRow,
    FileRow,
    IdempotencyRow,
)

Row = TypeVar("Row", FileRow, BatchRow)


class BatchStore:
    """The objects of one batch directory. Every method may be called from any thread.

    Rows are handed out detached: they are snapshots, and changing one changes nothing. Raises
    BatchDirectoryError if the directory is in use, not writable, or of another schema version.
    """

    def __init__(self, batch_dir: str | os.PathLike[str]) -> None:
        self.directory = BatchDirectory(batch_dir)
        # One process owns the directory, so a lock of ours orders the writers: SQLite then never
        # has to answer "database is locked".
        self._write_lock = threading.Lock()
        self._engine = create_engine(f"sqlite:///{self.directory.database}")
        event.listen(self._engine, "connect", _configure_connection)
        try:
            self._prepare_schema()
            self._remove_orphans()
        except DatabaseError as error:
            self.close()
            raise BatchDirectoryError(
                f"{self.directory.database} cannot be read ({type(error.orig).__name__}: "
                f"{error.orig}). Restore it from a backup, or give another --batch-dir."
            ) from error
        except BaseException:
            self.close()
            raise

    def close(self) -> None:
        """Closes the database and gives the directory free."""
        self._engine.dispose()
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
            gone = row is None or row.deleted_at is not None
            if row is None or gone:
                return None
            if not _is_expired(row, now) or _is_in_use(session, file_id):
                return row
        self._bury_expired(now)
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
        self._bury_expired(now)
        query = select(FileRow).where(FileRow.tenant == tenant, FileRow.deleted_at.is_(None))
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
        with self._write_lock:
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

    # -- batches

    def add_batch(
        self, row: BatchRow, *, now: int, idempotency: tuple[str, str] | None = None
    ) -> BatchRow:
        """Creates a batch, or finds the one that the same idempotency key has created before.

        `idempotency` is (key, sha256 of the request). ApiError 404 if the input file is gone, 409
        if the key came with another request.
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
            session.add(row)
            session.flush()
            if idempotency is not None:
                key, digest = idempotency
                session.add(
                    IdempotencyRow(
                        tenant=row.tenant,
                        key=key,
                        request_sha256=digest,
                        batch_id=row.id,
                        created_at=now,
                    )
                )
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

    def open_batches(self, status: str) -> Sequence[BatchRow]:
        """Batches in `status` that head for no ending yet; whose window closes first is first."""
        query = select(BatchRow).where(BatchRow.status == status, BatchRow.ending.is_(None))
        with self._reading() as session:
            return session.scalars(query.order_by(BatchRow.expires_at, BatchRow.seq)).all()

    def ending_batches(self) -> Sequence[BatchRow]:
        """Batches that head for an ending and are not there yet, oldest first."""
        query = select(BatchRow).where(
            BatchRow.status.not_in(TERMINAL_STATUSES), BatchRow.ending.is_not(None)
        )
        with self._reading() as session:
            return session.scalars(query.order_by(BatchRow.seq)).all()

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

    def expire_overdue(self, now: int) -> Sequence[str]:
        """Sends running batches that are past their completion window to the ending `expired`."""
        query = select(BatchRow).where(
            BatchRow.status == "in_progress", BatchRow.ending.is_(None), BatchRow.expires_at <= now
        )
        with self._writing() as session:
            rows = session.scalars(query).all()
            for row in rows:
                row.ending = "expired"
            return [row.id for row in rows]

    def next_expiry(self) -> int | None:
        """When the first of the running batches expires, in unix seconds."""
        query = select(func.min(BatchRow.expires_at)).where(
            BatchRow.status == "in_progress", BatchRow.ending.is_(None)
        )
        with self._reading() as session:
            return session.scalar(query)

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
        with Session(self._engine, expire_on_commit=False) as session:
            yield session

    @contextmanager
    def _writing(self) -> Iterator[Session]:
        with self._write_lock, self._transaction() as session:
            yield session

    @contextmanager
    def _transaction(self) -> Iterator[Session]:
        with Session(self._engine, expire_on_commit=False) as session, session.begin():
            yield session

    @contextmanager
    def _publishing(self, files: Sequence[tuple[FileRow, Draft]]) -> Iterator[Session]:
        """A transaction in which the rows of these drafts are to be added."""
        for _, draft in files:
            draft.settle()
        # From when the bytes are in place until a row owns them, nobody may delete the same bytes
        # of another file: the lock spans both.
        with self._write_lock:
            try:
                for row, draft in files:
                    self.directory.publish(draft, row.sha256)
                with self._transaction() as session:
                    yield session
            except Exception:
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

    def _prepare_schema(self) -> None:
        with self._engine.connect() as connection:
            version = connection.exec_driver_sql("PRAGMA user_version").scalar_one()
        if version == 0:
            Base.metadata.create_all(self._engine)
            with self._engine.begin() as connection:
                connection.exec_driver_sql(f"PRAGMA user_version = {SCHEMA_VERSION}")
        elif version != SCHEMA_VERSION:
            raise BatchDirectoryError(
                f"{self.directory.database} has schema version {version}, and this program knows "
                f"version {SCHEMA_VERSION}. Use the program that wrote it, or give another "
                "--batch-dir."
            )

    def _remove_orphans(self) -> None:
        """Removes bytes that no object owns: a crash came between the two."""
        with self._reading() as session:
            owned = set(session.scalars(select(FileRow.sha256).where(FileRow.deleted_at.is_(None))))
            unfinished = set(
                session.scalars(
                    select(BatchRow.id).where(BatchRow.status.not_in(TERMINAL_STATUSES))
                )
            )
        for digest in self.directory.stored_digests():
            if digest not in owned:
                self.directory.content(digest).unlink(missing_ok=True)
        for batch_id in self.directory.stored_journal_ids():
            if batch_id not in unfinished:
                self.directory.journal(batch_id).unlink(missing_ok=True)

    def _bury_expired(self, now: int) -> None:
        query = select(FileRow).where(FileRow.deleted_at.is_(None), FileRow.expires_at <= now)
        with self._reading() as session:
            if session.scalar(query.limit(1)) is None:
                return
        with self._write_lock:
            with self._transaction() as session:
                rows = [row for row in session.scalars(query) if not _is_in_use(session, row.id)]
                for row in rows:
                    row.deleted_at = now
            self._remove_unowned([row.sha256 for row in rows])


def _configure_connection(connection: Any, _record: Any) -> None:
    # FULL: a status that a client has seen survives a power cut as well as a kill.
    for pragma in ("journal_mode=WAL", "synchronous=FULL", "foreign_keys=ON", "busy_timeout=5000"):
        connection.execute(f"PRAGMA {pragma}").close()


def _is_expired(row: FileRow, now: int) -> bool:
    return row.expires_at is not None and row.expires_at <= now


def _is_in_use(session: Session, file_id: str) -> str | None:
    """The id of an unfinished batch that reads the file."""
    return session.scalar(
        select(BatchRow.id)
        .where(BatchRow.input_file_id == file_id, BatchRow.status.not_in(TERMINAL_STATUSES))
        .limit(1)
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
        setattr(row, name, value)
