"""Time left and share of the bound, from the counters of a made-up run."""

from __future__ import annotations

import io
from typing import Any

import pytest
from rich.console import Console

from blendserve.cli.display import BatchDisplay
from blendserve.cli.figures import FigureKeeper, Figures

# Ten seconds of the course: half of the work in the first two, the other half in the last eight.
CURVE = {"token_work": [0.0, 1.0], "work": [0.0, 50.0, 100.0], "seconds": [0.0, 2.0, 10.0]}


def status(output: int, *, bound: float = 1.0, jobs: int = 1, **more: Any) -> dict[str, Any]:
    job = {
        "job_id": "a",
        "curves": 1,
        "curve": CURVE,
        "curve_prefill_tokens": 0,
        "curve_output_tokens": 0,
        "answered_prompt_tokens": 0,
        "answered_cached_tokens": 0,
        "answered_output_tokens": output,
        "flight_prefill_tokens": 0,
        "flight_output_tokens": 0,
        "done_work_tokens": output,
        "total_work_tokens": 100,
        "bound_seconds": bound,
    } | more
    counters = {"prefill_tokens": 0, "decode_tokens": 1_000 + output}
    scheduler = {**counters, "prompt_tokens": 0, "cached_tokens": 0}
    return {"schedulers": [scheduler], "jobs": [job, *({"job_id": "b"} for _ in range(jobs - 1))]}


@pytest.mark.parametrize("jobs", [1, 2])
def test_a_slow_end_is_told_before_it_comes(jobs: int) -> None:
    keeper = FigureKeeper()
    # Twice as slow as predicted: 4 s for the first half of the work, so 16 for the other.
    for at, output in ((0.0, 0), (2.0, 25), (4.0, 50)):
        told = keeper.update(status(output, jobs=jobs), "a", now=at)
    assert told.eta_seconds == pytest.approx(16.0)
    told = keeper.update(status(75, jobs=jobs), "a", now=12.0)
    assert told.eta_seconds == pytest.approx(8.0)


def test_without_a_course_the_work_tells_and_beyond_all_work_nothing_does() -> None:
    keeper = FigureKeeper()
    keeper.update(status(0, curve={}), "a", now=0.0)
    assert keeper.update(status(20, curve={}), "a", now=2.0).eta_seconds == pytest.approx(8.0)
    assert keeper.update(status(120, curve={}), "a", now=9.0).eta_seconds is None
    keeper = FigureKeeper()
    for at, output in ((0.0, 0), (2.0, 90)):
        keeper.update(status(output), "a", now=at)
    assert keeper.update(status(130), "a", now=3.0).eta_seconds is None, "never 0 while it runs"


def test_a_bound_that_is_beaten_is_not_shown() -> None:
    keeper = FigureKeeper()
    keeper.update(status(0, bound=5.0), "a", now=0.0)
    assert keeper.update(status(50, bound=5.0), "a", now=5.0).share_of_bound == pytest.approx(0.5)
    assert keeper.update(status(100, bound=50.0), "a", now=10.0).share_of_bound is None


def test_no_counts_are_shown_before_there_are_any() -> None:
    counts = {"total": 0, "completed": 0, "failed": 0}
    said = io.StringIO()
    with BatchDisplay(Console(file=said, width=100)) as display:
        display.update("validating", counts, Figures())
    assert said.getvalue().splitlines()[0] == "validating"
    assert "0/0" not in said.getvalue()
