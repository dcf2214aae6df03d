"""The folder that holds the state of one ``run-batch`` job, and who may use it."""

from __future__ import annotations

import fcntl
import os
import shutil
from pathlib import Path
from types import TracebackType

from blendserve.batch.directory import fsync_folder

_PROCESS = "process"
_REPLACED = "replaced-"


class StateBusy(RuntimeError):
    """Another run has the folder; the message names its process."""


class RunState:
    """`OUTPUT.blendserve`, held by one run at a time while it is entered.

    The lock is on the folder itself, so no file in it can be removed from under it.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._ended = folder.with_name(f".{folder.name}.ended")
        self._descriptor = -1

    def __enter__(self) -> RunState:
        while True:
            self.folder.mkdir(0o700, exist_ok=True)
            try:
                descriptor = os.open(self.folder, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
            except FileNotFoundError:
                continue
            try:
                fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
                if self._is_the_folder(descriptor):
                    break
                # The run before removed it just now, at its end.
                os.close(descriptor)
            except BlockingIOError as error:
                os.close(descriptor)
                raise StateBusy(
                    f"another run-batch{self._holder()} works in {self.folder}. Wait until it has "
                    "ended, stop it, or give another -o."
                ) from error
        self._descriptor = descriptor
        # What a run left that was killed while it removed its state.
        shutil.rmtree(self._ended, ignore_errors=True)
        (self.folder / _PROCESS).write_text(f"{os.getpid()}\n")
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        os.close(self._descriptor)

    def set_aside(self) -> None:
        """Begin anew. What an earlier run left stays in a folder of its own until `remove`."""
        names = [
            entry.name
            for entry in os.scandir(self.folder)
            if entry.name != _PROCESS and not entry.name.startswith(_REPLACED)
        ]
        if not names:
            return
        number = sum(1 for _ in self.folder.glob(f"{_REPLACED}*"))
        aside = self.folder / f"{_REPLACED}{number}"
        aside.mkdir(0o700)
        for name in names:
            os.replace(self.folder / name, aside / name)
        fsync_folder(self.folder)

    def remove(self) -> None:
        """The job has ended, and its results are in place. The folder goes at once, or not at all:
        half of one would be taken for a job that has not ended."""
        shutil.rmtree(self._ended, ignore_errors=True)
        os.replace(self.folder, self._ended)
        fsync_folder(self.folder.parent)
        shutil.rmtree(self._ended)

    def _is_the_folder(self, descriptor: int) -> bool:
        try:
            return os.path.samestat(os.stat(self.folder), os.fstat(descriptor))
        except FileNotFoundError:
            return False

    def _holder(self) -> str:
        try:
            return f" (process {int((self.folder / _PROCESS).read_text())})"
        except (OSError, ValueError):
            return ""
