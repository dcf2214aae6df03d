"""The forecast of KV demand against a simulation token by token."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from blendserve.planner import KVForecast

quick = settings(deadline=None, database=None, max_examples=200)

requests = st.lists(st.tuples(st.integers(1, 3000), st.integers(0, 500)), min_size=1, max_size=40)


def exact_peak(running: list[tuple[int, int]]) -> float:
    """Demand for free tokens, step by step: (remaining, held) of each."""
    peak = 0
    for step in {remaining for remaining, _ in running}:
        growth = sum(min(step, remaining) for remaining, _ in running)
        returned = sum(held + remaining for remaining, held in running if remaining < step)
        peak = max(peak, growth - returned)
    return float(peak)


def forecast_of(running: list[tuple[int, int]]) -> KVForecast:
    forecast = KVForecast()
    for key, (remaining, held) in enumerate(running):
        forecast.add(key, remaining, held)
    return forecast


@quick
@given(requests)
def test_the_peak_is_the_exact_one_or_a_bucket_above(running):
    width = 1
    while 256 * width < max(remaining for remaining, _ in running):
        width *= 2
    # What ends in a bucket may give back a bucket's width too late, held memory included.
    slack = sum(width + (held + remaining) * (width > 1) for remaining, held in running)
    peak = forecast_of(running).peak_tokens()
    assert exact_peak(running) <= peak <= exact_peak(running) + slack


@quick
@given(st.lists(st.tuples(st.integers(1, 256), st.integers(0, 500)), min_size=1, max_size=40))
def test_the_profile_is_what_the_running_requests_hold_step_by_step(running):
    forecast = forecast_of(running)
    tokens, steps = forecast.profile()
    assert steps == 1
    assert len(tokens) == max(remaining for remaining, _ in running)
    for step, held_then in enumerate(tokens, start=1):
        alive = [(remaining, held) for remaining, held in running if remaining >= step]
        assert held_then == pytest.approx(sum(held + step for _, held in alive))
    assert forecast.remaining_tokens() == sum(remaining for remaining, _ in running)


@quick
@given(requests, st.integers(1, 600))
def test_time_passes_as_if_it_were_built_anew(running, steps):
    forecast = forecast_of(running)
    now = list(running)
    for _ in range(steps):
        overdue = forecast.advance()
        assert all(now[key][0] == 1 for key in overdue)
        now = [(remaining - 1, held + 1) for remaining, held in now]
        for key, (remaining, _) in enumerate(now):
            if remaining == 0:
                forecast.end(key)
    left = [request for request in now if request[0] > 0]
    if not left:
        assert len(forecast) == 0
        assert forecast.peak_tokens() == 0.0
    else:
        assert forecast.peak_tokens() >= exact_peak(left) - 1e-6
        if max(remaining for remaining, _ in running) <= 256:
            assert forecast.peak_tokens() == pytest.approx(exact_peak(left))


@quick
@given(requests, st.integers(1, 5000), st.integers(0, 500))
def test_asking_what_one_more_would_need_changes_nothing(running, remaining, held):
    forecast = forecast_of(running)
    before = forecast.peak_tokens()
    with_one_more = forecast.peak_tokens_with(remaining, held)
    assert with_one_more >= exact_peak([*running, (remaining, held)]) - 1e-6
    assert forecast.peak_tokens() <= max(before, with_one_more) + 1e-6
    assert len(forecast) == len(running)


def test_who_outlives_its_estimate_is_named_once_and_then_grows_again():
    forecast = KVForecast()
    forecast.add("short", 2, held_tokens=10)
    forecast.add("long", 100, held_tokens=10)
    assert [forecast.advance(), forecast.advance()] == [{}, {"short": 12.0}]
    assert forecast.peak_tokens() == 98.0, "it is not part of the forecast"
    forecast.add("short", 50, held_tokens=12)
    # Both grow by 50; then "short" gives back 62, and "long" takes 48 more.
    assert forecast.peak_tokens() == 100.0
    forecast.end("short")
    forecast.end("never started")
    assert forecast.peak_tokens() == 98.0


def test_what_comes_to_be_shared_is_no_longer_given_back():
    forecast = KVForecast()
    forecast.add("first", 1, held_tokens=100)
    forecast.add("second", 50, held_tokens=0)
    assert forecast.peak_tokens() == 2.0
    forecast.hold("first", -90)
    # By then the first has given back the 10 tokens that it alone held.
    assert forecast.peak_tokens() == 50.0 - 10.0


def test_uncertain_lengths_add_their_joint_deviation():
    forecast = KVForecast(deviations=2.0)
    forecast.add("a", 100, held_tokens=0, deviation=30.0)
    forecast.add("b", 100, held_tokens=0, deviation=40.0)
    assert forecast.peak_tokens() == 200.0 + 2.0 * 50.0
    forecast.end("a")
    assert forecast.peak_tokens() == 100.0 + 2.0 * 40.0
