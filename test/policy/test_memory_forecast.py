"""Expected memory demand, and the pace of steps."""

import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from blendserve.planner import Side, StepPace, linear_costs
from blendserve.policy import Candidate, KVAccount, MemoryForecast, PacedAdmission, rest_density
from blendserve.policy.memory_forecast import BIN_STEPS

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
    forecast.remove(1)
    assert forecast.fits(20, 200, [100.0], 1_000)
    forecast.remove(2)
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
    assert len(tokens) == math.ceil(9_000 / BIN_STEPS)
    forecast.remove(1)
    assert not len(forecast.profile(200)[0])


# Tokens held at the start, and equally likely lengths, of some requests.
running_strategy = st.lists(
    st.tuples(
        st.integers(0, 500), st.lists(st.integers(1, 300), min_size=1, max_size=4).map(sorted)
    ),
    min_size=1,
    max_size=8,
)
quick = settings(deadline=None, database=None, max_examples=150)


def forecast_of(running, bin_steps=1, **options):
    forecast = MemoryForecast(bin_steps, **options)
    for request, (own, lengths) in enumerate(running):
        forecast.add(request, 0, own, lengths)
    return forecast


@quick
@given(running_strategy)
def test_with_bins_of_a_step_the_profile_is_the_exact_expectation(running):
    requests = [(0, own, lengths) for own, lengths in running]
    forecast = forecast_of(running)
    tokens, _ = forecast.profile(0)
    exact = [brute_force(requests, step) for step in range(1, max(x[-1] for _, x in running) + 1)]
    assert tokens == pytest.approx(np.array(exact)[: len(tokens)])
    assert forecast.peak_tokens(0) == pytest.approx(max(exact))
    assert forecast.held_tokens(0) == sum(own for own, _ in running)
    expected = sum(sum(lengths) / len(lengths) for _, lengths in running)
    assert forecast.remaining_tokens(0) == pytest.approx(expected)


@quick
@given(running_strategy, st.integers(1, 40))
def test_the_room_is_a_number_of_standard_deviations_of_the_demand(running, bin_steps):
    def room(step):
        variance = 0.0
        for own, lengths in running:
            p = sum(length > step for length in lengths) / len(lengths)
            variance += (p - p * p) * (own + step) ** 2
        return 3.0 * math.sqrt(variance)

    plain, _ = forecast_of(running, bin_steps).profile(0)
    wide = forecast_of(running, bin_steps, deviations=3.0)
    with_room, _ = wide.profile(0)
    for k, tokens in enumerate(plain):
        # Whoever may end within a bin is certain in it, and uncertain after it.
        at = (k + 1) * bin_steps
        beyond = [x for _, lengths in running for x in lengths if at - bin_steps < x <= at]
        if not beyond:
            assert with_room[k] == pytest.approx(tokens + room(at), abs=1e-3)
        assert with_room[k] >= tokens - 1e-9
    for request in range(len(running)):
        wide.remove(request)
    assert wide.peak_tokens(0) == 0.0


@quick
@given(running_strategy, st.lists(st.integers(0, 400), min_size=1, max_size=5).map(sorted))
def test_time_passes_as_if_the_forecast_were_built_anew(running, looks):
    forecast = forecast_of(running)
    for now in looks:
        forecast.advance(now)
    now = looks[-1]
    anew = MemoryForecast(1)
    for request, (own, lengths) in enumerate(running):
        left = [length - now for length in lengths if length > now]
        if not left:  # Ended when it outlived the last of its lengths, as far as anyone knows.
            forecast.remove(request)
        else:
            anew.add(request, now, own + now, left)
    assert forecast.profile(now)[0] == pytest.approx(anew.profile(now)[0])
    assert forecast.held_tokens(now) == pytest.approx(anew.held_tokens(now))


@quick
@given(running_strategy, st.integers(0, 500), st.lists(st.integers(1, 300), min_size=1).map(sorted))
def test_asking_what_one_more_would_take_changes_nothing(running, own, lengths):
    forecast = forecast_of(running)
    before, _ = forecast.profile(0)
    forecast.peak_tokens_with(0, own, lengths)
    assert forecast.profile(0)[0] == pytest.approx(before)
    assert len(forecast) == len(running)


@quick
@given(
    st.lists(
        st.tuples(
            st.sampled_from(["ask", "start", "ask and start", "end", "hold", "revise", "step"]),
            st.integers(0, 500),
            st.lists(st.integers(1, 300), min_size=1, max_size=4).map(sorted),
        ),
        max_size=30,
    ),
    st.integers(1, 40),
)
def test_whoever_was_asked_about_the_forecast_is_of_those_that_run(events, bin_steps):
    """Asked in between or not, in any order of events."""
    asked, silent = (MemoryForecast(bin_steps, deviations=1.0) for _ in range(2))
    now, running = 0, []
    for number, (what, tokens, lengths) in enumerate(events):
        if "ask" in what:
            peak = asked.peak_tokens_with(now, tokens, lengths)
            assert peak == pytest.approx(silent.peak_tokens_with(now, tokens, lengths))
        if what == "step":
            now += tokens
        for forecast in (asked, silent):
            if "start" in what:
                forecast.add(number, now, tokens, lengths)
            elif what == "step":
                forecast.advance(now)
            elif what == "end" and running:
                forecast.remove(running[0])
            elif what == "hold" and running:
                forecast.hold(running[-1], tokens)
            elif what == "revise" and running:
                forecast.revise(running[-1], now, lengths)
            if forecast is silent:
                silent.peak_tokens(now)
        if "start" in what:
            running.append(number)
        elif what == "end":
            running = running[1:]
    assert asked.remaining_tokens(now) == pytest.approx(silent.remaining_tokens(now))
    assert asked.profile(now)[0] == pytest.approx(silent.profile(now)[0], abs=1e-6)


@quick
@given(running_strategy, st.integers(0, 400))
def test_the_peak_of_the_next_steps_is_that_of_a_step_by_step_count(running, steps):
    requests = [(0, own, lengths) for own, lengths in running]
    soon = max(brute_force(requests, step) for step in range(1, max(steps, 1) + 1))
    assert forecast_of(running).peak_tokens(0, steps) == pytest.approx(soon)


def test_what_comes_to_be_shared_does_not_come_free():
    forecast = forecast_of([(100, [1]), (0, [50])])
    assert forecast.peak_tokens(0) == 102.0
    forecast.hold(0, -90)
    # By then the first has given back the 10 tokens that it alone held.
    assert forecast.peak_tokens(0) == 50.0
    assert forecast.held_tokens(0) == 10.0


def test_a_forecast_goes_on_for_millions_of_steps_in_little_memory():
    forecast = MemoryForecast(1)
    for now in range(0, 2_000_000, 400):
        forecast.advance(now)
        forecast.add(now, now, 10.0, [700.0])
        if now:
            forecast.remove(now - 400)
        assert forecast.peak_tokens(now) == pytest.approx(710.0)
    assert forecast._sums.shape[1] < 10_000


def test_no_request_is_expected_to_go_on_beyond_its_limit():
    forecast = MemoryForecast(1)
    forecast.add(1, 0, 0.0, [10.0], longest=14.0)
    forecast.advance(12)
    # Half as much again would be 18; at the limit it has one step left at the most.
    assert forecast.peak_tokens(12) == 14.0
    forecast.advance(15)
    assert forecast.peak_tokens(15) == 16.0


def test_a_step_gets_the_prefill_that_its_decodes_balance():
    pace = StepPace(linear_costs(1e-4, 0.0, 1e-7, 0.01), chunk_tokens=2_000)
    # 400,000 tokens of context take 0.04 s; at density 1.5 that is 600 tokens, 50 of them decodes.
    assert pace.prefill_tokens(1.5, 400_000, 50) == 550
    # Never less than what the weight read hides, nor more than a chunk.
    assert pace.prefill_tokens(0.1, 1_000, 20) == 80
    assert pace.prefill_tokens(9.0, 400_000, 50) == 1_950
    assert pace.prefill_tokens(math.inf, 0, 0) == 2_000
    assert pace.prefill_tokens(0.1, 1_000, 500) == 1


def test_the_tail_keeps_what_its_weight_reads_will_take():
    none = np.empty(0)
    assert rest_density(30.0, 20.0, none, none, 0.008, 0.02) == pytest.approx(1.5, rel=1e-4)
    # 5,000 steps of 1 ms of attention take 8 ms of compute each, so 40 of the 70 seconds.
    tail, steps = np.array([0.001]), np.array([5_000.0])
    assert rest_density(70.0, 20.0, tail, steps, 0.008, 0.02) == pytest.approx(1.5, rel=1e-3)
    assert rest_density(10.0, 20.0, tail, steps, 0.008, 0.02) == pytest.approx(0.0, abs=1e-4)
    assert rest_density(10.0, 0.0, none, none, 0.008, 0.02) == math.inf


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
    assert choose(left, head(RIGHT, 2.0), pool(900, 50, 50), 1.0) is LEFT
    assert choose(None, right, pool(900, 50, 50), 0.01) is RIGHT
    assert choose(left, right, pool(60, 400, 540), 1.0) is None


def test_an_idle_engine_starts_even_what_does_not_fit():
    choose = PacedAdmission().choose
    idle = pool(1_000, 0, 0)
    assert choose(head(LEFT, 2.0, output=9_000.0), None, idle, 1.0) is LEFT
    assert choose(None, head(RIGHT, 0.1, output=9_000.0), idle, 1.0) is RIGHT
    assert choose(head(LEFT, 2.0, blocked=True), None, idle, 1.0) is None


@pytest.mark.timeout(20)
@pytest.mark.parametrize("width", [1, BIN_STEPS])
def test_a_length_that_is_a_hair_above_what_is_done_is_over(width):
    """The mean of lengths that are all 6 may be a hair more, and 118 steps later it is 124."""
    forecast = MemoryForecast(width)
    length = math.nextafter(6.0, 7.0)
    assert 118 + length == 124
    forecast.add("a", 118, 10.0, [length])
    for now in range(118, 140):
        forecast.advance(now)
    assert len(forecast) == 1
    forecast.remove("a")
    assert forecast.peak_tokens(140) == 0.0
