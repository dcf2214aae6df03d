"""What is wrong with the disk or the database: one kind of fault each, with its own remedy."""

from __future__ import annotations

import errno
import os
import sqlite3
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from sqlalchemy.exc import DBAPIError

from blendserve.batch.errors import ApiError

FaultKind = Literal["full", "locked", "damaged", "missing", "handles", "denied", "failing"]

_ERRNO_KINDS: dict[int, FaultKind] = {
    errno.ENOSPC: "full",
    errno.EDQUOT: "full",
    errno.ENOENT: "missing",
    errno.ENOTDIR: "missing",
    errno.ESTALE: "missing",
    errno.EMFILE: "handles",
    errno.ENFILE: "handles",
    errno.EACCES: "denied",
    errno.EPERM: "denied",
    errno.EROFS: "denied",
}
_SQLITE_KINDS: dict[int, FaultKind] = {
    sqlite3.SQLITE_FULL: "full",
    sqlite3.SQLITE_BUSY: "locked",
    sqlite3.SQLITE_LOCKED: "locked",
    sqlite3.SQLITE_CORRUPT: "damaged",
    sqlite3.SQLITE_NOTADB: "damaged",
}
# SQLite says the same of many causes; which one it is, the file system tells.
_TO_LOOK_AT = frozenset(
    {sqlite3.SQLITE_IOERR, sqlite3.SQLITE_CANTOPEN, sqlite3.SQLITE_READONLY, sqlite3.SQLITE_PERM}
)
# SQLite's shared memory file, and a page of its log.
_LEAST_FREE_BYTES = 64 * 1024
_RETRY_SECONDS = 5


class DatabaseBusy(Exception):
    """The turn to write did not come in time: whoever has it waits for the database's lock."""


@dataclass(frozen=True)
class StorageFault:
    """`cause` is the system's own word, for the log; `database` is the path."""

    kind: FaultKind
    cause: str
    database: Path

    @property
    def remedy(self) -> str:
        """For whoever runs the server: names the path, what is wrong, and what to do."""
        root, database, cause = self.database.parent, self.database, self.cause
        return {
            "full": f"the disk of {root} is full ({cause}). Nothing in it is damaged: make space.",
            "locked": f"{database} is locked by another process ({cause}), such as a backup or an "
            "sqlite3 shell with an open transaction. End that.",
            "damaged": f"{database} cannot be read, it is damaged ({cause}). Keep a copy of "
            f"{root}; then restore it from a backup, or give another --batch-dir.",
            "missing": f"{database} is not there any more ({cause}): it or its folder was moved "
            "or removed. Put it back, and start the server again.",
            "handles": f"{root} cannot be used: too many open files ({cause}). Raise the limit "
            "(`ulimit -n`, systemd's LimitNOFILE), and start the server again.",
            "denied": f"cannot use {root} as the batch directory: {cause}. Give a folder that "
            "this user may write to.",
            "failing": f"the disk of {root} fails ({cause}). The system's log tells more; nothing "
            "should be written there until it is put right.",
        }[self.kind]

    @property
    def answer(self) -> ApiError:
        """For clients, who neither know the path nor need it."""
        status, code, message = {
            "full": (
                507,
                "storage_unavailable",
                "The disk of the server's batch directory is full. Nothing was changed; send the "
                "request again once there is space.",
            ),
            "locked": (
                503,
                "storage_locked",
                "Another process has blendserve.db locked, for example a backup. Nothing was "
                "changed; send the request again.",
            ),
            "damaged": (500, "storage_damaged", "The server's database is damaged."),
            "missing": (500, "storage_missing", "The server's batch directory is gone."),
            "handles": (
                503,
                "too_many_open_files",
                "The server has too many files open. Nothing was changed; send the request again.",
            ),
            "denied": (500, "storage_denied", "The server may not use its batch directory."),
            "failing": (500, "storage_failing", "The disk of the server's batch directory fails."),
        }[self.kind]
        return ApiError(
            status,
            message,
            code=code,
            kind="server_error",
            retry_after_seconds=_RETRY_SECONDS if status == 503 else None,
        )


def storage_fault(error: BaseException, database: Path) -> StorageFault | None:
    """What `error` says of the storage; None if it is about something else."""
    if isinstance(error, DatabaseBusy):
        return StorageFault("locked", "it was not free in time", database)
    if isinstance(error, OSError):
        cause = error.strerror or type(error).__name__
        return StorageFault(_ERRNO_KINDS.get(error.errno or 0, "failing"), cause, database)
    if isinstance(error, DBAPIError) and isinstance(error.orig, sqlite3.Error):
        error = error.orig
    if not isinstance(error, sqlite3.Error):
        return None
    code = getattr(error, "sqlite_errorcode", sqlite3.SQLITE_ERROR) & 0xFF
    cause = f"{error}, {getattr(error, 'sqlite_errorname', type(error).__name__)}"
    if code in _SQLITE_KINDS:
        return StorageFault(_SQLITE_KINDS[code], cause, database)
    return StorageFault(_look(database), cause, database) if code in _TO_LOOK_AT else None


def _look(database: Path) -> FaultKind:
    try:
        os.close(os.open(database, os.O_RDWR | os.O_CLOEXEC))
        space = os.statvfs(database.parent)
    except OSError as error:
        return _ERRNO_KINDS.get(error.errno or 0, "failing")
    return "full" if space.f_bavail * space.f_frsize < _LEAST_FREE_BYTES else "failing"
