"""The split of a GPU between prefill and decode, against all splits tried one by one."""

import itertools
import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from blendserve.planner import INTERFERENCE, StepPace, best_split, linear_costs, separate_parts

SPLITS = [(108 - decode, decode) for decode in range(4, 108, 4)]
PACE = StepPace(linear_costs(2.0, 0.0, 0.5, 100.0), chunk_tokens=0)
seconds = st.floats(0.001, 1000)


def decode_speed(share):
    """Between the published points, and from nothing to all."""
    points = [(0.0, 0.0), *INTERFERENCE, (1.0, 1.0)]
    for (r0, p0), (r1, p1) in itertools.pairwise(points):
        if r0 <= share <= r1:
            return p0 + (p1 - p0) * (share - r0) / (r1 - r0)
    raise AssertionError(share)


def both_ended(prefill, decode, split):
    share = split[1] / sum(split)
    return max(prefill / (1 - share), decode / decode_speed(share))


@given(seconds, seconds)
def test_no_other_split_ends_sooner(prefill, decode):
    chosen = both_ended(prefill, decode, SPLITS[best_split(prefill, decode, SPLITS)])
    assert chosen <= min(both_ended(prefill, decode, split) for split in SPLITS) * (1 + 1e-12)


def test_the_two_parts_end_together_where_the_splits_are_fine_enough():
    fine = [(1000 - decode, decode) for decode in range(1, 1000)]
    for prefill, decode in ((0.5, 0.7), (0.8, 0.4), (0.2, 0.9)):  # Points of the published table.
        split = fine[best_split(prefill, decode, fine)]
        share = split[1] / 1000
        assert prefill / (1 - share) == pytest.approx(decode / decode_speed(share), rel=0.01)


def test_more_decode_work_never_gets_fewer_multiprocessors():
    given_to_decode = [SPLITS[best_split(1.0, decode, SPLITS)][1] for decode in np.logspace(-2, 2)]
    assert given_to_decode == sorted(given_to_decode)
    assert given_to_decode[0] == 4
    assert given_to_decode[-1] == 104


def test_without_any_memory_work_left_prefill_gets_the_most():
    assert SPLITS[best_split(math.inf, 3.0, SPLITS)] == (104, 4)
    assert separate_parts(PACE, math.inf, 10, 2)[0] == math.inf


@given(st.floats(0.01, 100), st.integers(0, 10**6), st.integers(1, 400))
def test_the_parts_have_the_density_of_the_step_and_read_the_weights(density, context, decodes):
    prefill, decode = separate_parts(PACE, density, context, decodes)
    attention, own = 0.5 * context, 2.0 * decodes
    assert decode == attention + max(own, 100.0)
    assert prefill == 0.0 or prefill + own == pytest.approx(density * attention)
    assert prefill > 0.0 or own >= density * attention
