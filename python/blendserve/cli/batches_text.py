"""Batches of a server as a person reads them."""

from __future__ import annotations

import io
from collections.abc import Sequence
from datetime import datetime

from openai.types import Batch
from rich.console import Console
from rich.table import Table

from blendserve.batch import BatchFault
from blendserve.cli.input_check import fault_lines

_STAMPS = ("created", "in_progress", "finalizing", "completed", "failed", "expired", "cancelled")
_WIDTH = 200


def listed(batches: Sequence[Batch]) -> str:
    """A table, newest first."""
    if not batches:
        return "no batches"
    rows = [
        (
            batch.id,
            batch.status,
            _counts(batch),
            batch.endpoint,
            _time(batch.created_at),
            ", ".join(f"{name}={value}" for name, value in (batch.metadata or {}).items()),
        )
        for batch in batches
    ]
    return _table(rows, ("batch", "status", "answered", "endpoint", "created", "metadata"))


def batch_text(batch: Batch) -> str:
    """All that there is to tell of one."""
    rows = [
        ("batch", batch.id),
        ("status", batch.status),
        ("note", getattr(batch, "note", None)),
        ("answered", _counts(batch)),
        ("endpoint", batch.endpoint),
        ("model", getattr(batch, "model", None)),
        ("window", f"{batch.completion_window}, closes {_time(batch.expires_at)}"),
        *((name, _time(getattr(batch, f"{name}_at"))) for name in _STAMPS),
        ("tokens", _tokens(batch)),
        ("input", batch.input_file_id),
        ("answers", batch.output_file_id),
        ("errors", batch.error_file_id),
        *((f"  {name}", value) for name, value in (batch.metadata or {}).items()),
    ]
    text = _table([(name, value) for name, value in rows if value])
    return "\n".join([text, *faults_of(batch)])


def in_words(batch: Batch) -> str:
    """One line."""
    return f"{batch.id} is {batch.status}, {_counts(batch)}"


def faults_of(batch: Batch) -> list[str]:
    """What is wrong with the file of a failed batch."""
    data = (batch.errors.data if batch.errors else None) or []
    faults = [
        BatchFault(code=fault.code or "", message=fault.message or "", line=fault.line)
        for fault in data
    ]
    return fault_lines(faults, most=len(faults))


def _counts(batch: Batch) -> str:
    counts = batch.request_counts
    if counts is None or not counts.total:
        return "not counted yet" if batch.status == "validating" else "no lines"
    failed = f", {counts.failed} failed" if counts.failed else ""
    return f"{counts.completed} of {counts.total} answered{failed}"


def _tokens(batch: Batch) -> str | None:
    usage = batch.usage
    if usage is None or not usage.total_tokens:
        return None
    cached = usage.input_tokens_details.cached_tokens
    return f"{usage.input_tokens:,} in ({cached:,} cached), {usage.output_tokens:,} out"


def _time(seconds: int | None) -> str:
    return "" if seconds is None else f"{datetime.fromtimestamp(seconds):%Y-%m-%d %H:%M:%S}"


def _table(rows: Sequence[tuple[str | None, ...]], head: Sequence[str] = ()) -> str:
    table = Table(*head, box=None, show_header=bool(head), padding=(0, 2, 0, 0))
    for row in rows:
        table.add_row(*(cell or "" for cell in row))
    text = io.StringIO()
    # Not folded to the terminal's width: an id must stay whole, for eyes and for grep.
    Console(file=text, width=_WIDTH, markup=False, highlight=False).print(table)
    return "\n".join(line.rstrip() for line in text.getvalue().rstrip().splitlines())
