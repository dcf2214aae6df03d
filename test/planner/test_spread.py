"""Requests of known length, mixed so that those of one length do not start together."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given
from planner_workloads import LLAMA_ON_A100, jobs

from blendserve.planner import Job, PlannerConfig, make_plan
from blendserve.planner.transform import CommonPrefix

SORTED, MIXED = PlannerConfig(), PlannerConfig(kv_tokens=50_000)


@given(jobs())
def test_mixing_moves_known_requests_among_their_siblings_and_shares_as_much(job: Job) -> None:
    plans = [make_plan(job, LLAMA_ON_A100, config) for config in (SORTED, MIXED)]
    first, mixed = plans
    assert sorted(mixed.order.tolist()) == sorted(first.order.tolist())
    assert mixed.sharing_planned == first.sharing_planned
    tree = mixed.tree
    leaf = np.empty(tree.num_leaves, dtype=np.int64)
    leaf[tree.requests] = np.arange(tree.num_leaves)
    parents = [tree.leaf_parent[leaf[plan.order]].tolist() for plan in plans]
    assert parents[0] == parents[1]
    shared = CommonPrefix(tree.shared).along(leaf[mixed.order])
    assert shared.tolist() == mixed.shared_with_previous.tolist()
    for name in ("compute_seconds", "memory_seconds"):
        totals = [getattr(plan, name).sum() for plan in plans]
        assert totals[1] == pytest.approx(totals[0])


def test_equal_lengths_stand_apart_and_the_longest_still_start_in_time() -> None:
    rng = np.random.default_rng(0)
    output = np.repeat([1_000, 8_000], 100)
    prompts = [rng.integers(0, 9_999, 100).astype(np.int32) for _ in output]
    job = Job(prompts, output, output)
    pool = 60_000
    steps = ((100 + output / 2) * output).sum() / pool
    first, mixed = (
        make_plan(job, LLAMA_ON_A100, replace(SORTED, kv_tokens=tokens)) for tokens in (None, pool)
    )
    assert set(output[first.order[-100:]]) == {8_000}
    # From the memory end: both lengths from the start, and only short ones at last.
    begins = output[mixed.order[::-1]]
    assert 0.3 < (begins[:40] == 8_000).mean() < 0.7
    later = len(begins) - 1 - int(np.flatnonzero(begins == 8_000)[-1])
    assert later == pytest.approx(100 * (1 - (steps - 8_000) / (steps - 1_000)), abs=2)


def test_lengths_that_are_not_known_stay_sorted() -> None:
    rng = np.random.default_rng(1)
    prompts = [rng.integers(0, 9_999, n).astype(np.int32) for n in rng.integers(10, 900, 300)]
    job = Job(prompts, np.full(300, 2_000))
    orders = [make_plan(job, LLAMA_ON_A100, config).order.tolist() for config in (SORTED, MIXED)]
    assert orders[0] == orders[1]
