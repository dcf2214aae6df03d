"""A prefill step waits until it is worth its time."""

from __future__ import annotations

import pytest

from blendserve.policy import Gather


def decode_steps_before_prefill(decodes: int, ended_each_step: int) -> int:
    gather = Gather(step_seconds=0.010)
    gather.prefill_step(goes_on=False)
    for steps in range(1_000):
        if not gather.holds(decodes):
            return steps
        for _ in range(ended_each_step):
            gather.ended()
        gather.decode_step(decodes, 0.020)
    raise AssertionError("it holds for ever")


def test_it_waits_until_waiting_has_cost_what_the_step_costs() -> None:
    # One place among twenty decodes: half a step of theirs.
    assert decode_steps_before_prefill(20, 0) == 10
    # The more have ended, the sooner.
    assert decode_steps_before_prefill(20, 1) == 4
    assert decode_steps_before_prefill(20, 20) == 1


def test_nothing_waits_beside_nothing() -> None:
    assert decode_steps_before_prefill(0, 0) == 0


@pytest.mark.parametrize("goes_on", [True, False])
def test_a_step_that_left_work_over_is_followed_by_the_next(goes_on: bool) -> None:
    gather = Gather(0.010)
    gather.prefill_step(goes_on)
    assert gather.holds(20) is not goes_on
