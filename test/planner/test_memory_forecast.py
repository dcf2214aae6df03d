"""Expected memory demand, and the pace of steps."""

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from blendserve.planner import (
    Candidate,
    KVAccount,
    MemoryForecast,
    PacedAdmission,
    Side,
    StepPace,
    rest_density,
)
from blendserve.planner.memory_forecast import BIN_STEPS
from blendserve.planner.pacing import enough_unknown

LEFT, RIGHT = Side.LEFT, Side.RIGHT


def brute_force(requests, step):
    """Expected tokens at a step: (start, tokens then, lengths) of each request."""
    total = 0.0
    for start, tokens, lengths in requests:
        for length in lengths:
            if start <= step <= start + length:
                total += (tokens + step - start) / len(lengths)
    return total


lengths_strategy = st.lists(st.integers(BIN_STEPS, 20_000), min_size=1, max_size=4).map(sorted)


@given(
    st.lists(st.tuples(st.integers(0, 500), lengths_strategy), min_size=1, max_size=6),
    st.integers(0, 500),
    lengths_strategy,
)
def test_a_forecast_says_no_only_where_a_step_by_step_count_does(running, tokens, lengths):
    forecast = MemoryForecast()
    for request, (own, outcomes) in enumerate(running):
        forecast.add(request, 0, own, outcomes)
    requests = [(0, own, outcomes) for own, outcomes in running] + [(0, tokens, lengths)]
    checked = range(0, lengths[-1] + 1, 16)
    peak = max(brute_force(requests, step) for step in checked)
    # A bin stands for its end: up to a bin of growth of every request on the safe side.
    assert forecast.fits(0, tokens, lengths, peak + BIN_STEPS * len(requests) + 1)
    assert not forecast.fits(0, tokens, lengths, peak - 17 * len(requests))


def test_what_ends_is_forgotten():
    forecast = MemoryForecast()
    forecast.add(1, 0, 900, [5_000.0])
    forecast.add(2, 10, 50, [3.0])
    assert not forecast.fits(20, 200, [100.0], 1_000)
    forecast.remove(1, 20)
    assert forecast.fits(20, 200, [100.0], 1_000)
    forecast.remove(2, 20)
    assert len(forecast) == 0
    assert forecast.fits(20, 999, [1.0], 1_000)


def test_a_request_that_outlives_a_length_is_expected_to_have_the_others():
    forecast = MemoryForecast()
    forecast.add(1, 0, 0, [1_000.0, 30_000.0])
    before, _ = forecast.profile(0)
    forecast.advance(2_000)
    after, alive = forecast.profile(2_000)
    far = 20_000 // BIN_STEPS
    assert before[far] == pytest.approx((far + 1) * BIN_STEPS / 2)
    assert after[far - 2_000 // BIN_STEPS] == pytest.approx((far + 1) * BIN_STEPS)
    assert alive[0] == 1.0
    # Beyond all of them it goes on for a while yet.
    forecast.advance(40_000)
    assert len(forecast.profile(40_000)[0])


def test_new_lengths_take_the_place_of_old_ones():
    forecast = MemoryForecast()
    forecast.add(1, 0, 10, [600.0])
    forecast.update(100, lambda request: [9_000.0])
    tokens, _ = forecast.profile(100)
    assert len(tokens) == 9_000 // BIN_STEPS + 1
    forecast.remove(1, 200)
    assert not len(forecast.profile(200)[0])


def test_a_step_gets_the_prefill_that_its_decodes_balance():
    pace = StepPace(
        token_seconds=1e-4, context_seconds=1e-7, weight_seconds=0.01, chunk_tokens=2_000
    )
    # 400,000 tokens of context take 0.04 s; at density 1.5 that is 600 tokens, 50 of them decodes.
    assert pace.prefill_tokens(1.5, 400_000, 50) == 550
    # Never less than what the weight read hides, nor more than a chunk.
    assert pace.prefill_tokens(0.1, 1_000, 20) == 80
    assert pace.prefill_tokens(9.0, 400_000, 50) == 1_950
    assert pace.prefill_tokens(math.inf, 0, 0) == 2_000
    assert pace.prefill_tokens(0.1, 1_000, 500) == 1


def test_memory_is_filled_until_its_compute_is_above_the_weight_read():
    pace = StepPace(
        token_seconds=1e-4, context_seconds=1e-7, weight_seconds=0.01, chunk_tokens=2_000
    )
    filling = pace.filling_tokens(1.5)
    assert 1.0 < 1.5 * filling * pace.context_seconds / pace.weight_seconds < 3.0
    assert pace.filling_tokens(0.75) == pytest.approx(2 * filling)
    assert pace.filling_tokens(0.0) == math.inf


def test_the_tail_keeps_what_its_weight_reads_will_take():
    none = np.empty(0)
    assert rest_density(30.0, 20.0, none, none, 0.008, 0.02) == pytest.approx(1.5, rel=1e-4)
    # 5,000 steps of 1 ms of attention take 8 ms of compute each, so 40 of the 70 seconds.
    tail, steps = np.array([0.001]), np.array([5_000.0])
    assert rest_density(70.0, 20.0, tail, steps, 0.008, 0.02) == pytest.approx(1.5, rel=1e-3)
    assert rest_density(10.0, 20.0, tail, steps, 0.008, 0.02) == pytest.approx(0.0, abs=1e-4)
    assert rest_density(10.0, 0.0, none, none, 0.008, 0.02) == math.inf


def test_unknown_lengths_hold_the_memory_side_back():
    assert not enough_unknown(2, 100, 100_000)
    assert enough_unknown(30, 100, 100_000)
    assert enough_unknown(2, 20_000, 100_000)


def head(side, density, prompt=100, output=10.0, blocked=False):
    return Candidate(side, prompt, prompt, output, density, blocked)


def pool(free, left, right):
    """A pool of 1,000 tokens in which a request of each side is about to end."""
    kv = KVAccount(1_000)
    for side, booked in ((LEFT, left), (RIGHT, right)):
        if booked:
            kv.start(side, Candidate(side, booked, booked, 0.0, 1.0))
    kv.free_tokens = free
    return kv


def test_the_memory_side_goes_first_while_its_part_lasts():
    choose = PacedAdmission().choose
    left, right = head(LEFT, 50.0), head(RIGHT, 0.1, output=300.0)
    assert choose(left, right, pool(900, 50, 50), 1.0) is RIGHT
    # A fifth of the pool is kept for the left, which may use all of it.
    assert choose(left, right, pool(300, 50, 450), 1.0) is LEFT
    assert choose(left, right, pool(900, 50, 50), 1.0, hold_right=True) is LEFT
    assert choose(left, head(RIGHT, 2.0), pool(900, 50, 50), 1.0) is LEFT
    assert choose(None, right, pool(900, 50, 50), 0.01) is RIGHT
    assert choose(left, right, pool(60, 400, 540), 1.0) is None
    # And no more is filled than helps, until the left side is exhausted.
    assert choose(left, right, pool(900, 50, 50), 1.0, right_tokens=300.0) is LEFT
    assert choose(None, right, pool(900, 50, 50), 0.01, right_tokens=300.0) is RIGHT


def test_an_idle_engine_starts_even_what_does_not_fit():
    choose = PacedAdmission().choose
    idle = pool(1_000, 0, 0)
    assert choose(head(LEFT, 2.0, output=9_000.0), None, idle, 1.0) is LEFT
    assert choose(None, head(RIGHT, 0.1, output=9_000.0), idle, 1.0) is RIGHT
    assert choose(head(LEFT, 2.0, blocked=True), None, idle, 1.0) is None
