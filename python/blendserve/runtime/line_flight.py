"""A job's lines on their way: what is kept of each, and how each ends."""

from __future__ import annotations

import asyncio
from dataclasses import dataclass

from blendserve.batch.errors import cause_of
from blendserve.batch.executor import LineError, LineResult
from blendserve.planner import Side
from blendserve.runtime.plan_walk import Step


@dataclass(frozen=True)
class EndedLine:
    """A line whose task has ended. `position` is its place in the work, None if it has none."""

    task: asyncio.Task[LineResult]
    index: int
    position: int | None


@dataclass(frozen=True)
class SentLine:
    """A planned line on its way."""

    task: asyncio.Task[LineResult]
    side: Side
    step: Step
    work_seconds: float
    estimate: float | None
    """Expected output tokens where the length is not known beforehand."""
    sequences: int
    replica: int | None


def failed_line(index: int, error: BaseException) -> LineResult:
    """The answer to a line that got none."""
    message = f"This request could not be sent, or its answer not be read. {cause_of(error)}"
    return LineResult(index, "", error=LineError("internal_error", message))


async def answered(result: LineResult) -> LineResult:
    """As a line's task, for a line that is not sent."""
    return result
