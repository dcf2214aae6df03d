"""Peak memory of an engine: all processes below one, pages that they share counted once."""

from __future__ import annotations

import contextlib
import re
import threading
from collections.abc import Iterator
from pathlib import Path
from types import TracebackType

import psutil

_INTERVAL_SECONDS = 0.5
_PSS = re.compile(r"^Pss:\s+(\d+) kB", re.MULTILINE)


class PeakMemory:
    """While it is entered, watches the descendants of a process that are not that process.

    Attributes:
        peak_bytes: the largest sum of their proportional set sizes that was seen.
    """

    def __init__(self, parent_pid: int) -> None:
        self.peak_bytes = 0
        self._parent = psutil.Process(parent_pid)
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._watch, daemon=True)

    def __enter__(self) -> PeakMemory:
        self._thread.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._ended.set()
        self._thread.join()

    def _watch(self) -> None:
        while not self._ended.wait(_INTERVAL_SECONDS):
            with contextlib.suppress(psutil.NoSuchProcess):
                self.peak_bytes = max(self.peak_bytes, sum(self._sizes()))

    def _sizes(self) -> Iterator[int]:
        for child in self._parent.children(recursive=True):
            # A process may end between the two lines.
            with contextlib.suppress(OSError, AttributeError):
                text = Path(f"/proc/{child.pid}/smaps_rollup").read_text()
                found = _PSS.search(text)
                yield 1024 * int(found.group(1)) if found else 0
