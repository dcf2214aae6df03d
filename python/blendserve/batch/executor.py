"""What the batch room asks of an engine: check a line, and run the lines that are left."""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable, Collection, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol


class EngineUnavailable(Exception):
    """There is no engine: it loads, died or hangs. The job keeps its lines and waits for one.

    `in_flight` holds the indexes of the lines that the engine had begun when it died.
    """

    def __init__(self, message: str, in_flight: Collection[int] = ()) -> None:
        super().__init__(message)
        self.in_flight = frozenset(in_flight)


@dataclass(frozen=True)
class BatchLine:
    """One request of an input file; `index` counts requests from 0, blank lines apart."""

    index: int
    custom_id: str
    url: str
    body: dict[str, Any]


@dataclass(frozen=True)
class LineFault:
    """Why a line cannot be run, in the words of OpenAI's batch errors."""

    code: str
    message: str
    param: str | None = None


@dataclass(frozen=True)
class LineError:
    """Why a line got no response at all, e.g. `request_timeout`."""

    code: str
    message: str


@dataclass(frozen=True)
class LineResult:
    """The answer to one line: a response (any HTTP status), or an error where there was none.

    Token counts are read from `body["usage"]`; they are not carried a second time.
    """

    index: int
    request_id: str
    status_code: int | None = None
    body: dict[str, Any] | None = None
    error: LineError | None = None


class Lines(Protocol):
    """Lines by index."""

    def read(self, index: int) -> BatchLine:
        """The line `index`. Safe to call from several threads."""
        ...


class LineSource(Lines, Protocol):
    """The lines of one input file, read on demand: only their offsets are held in memory."""

    @property
    def path(self) -> Path:
        """The file; another process of this machine may read it, too."""
        ...

    @property
    def max_line_bytes(self) -> int: ...

    def __len__(self) -> int: ...


def same_engine(begun: str, fingerprint: str) -> bool:
    """Whether this engine may go on with what was begun with the fingerprint `begun`.

    `NAME@` is what a batch of an earlier release has: any engine of that served name.
    """
    name, at, _ = fingerprint.rpartition("@")
    return begun == fingerprint or (bool(at) and begun == f"{name}@")


class Executor(Protocol):
    """Runs lines. One per server.

    `endpoints` are the urls a line may have, `models` the served names (empty: any name is
    taken), and `fingerprint` names model and settings: equal fingerprints promise answers that
    may stand in one output file. All three raise `EngineUnavailable` before an engine is known.
    """

    @property
    def endpoints(self) -> frozenset[str]: ...

    @property
    def models(self) -> frozenset[str]: ...

    @property
    def fingerprint(self) -> str: ...

    def check(self, line: BatchLine) -> LineFault | None:
        """The reason why this line can never succeed, or None. Called from a worker thread."""
        ...

    def run(
        self,
        job_id: str,
        lines: LineSource,
        pending: Sequence[int],
        on_start: Callable[[int], None],
        deadline: float | None = None,
    ) -> AsyncIterator[LineResult]:
        """An async generator with one result for each index in `pending`, in any order.

        Several may run at once. One that may miss its `deadline` (unix seconds) goes first.
        `on_start` is called with an index when its line goes to the engine: if that dies, these
        are the lines that may have killed it. Cancelling or closing the generator must abort
        whatever is in flight before it returns. Raises `EngineUnavailable` when the engine died;
        results already yielded stay valid.
        """
        ...
