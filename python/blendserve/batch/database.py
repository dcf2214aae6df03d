"""The SQLite database of a batch directory: connections, transactions, schema versions."""

from __future__ import annotations

import os
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from sqlalchemy import Connection, Engine, create_engine, event
from sqlalchemy.orm import Session

from blendserve.batch.directory import (
    FILE_MODE,
    BatchDirectory,
    BatchDirectoryError,
    fsync_folder,
    keep_private,
)
from blendserve.batch.orphans import refuse_empty_database
from blendserve.batch.storage import DatabaseBusy
from blendserve.batch.tables import SCHEMA_VERSION, STAGE_SQL, TERMINAL_STATUSES, Base, WebhookRow

# How long a write waits for those before it, and then for another process. The first is long: a
# slow disk is no reason to refuse anything.
_TURN_SECONDS, _BUSY_SECONDS = 20.0, 2.0
BLOCK_ROWS = 500
"""What one write changes at most where a time comes for many: it holds up all others."""
_OLDEST_VERSION = 3
_BEFORE_WEBHOOKS = 4


class Database:
    """Sessions for reading and for writing, from any thread.

    Readers see the last commit and wait for nobody. One writer at a time: a lock of ours orders
    them, and whoever waits too long for it or for another process gets an error that
    `storage_fault` calls `locked`. Raises BatchDirectoryError for a schema that is not known.
    """

    def __init__(self, directory: BatchDirectory) -> None:
        self._directory = directory
        self._turn = threading.Lock()
        if not directory.database.exists() or not directory.database.stat().st_size:
            refuse_empty_database(directory)
        _create_private(directory)
        self._readers = _engine(directory, "BEGIN")
        self._writers = _engine(directory, "BEGIN IMMEDIATE")
        try:
            self._prepare_schema()
        except BaseException:
            self.close()
            raise

    def close(self) -> None:
        self._readers.dispose()
        self._writers.dispose()

    @contextmanager
    def reading(self) -> Iterator[Session]:
        """A session over one state of the database."""
        with Session(self._readers, expire_on_commit=False) as session:
            yield session

    @contextmanager
    def turn(self) -> Iterator[None]:
        """Holds the right to write. FileNotFoundError if the directory is gone."""
        if not self._turn.acquire(timeout=_TURN_SECONDS):
            raise DatabaseBusy
        try:
            self._directory.require_present()
            yield
        finally:
            self._turn.release()

    @contextmanager
    def transaction(self) -> Iterator[Session]:
        """One transaction: all of it durable at the end, or nothing. Within a `turn`."""
        with Session(self._writers, expire_on_commit=False) as session, session.begin():
            yield session

    @contextmanager
    def writing(self) -> Iterator[Session]:
        """A transaction in a turn of its own."""
        with self.turn(), self.transaction() as session:
            yield session

    def _prepare_schema(self) -> None:
        with self._writers.begin() as connection:
            version = connection.exec_driver_sql("PRAGMA user_version").scalar_one()
            if version == 0 and not _has_tables(connection):
                # With no table in it it may have bytes all the same: what its -wal file held.
                refuse_empty_database(self._directory)
                Base.metadata.create_all(connection)
            elif version in (0, _OLDEST_VERSION):
                # The release of that version wrote the number after the tables.
                _migrate_from_3(connection)
                _migrate_from_4(connection)
            elif version == _BEFORE_WEBHOOKS:
                _migrate_from_4(connection)
            elif version != SCHEMA_VERSION:
                raise BatchDirectoryError(
                    f"{self._directory.database} has schema version {version}, and this program "
                    f"knows versions {_OLDEST_VERSION} to {SCHEMA_VERSION}. Use the program that "
                    "wrote it, or give another --batch-dir."
                )
            if version != SCHEMA_VERSION:
                connection.exec_driver_sql(f"PRAGMA user_version = {SCHEMA_VERSION}")


def _create_private(directory: BatchDirectory) -> None:
    """SQLite gives the files beside the database its own mode."""
    path = directory.database
    os.close(os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, FILE_MODE))
    for suffix in ("", "-wal", "-shm"):
        beside = path.with_name(path.name + suffix)
        if beside.exists():
            keep_private(beside)
    fsync_folder(directory.root)


def _engine(directory: BatchDirectory, begin: str) -> Engine:
    # Bounded by the threads that use it; one that had to wait for another would not be a reader.
    engine = create_engine(f"sqlite:///{directory.database}", pool_size=8, max_overflow=-1)
    event.listen(engine, "connect", _configure)
    event.listen(engine, "begin", lambda connection: connection.exec_driver_sql(begin))
    return engine


def _configure(connection: Any, _record: Any) -> None:
    # The driver would begin transactions by rules of its own.
    connection.isolation_level = None
    # FULL: a status that a client has seen survives a power cut as well as a kill.
    for pragma in (
        f"busy_timeout={int(1_000 * _BUSY_SECONDS)}",
        *("journal_mode=WAL", "synchronous=FULL", "foreign_keys=ON"),
    ):
        connection.execute(f"PRAGMA {pragma}").close()


def _has_tables(connection: Connection) -> bool:
    query = "SELECT count(*) FROM sqlite_master WHERE name = 'files'"
    return bool(connection.exec_driver_sql(query).scalar_one())


def _migrate_from_3(connection: Connection) -> None:
    """`stage` and its indexes, and fingerprints that do not say what they were made of."""
    connection.exec_driver_sql("DROP INDEX IF EXISTS batches_by_status")
    connection.exec_driver_sql(
        f"ALTER TABLE batches ADD COLUMN stage VARCHAR GENERATED ALWAYS AS ({STAGE_SQL}) VIRTUAL"
    )
    for table in Base.metadata.sorted_tables:
        for index in table.indexes if table.name != WebhookRow.__tablename__ else ():
            index.create(connection, checkfirst=True)
    # Digests of that release depend on where the model lay and on versions of libraries: no engine
    # of today has them. Open batches wait for one of the same served name instead.
    ended = ", ".join(f"'{status}'" for status in TERMINAL_STATUSES)
    rows = connection.exec_driver_sql(
        "SELECT id, fingerprint FROM batches "
        f"WHERE instr(fingerprint, '@') AND status NOT IN ({ended})"
    ).all()
    for batch_id, fingerprint in rows:
        name = fingerprint.rpartition("@")[0]
        connection.exec_driver_sql(
            "UPDATE batches SET fingerprint = ? WHERE id = ?", (f"{name}@", batch_id)
        )


def _migrate_from_4(connection: Connection) -> None:
    """Webhooks came."""
    Base.metadata.create_all(connection, tables=[Base.metadata.tables[WebhookRow.__tablename__]])
