"""The course of a predicted run: its seconds by stretches, and its tail."""

from __future__ import annotations

import numpy as np
import pytest

from blendserve.planner import linear_costs
from blendserve.planner.timeline import Work, run_course

COSTS = linear_costs(1e-5, 0.0, 1e-8, 1e-3)


def work(*output: float) -> Work:
    out = np.array(output)
    return Work(np.full(len(out), 20.0), np.zeros(len(out)), out)


def test_a_straggler_is_the_tail_and_named_first() -> None:
    course = run_course(work(*[2000.0] * 12, 6000.0, 5000.0), COSTS, 1e6)
    part, requests = course.tail()
    assert requests.tolist()[:2] == [12, 13]
    # Steps of one request take as long as those of fourteen here: the weights are read.
    assert part == pytest.approx(2 / 3, abs=0.02)


def test_requests_that_end_together_leave_no_tail() -> None:
    part, requests = run_course(work(*[2000.0] * 12), COSTS, 1e6).tail()
    assert (part, len(requests)) == (0.0, 0)


def test_nothing_and_prompts_alone_have_no_tail() -> None:
    for nothing in (work(), work(0.0, 0.0)):
        part, requests = run_course(nothing, COSTS, 1e6).tail()
        assert (part, len(requests)) == (0.0, 0)
