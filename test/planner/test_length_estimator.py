"""Which requests are sampled, and what the rest is estimated from."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from planner_workloads import prompts

from blendserve.planner import DEFAULT_OUTPUT_TOKENS, PrefixTree, choose_sample, estimate


def ids(*rows):
    return [np.array(row, dtype=np.int32) for row in rows]


# Two requests below [1, 1], two below [1, 2], one apart.
FAMILY = ids([1, 1, 1], [1, 1, 2], [1, 2, 1], [1, 2, 2], [9])
TREE = PrefixTree.build(FAMILY)
MANY = np.full(5, 1000)
NONE = np.zeros(5, dtype=bool)


def test_a_subtree_takes_the_mean_of_its_sampled_requests():
    result = estimate(TREE, {0: 10, 2: 50, 4: 500}, MANY, NONE)
    assert result.tolist() == [10, 10, 50, 50, 500]


def test_a_subtree_without_sample_takes_its_siblings_then_its_ancestors():
    assert estimate(TREE, {0: 10, 1: 30}, MANY, NONE).tolist() == [10, 30, 20, 20, 20]


def test_limits_cap_estimates_and_exact_lengths_are_known():
    limit = np.array([1000, 5, 1000, 1000, 1000])
    exact = np.array([False, False, False, True, False])
    assert estimate(TREE, {0: 10}, limit, exact).tolist() == [10, 5, 10, 1000, 10]


def test_without_observations_the_prior_holds_up_to_the_limit():
    limit = np.array([7, 1000, 1000, 1000, 0])
    expected = [7, *[DEFAULT_OUTPUT_TOKENS] * 3, 0]
    assert estimate(TREE, {}, limit, NONE).tolist() == expected


def test_observations_outside_the_job_are_refused():
    with pytest.raises(ValueError, match="observed request 5"):
        estimate(TREE, {5: 1}, MANY, NONE)


@given(prompts, st.floats(0, 1), st.integers(0, 5), st.integers(0, 9))
def test_a_sample_is_distinct_seeded_and_bounded(rows, fraction, minimum, seed):
    tree = PrefixTree.build(rows)
    sample = choose_sample(tree, fraction, seed, minimum)
    assert len(set(sample.tolist())) == len(sample)
    assert len(sample) <= max(len(rows) // 4, len(rows) if fraction == 1 else 0)
    assert sample.tolist() == choose_sample(tree, fraction, seed, minimum).tolist()


def test_a_sample_covers_every_large_subtree():
    rows = [np.array([k // 100, k], dtype=np.int32) for k in range(2_000)]
    for seed in range(5):
        sample = choose_sample(PrefixTree.build(rows), 0.01, seed, 0)
        assert sorted(int(r) // 100 for r in sample) == list(range(20))


def test_known_lengths_are_not_sampled_and_wrong_fractions_refused():
    tree = PrefixTree.build(FAMILY)
    only = np.array([True, True, True, True, False])
    assert choose_sample(tree, 0.5, 0, 0, only).tolist() != []
    assert 4 not in choose_sample(tree, 1.0, 0, 0, only)
    with pytest.raises(ValueError, match="between 0 and 1"):
        choose_sample(tree, 1.5, 0, 0)
    with pytest.raises(ValueError, match="min_requests"):
        choose_sample(tree, 0.5, 0, -1)
