"""The batch directory on disk: where things lie, who may use it, and how a file appears whole."""

from __future__ import annotations

import contextlib
import fcntl
import logging
import os
import stat
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO

from blendserve.batch.ids import is_batch_id, is_file_id, is_sha256, new_file_id
from blendserve.batch.storage import storage_fault

logger = logging.getLogger(__name__)

# Prompts and answers are nobody else's business, whatever the umask.
FOLDER_MODE, FILE_MODE = 0o700, 0o600
# What SQLite needs to open its log (a page of shared memory), and some more.
_RESERVE_BYTES = 128 * 1024
LOST_SECONDS = 7 * 86_400
"""How long what nothing refers to is kept in `lost/`."""


class BatchDirectoryError(Exception):
    """The batch directory cannot be used; the message names it and says what to do."""


class BatchDirectory:
    """Paths under one directory, held by one process.

    `blendserve.db` holds the objects, `files/` the bytes, each once and named by its SHA-256,
    `journals/` the results of unfinished batches, `tmp/` what is being written, `lost/` for a time
    what a crash left. Raises BatchDirectoryError if another process has it.
    """

    def __init__(self, root: str | os.PathLike[str]) -> None:
        self.root = Path(root).absolute()
        self._files = self.root / "files"
        self._journals = self.root / "journals"
        self._temporary = self.root / "tmp"
        self._lost = self.root / "lost"
        self._descriptors: list[int] = []
        if self.root.is_symlink() and not self.root.exists():
            raise BatchDirectoryError(f"{self.root} is a link to nothing. Give a folder.")
        if self.root.exists() and not self.root.is_dir():
            raise BatchDirectoryError(f"{self.root} is not a folder. Give a folder.")
        try:
            _make_folders(self.root)
            self._take_locks()
            for folder in (self._files, self._journals, self._temporary):
                folder.mkdir(FOLDER_MODE, exist_ok=True)
                keep_private(folder)
            self._clear_temporary()
            fsync_folder(self.root)
        except OSError as error:
            self.close()
            fault = storage_fault(error, self.database)
            raise BatchDirectoryError(fault.remedy if fault else str(error)) from error
        except BatchDirectoryError:
            self.close()
            raise
        _warn_if_open(self.root)

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

    def set_aside(self, path: Path) -> None:
        """Moves what nothing refers to into `lost/`, where it stays for LOST_SECONDS."""
        self.keep(path)
        path.unlink()
        logger.warning("%s belongs to nothing and was moved to %s", path, self._lost)

    def keep(self, path: Path) -> None:
        """Lets a file that is about to go stay in `lost/` for LOST_SECONDS."""
        self._lost.mkdir(FOLDER_MODE, exist_ok=True)
        target = self._lost / path.name
        target.unlink(missing_ok=True)
        # Its time there is counted from now.
        os.utime(path)
        os.link(path, target)
        fsync_folder(self._lost)

    def clear_lost(self, now: float) -> None:
        """Removes what has been in `lost/` for long enough; `now` is in unix seconds."""
        with contextlib.suppress(FileNotFoundError):
            for entry in os.scandir(self._lost):
                is_old = entry.stat(follow_symlinks=False).st_mtime + LOST_SECONDS < now
                if is_old and entry.is_file(follow_symlinks=False):
                    os.unlink(entry.path)

    def hold_reserve(self) -> None:
        """Keeps some space, so that the next start need not find any."""
        path = self.root / "reserve"
        if path.exists():
            keep_private(path)
            return
        try:
            with open(path, "xb", opener=private_opener) as file:
                os.posix_fallocate(file.fileno(), 0, _RESERVE_BYTES)
        except OSError:
            # Full, for now. Half of it would be no help.
            path.unlink(missing_ok=True)

    def give_reserve(self) -> bool:
        """Makes the reserved space free; False if there was none."""
        try:
            (self.root / "reserve").unlink()
        except FileNotFoundError:
            return False
        return True

    def require_present(self) -> None:
        """FileNotFoundError if the directory is not where it was: SQLite would not notice."""
        seen = os.stat(self.root)
        if not os.path.samestat(seen, os.fstat(self._descriptors[0])):
            raise FileNotFoundError(2, "it is another folder than the one that was opened")
        os.stat(self.database)

    def close(self) -> None:
        """Gives the directory free for another process."""
        while self._descriptors:
            os.close(self._descriptors.pop())

    def _take_locks(self) -> None:
        # The folder itself: a file in it could be removed, and a second server let in. The file as
        # well, for earlier releases, which lock that one only.
        folder = os.open(self.root, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        self._descriptors.append(folder)
        path = self.root / "lock"
        file = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, FILE_MODE)
        self._descriptors.append(file)
        for descriptor in (folder, file):
            try:
                fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError as error:
                raise self._is_in_use(file) from error
            except OSError as error:
                raise BatchDirectoryError(
                    f"{self.root} cannot be locked ({error.strerror}). It must be on a local file "
                    "system: give another --batch-dir."
                ) from error
        keep_private(path)
        # For the message only, so a full disk is no reason to fail.
        with contextlib.suppress(OSError):
            os.ftruncate(file, 0)
            os.pwrite(file, f"{os.getpid()}\n".encode(), 0)

    def _is_in_use(self, lock_file: int) -> BatchDirectoryError:
        holder = os.pread(lock_file, 32, 0).decode("ascii", "replace").strip()
        return BatchDirectoryError(
            f"the batch directory {self.root} is in use by another server"
            + (f" (process {holder})" if holder else "")
            + ". Stop that server, or start this one with another --batch-dir."
        )

    def _clear_temporary(self) -> None:
        # Nobody else holds the locks, so drafts that lie here were left by a process that died.
        for entry in os.scandir(self._temporary):
            if is_file_id(entry.name) and entry.is_file(follow_symlinks=False):
                os.unlink(entry.path)


class Draft:
    """A file under construction. `file` is open for writing until `settle`."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.file: BinaryIO = open(  # noqa: SIM115 - closed by settle or discard
            path, "xb", opener=private_opener
        )

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


def private_opener(path: str, flags: int) -> int:
    """For `open`: a file that it makes is its user's only."""
    return os.open(path, flags, FILE_MODE)


def fsync_folder(folder: Path) -> None:
    """Makes renames and new names in `folder` durable."""
    descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _make_folders(root: Path) -> None:
    """Makes the folder and those above it that are missing, each durably."""
    missing = [folder for folder in (root, *root.parents) if not folder.exists()]
    for folder in reversed(missing):
        # Those above are the user's own, who may share them.
        folder.mkdir(FOLDER_MODE if folder == root else 0o777, exist_ok=True)
        fsync_folder(folder.parent)


def keep_private(path: Path) -> None:
    mode = FOLDER_MODE if path.is_dir() else FILE_MODE
    if stat.S_IMODE(path.stat().st_mode) != mode:
        try:
            path.chmod(mode)
        except PermissionError:
            logger.warning("%s is another user's, and open to more than one", path)


def _warn_if_open(root: Path) -> None:
    # It may be a folder that is shared on purpose, so it is told and left alone. What lies in it
    # is private all the same, unless others may put something else in its place.
    mode = stat.S_IMODE(root.stat().st_mode)
    if mode & 0o077:
        logger.warning(
            "%s is open to other users (mode %o); close it with: chmod 700 %s", root, mode, root
        )
