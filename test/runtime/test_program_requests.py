"""Requests of programs that run: lengths and places in the queue; SGLang's frontend guarded."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
from queue_policy import separate_steps

from blendserve.frontend.seams import FRONTEND_SIGNATURES, check_frontend
from blendserve.planner import Side
from blendserve.runtime.guard import UnsupportedSGLang, differences
from blendserve.runtime.later_lengths import LaterLengths
from blendserve.runtime.plan_tag import PlanTag
from blendserve.runtime.side_queues import PlannedRequest, SideQueues


def test_lengths_are_learnt_for_each_ordinal() -> None:
    lengths = LaterLengths()
    # Nothing is known: anything up to the limit.
    expected, likely = lengths.expected(1, 80, False)
    assert (expected, likely[0], likely[-1]) == (40, 10, 80)
    assert lengths.expected(1, 80, True) == (80, ())
    lengths.answered(1, [10] * 30)
    lengths.answered(2, [30, 50])
    assert lengths.expected(1, 80, False) == (10, ())
    expected, likely = lengths.expected(2, 80, False)
    assert expected == 40
    assert likely == (30, 30, 30, 30, 50, 50, 50, 50)


def test_whether_a_program_goes_on_is_learnt_from_those_that_ended() -> None:
    lengths = LaterLengths()
    assert lengths.goes_on(5)
    lengths.program_ended(2)
    assert lengths.goes_on(0)
    assert not lengths.goes_on(1)


def test_a_program_that_runs_goes_before_those_that_have_not_begun() -> None:
    queues = SideQueues(separate_steps(10_000))

    def add(rid: str, goes_on: bool) -> None:
        params = SimpleNamespace(max_new_tokens=10)
        req = SimpleNamespace(
            rid=rid, origin_input_ids=[*range(50)], output_ids=[], sampling_params=params
        )
        tag = PlanTag(Side.LEFT, 0, 1.0, 10.0, goes_on=goes_on)
        queues.add(PlannedRequest(req, tag))

    for rid, goes_on in (("a", False), ("b", False), ("c", True), ("d", True), ("e", False)):
        add(rid, goes_on)
        # The scheduler looks in between.
        assert queues.candidate(Side.LEFT) is not None
    order = []
    while (candidate := queues.candidate(Side.LEFT)) is not None:
        candidate.blocked = False
        order.append(queues.start(candidate).req.rid)
    assert order == ["c", "d", "a", "b", "e"]


def test_the_installed_frontend_is_the_one_that_is_extended() -> None:
    assert differences(FRONTEND_SIGNATURES) == []


def test_a_frontend_that_was_moved_or_changed_is_named() -> None:
    expected = {
        "sglang.lang.interpreter.run_program_gone": ("program",),
        "sglang.lang.interpreter.run_program": ("program", "other"),
    }
    with pytest.raises(UnsupportedSGLang) as raised:
        check_frontend(expected)
    said = str(raised.value)
    assert "run_program_gone is missing" in said
    assert "run_program takes (program, backend" in said
    assert "sgl.RuntimeEndpoint" in said
