"""The batch directory on disk: where things lie, who may use it, and how a file appears whole."""

from __future__ import annotations

import contextlib
import fcntl
import os
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO

from blendserve.batch.ids import is_batch_id, is_sha256, new_file_id


class BatchDirectoryError(Exception):
    """The batch directory cannot be used; the message names it and says what to do."""


class BatchDirectory:
    """Paths under one directory, held by one process.

    `blendserve.db` holds the objects, `files/` the bytes, each once and named by its SHA-256,
    `journals/` the results of unfinished batches, `tmp/` what is being written. Raises
    BatchDirectoryError if another process has it.
    """

    def __init__(self, root: str | os.PathLike[str]) -> None:
        self.root = Path(root).absolute()
        self._files = self.root / "files"
        self._journals = self.root / "journals"
        self._temporary = self.root / "tmp"
        try:
            for folder in (self.root, self._files, self._journals, self._temporary):
                folder.mkdir(parents=True, exist_ok=True)
            self._lock_fd = os.open(
                self.root / "lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644
            )
        except OSError as error:
            raise BatchDirectoryError(
                f"cannot use {self.root} as the batch directory: {error.strerror}. "
                "Give a folder that this user may write to."
            ) from error
        self._take_lock()
        self._clear_temporary()
        fsync_folder(self.root)

    @property
    def database(self) -> Path:
        return self.root / "blendserve.db"

    def content(self, sha256: str) -> Path:
        """Where the bytes of this digest lie. ValueError unless it has the strict form."""
        if not is_sha256(sha256):
            raise ValueError("not a SHA-256 digest")
        return self._files / sha256

    def journal(self, batch_id: str) -> Path:
        """Where a batch's results gather. ValueError unless the id has the strict form."""
        if not is_batch_id(batch_id):
            raise ValueError("not a batch id")
        return self._journals / f"{batch_id}.jsonl"

    def stored_digests(self) -> Iterator[str]:
        return (entry.name for entry in os.scandir(self._files) if is_sha256(entry.name))

    def stored_journal_ids(self) -> Iterator[str]:
        stems = (Path(entry.name).stem for entry in os.scandir(self._journals))
        return (stem for stem in stems if is_batch_id(stem))

    @contextlib.contextmanager
    def draft(self) -> Iterator[Draft]:
        """A temporary file to fill and publish; what is not published by the end is removed."""
        draft = Draft(self._temporary / new_file_id())
        try:
            yield draft
        finally:
            draft.discard()

    def publish(self, draft: Draft, sha256: str) -> None:
        """Puts the draft's bytes where its digest says: complete and durable, or not at all."""
        target = self.content(sha256)
        draft.settle()
        os.replace(draft.path, target)
        fsync_folder(self._files)

    def close(self) -> None:
        """Gives the directory free for another process."""
        if self._lock_fd >= 0:
            os.close(self._lock_fd)
            self._lock_fd = -1

    def _take_lock(self) -> None:
        try:
            fcntl.flock(self._lock_fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            holder = os.pread(self._lock_fd, 32, 0).decode("ascii", "replace").strip()
            os.close(self._lock_fd)
            self._lock_fd = -1
            raise BatchDirectoryError(
                f"the batch directory {self.root} is in use by another server"
                + (f" (process {holder})" if holder else "")
                + ". Stop that server, or start this one with another --batch-dir."
            ) from error
        os.ftruncate(self._lock_fd, 0)
        os.pwrite(self._lock_fd, f"{os.getpid()}\n".encode(), 0)

    def _clear_temporary(self) -> None:
        # Nobody else holds the lock, so whatever lies here was left by a process that died.
        for entry in os.scandir(self._temporary):
            os.unlink(entry.path)


class Draft:
    """A file under construction. `file` is open for writing until `settle`."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.file: BinaryIO = open(path, "xb")  # noqa: SIM115 - closed by settle or discard

    def settle(self) -> None:
        """Everything written so far is on disk, and the file is closed."""
        if not self.file.closed:
            self.file.flush()
            os.fsync(self.file.fileno())
            self.file.close()

    def discard(self) -> None:
        # Closing flushes, and on a full disk that fails; the bytes are not wanted any more.
        with contextlib.suppress(OSError):
            self.file.close()
        self.path.unlink(missing_ok=True)


def fsync_folder(folder: Path) -> None:
    """Makes renames and new names in `folder` durable."""
    descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
