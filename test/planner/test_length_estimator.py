"""The paper's estimate: the mean of what was sampled nearby."""

import numpy as np
import pytest

from blendserve.planner import DEFAULT_OUTPUT_TOKENS, PrefixTree, estimate


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
