"""Live progress of a batch: a line for eyes, or JSON lines for machines."""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Mapping
from types import TracebackType
from typing import Any, TextIO

from rich.console import Console
from rich.progress import BarColumn, Progress, SpinnerColumn, TextColumn, TimeElapsedColumn

from blendserve.cli.figures import Figures

_PLAIN_LINE_SECONDS = 5.0


class BatchDisplay:
    """A progress line that is fed with what the server says.

    Args:
        console: where to draw; a plain line every few seconds if it is no terminal.
    """

    def __init__(self, console: Console) -> None:
        self._progress = Progress(
            SpinnerColumn(),
            TextColumn("{task.description}"),
            BarColumn(bar_width=24),
            TextColumn("{task.fields[counts]}"),
            TextColumn("{task.fields[rates]}"),
            TimeElapsedColumn(),
            TextColumn("{task.fields[eta]}"),
            console=console,
        )
        self._task = self._progress.add_task("starting", total=1, counts="", rates="", eta="")
        self._console = console
        self._printed_at = -_PLAIN_LINE_SECONDS

    def __enter__(self) -> BatchDisplay:
        if self._console.is_terminal:
            self._progress.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._progress.stop()

    def update(
        self, state: str, counts: Mapping[str, int], figures: Figures, note: str | None = None
    ) -> None:
        """Show a look at the job. `counts` has total, completed, failed and perhaps retried."""
        now = time.monotonic()
        done = counts["completed"] + counts["failed"]
        said = f"{done}/{counts['total']} done, {counts['failed']} failed"
        if not counts["total"]:
            said = ""  # Not counted yet: "0/0 done" would read as the end of an empty job.
        if counts.get("retried"):
            said += f", {counts['retried']} retried"
        eta = f"ETA {figures.eta_seconds:.0f} s" if figures.eta_seconds is not None else ""
        described = f"{state} ({note})" if note else state
        rates = figures.as_text()
        self._progress.update(
            self._task,
            description=described,
            total=max(counts["total"], 1),
            completed=done,
            counts=said,
            rates=rates,
            eta=eta,
        )
        if not self._console.is_terminal and now - self._printed_at >= _PLAIN_LINE_SECONDS:
            self._printed_at = now
            self._console.print(
                "  ".join(filter(None, [f"{described}: {said}".rstrip(": "), rates, eta])),
                soft_wrap=True,
                markup=False,
                highlight=False,
            )


class JsonStatus:
    """The same as JSON lines, one a second and one for every change of state."""

    def __init__(self, stream: TextIO | None = None) -> None:
        self._stream = stream if stream is not None else sys.stdout
        self._printed_at = -1.0
        self._state = ""

    def __enter__(self) -> JsonStatus:
        return self

    def __exit__(self, *_: object) -> None:
        return None

    def update(
        self, state: str, counts: Mapping[str, int], figures: Figures, note: str | None = None
    ) -> None:
        """See `BatchDisplay.update`."""
        now = time.monotonic()
        if state == self._state and now - self._printed_at < 1.0:
            return
        self._state, self._printed_at = state, now
        self.say({"state": state, **counts, **figures.__dict__, "note": note})

    def say(self, event: Mapping[str, Any]) -> None:
        """One line, at once."""
        print(json.dumps(event), file=self._stream, flush=True)
