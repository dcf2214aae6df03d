"""A job in parts: each request in one, families together, all parts alike in work."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from blendserve.planner.flat_tokens import FlatTokens
from blendserve.planner.prefix_sort import sort_prompts
from blendserve.planner.shards import shards


def family_job(families=60, size=40, prefix=200, seed=0):
    """Families of lines with a long common beginning; some have long answers."""
    rng = np.random.default_rng(seed)
    prompts, outputs = [], []
    for number in range(families):
        head = rng.integers(0, 1_000, prefix)
        for _ in range(size):
            prompts.append(np.concatenate(([number], head, rng.integers(0, 1_000, 20))))
            outputs.append(400 if number % 3 == 0 else 8)
    order = rng.permutation(len(prompts))
    return FlatTokens.of([prompts[k] for k in order]), np.array(outputs)[order]


def shared_tokens(prompts, requests):
    return int(sort_prompts(prompts, requests)[1].sum())


@pytest.mark.parametrize("count", [1, 2, 3, 8])
def test_parts_are_even_and_keep_what_is_shared(count):
    prompts, outputs = family_job()
    owner = shards(prompts, outputs, count)
    length = prompts.lengths
    whole = shared_sum = 0
    compute, memory = [], []
    for part in range(count):
        # Sorting a subset: sort_prompts takes the requests of an order of all.
        mine = np.flatnonzero(owner == part)
        sub = FlatTokens.of([prompts[k] for k in mine])
        shared = shared_tokens(sub, np.arange(len(mine)))
        shared_sum += shared
        whole += len(mine)
        compute.append(length[mine].sum() - shared + outputs[mine].sum())
        memory.append((length[mine] * outputs[mine]).sum())
    assert whole == len(outputs)
    assert shared_sum >= 0.93 * shared_tokens(prompts, np.arange(len(outputs)))
    for sums in (compute, memory):
        assert max(sums) <= 1.1 * np.mean(sums)


def test_the_order_of_lines_changes_no_familys_part():
    prompts, outputs = family_job(families=12)
    owner = shards(prompts, outputs, 4)
    again = shards(prompts, outputs, 4)
    assert np.array_equal(owner, again)


def test_more_parts_than_requests_leave_some_empty():
    prompts = FlatTokens.of([np.array([1, 2]), np.array([3])])
    owner = shards(prompts, np.array([4, 4]), 5)
    assert len(set(owner.tolist())) == 2
    assert owner.max() < 5
    assert len(shards(FlatTokens.of([]), np.empty(0, dtype=np.int64), 3)) == 0


def test_no_parts_are_refused():
    with pytest.raises(ValueError, match="at least 1, not 0"):
        shards(FlatTokens.of([]), np.empty(0, dtype=np.int64), 0)


@settings(deadline=None, database=None, max_examples=50)
@given(
    st.lists(st.lists(st.integers(0, 3), max_size=12), max_size=40),
    st.integers(1, 7),
    st.integers(0, 50),
)
def test_any_job_is_divided(prompts, count, output):
    flat = FlatTokens.of([np.array(prompt, dtype=np.int32) for prompt in prompts])
    owner = shards(flat, np.full(len(prompts), output), count)
    assert len(owner) == len(prompts)
    assert all(0 <= part < count for part in owner.tolist())
