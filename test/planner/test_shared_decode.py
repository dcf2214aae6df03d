"""Memory work of decodes that read a common prefix once for all, counted prompt by prompt."""

from __future__ import annotations

import heapq

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from planner_workloads import LLAMA_ON_A100, jobs, mixed_job, shared_tokens

from blendserve.planner import Job, PlannerConfig, make_plan
from blendserve.planner.annotation import prompt_tokens_read


def counted(prompts: list[np.ndarray], outputs: np.ndarray, kv_tokens: float) -> np.ndarray:
    """The formula for every token of every prompt, without a tree."""
    n = len(prompts)
    common = np.array([[shared_tokens(a, b) for b in prompts] for a in prompts]).reshape(n, n)
    read = np.zeros(n)
    for r in range(n):
        for position in range(len(prompts[r])):
            group = np.flatnonzero(common[r] > position)
            if len(group) == 1 or not outputs[group].sum():
                read[r] += 1
                continue
            prefix = min(common[r][group])
            distinct = {
                tuple(prompts[k][: end + 1].tolist())
                for k in group
                for end in range(prefix, len(prompts[k]))
            }
            own = (len(distinct) + outputs[group].sum() / 2) / len(group)
            at_once = min(max((kv_tokens - prefix) / own, 1), len(group))
            steps = max(outputs[group].max(), outputs[group].sum() / at_once)
            read[r] += steps / outputs[group].sum()
    return read


@given(jobs(), st.sampled_from([1, 30, 1_000, 10**6]))
@settings(max_examples=60, deadline=None)
def test_every_token_is_counted_as_the_formula_says(job: Job, kv_tokens: int) -> None:
    tree = job.build_tree()
    outputs = np.asarray(job.known_output_tokens, dtype=np.float64)
    read = prompt_tokens_read(tree, outputs[tree.requests], kv_tokens)
    expected = counted(list(job.token_ids), outputs, kv_tokens)
    np.testing.assert_allclose(read, expected[tree.requests], rtol=1e-9)
    assert (read <= tree.length * (1 + 1e-12)).all()


@given(
    st.lists(st.integers(1, 300), min_size=2, max_size=60),
    st.integers(1, 20),
)
def test_one_group_is_read_for_about_as_long_as_its_requests_take_turns(
    outputs: list[int], slots: int
) -> None:
    """Against a run in which as many decode at once as fit, and the next starts when one ends."""
    prefix, own = 500, 40
    prompts = [
        np.concatenate((np.zeros(prefix), np.full(own, 1 + k))).astype(np.int32)
        for k in range(len(outputs))
    ]
    tree = Job(prompts, np.full(len(outputs), 1_000)).build_tree()
    lengths = np.array(outputs, dtype=np.float64)[tree.requests]
    kv_tokens = prefix + slots * (own + lengths.mean() / 2)
    read = prompt_tokens_read(tree, lengths, kv_tokens)
    steps = ((read - own) * lengths).sum() / prefix

    ends = [0.0] * min(slots, len(outputs))
    for length in lengths:
        heapq.heappush(ends, heapq.heappop(ends) + length)
    assert steps <= max(ends) * (1 + 1e-9)
    assert max(ends) <= 2 * steps


def test_a_plan_counts_its_memory_so_only_if_asked() -> None:
    job = mixed_job(300)
    apart, shared = (
        make_plan(job, LLAMA_ON_A100, PlannerConfig(shared_decode_tokens=kv))
        for kv in (None, 400_000)
    )
    assert shared.memory_seconds.sum() < apart.memory_seconds.sum()
    assert shared.target_density > apart.target_density
    # With room for one at a time, nobody shares a read.
    alone = make_plan(job, LLAMA_ON_A100, PlannerConfig(shared_decode_tokens=1))
    assert alone.memory_seconds.sum() == pytest.approx(apart.memory_seconds.sum())
    assert (alone.order == apart.order).all()


def test_a_pool_without_tokens_is_refused() -> None:
    with pytest.raises(ValueError, match="shared_decode_tokens must be at least 1, not 0"):
        PlannerConfig(shared_decode_tokens=0)
