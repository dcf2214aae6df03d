"""Predicted times, and the cache replay below them against one that keeps single tokens."""

from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from planner_workloads import LLAMA_ON_A100, jobs, mixed_job

from blendserve.planner import CostModel, kv_capacity_tokens, make_plan, partition, predict
from blendserve.planner.prediction import dual_scan_sequence, predict_order, replay_cache


def brute_force_hits(job, order, capacity):
    """Token by token: an LRU cache of prompt positions (by all tokens up to them) and outputs."""
    last_use: dict[tuple, tuple] = {}  # what is kept -> (time, how soon it goes among equals)
    hits = []
    for time, request in enumerate(order):
        ids = tuple(job.token_ids[request].tolist())
        prefixes = [ids[: k + 1] for k in range(len(ids))]
        hit = 0
        while hit < len(ids) and prefixes[hit] in last_use:
            hit += 1
        hits.append(hit)
        for depth, prefix in enumerate(prefixes):
            last_use[prefix] = (time, -depth)
        for k in range(int(job.known_output_tokens[request])):
            last_use["output", request, k] = (time, -len(ids) - k - 1)
        for victim in sorted(last_use, key=last_use.__getitem__)[
            : max(len(last_use) - capacity, 0)
        ]:
            del last_use[victim]
    return hits


@given(jobs(), st.integers(1, 60), st.randoms(use_true_random=False))
def test_the_replay_is_an_lru_cache_of_tokens(job, capacity, random):
    job.known_output_tokens[:] = np.minimum(job.known_output_tokens, 12)
    order = random.sample(range(len(job)), len(job))
    tree = job.build_tree()
    leaf = {int(request): k for k, request in enumerate(tree.requests)}
    leaves = np.array([leaf[r] for r in order], dtype=np.int64)
    found = replay_cache(tree, leaves, job.known_output_tokens[tree.requests][leaves], capacity)
    assert found.tolist() == brute_force_hits(job, order, capacity)


@given(jobs())
def test_a_cache_without_end_finds_all_that_is_shared_in_any_order(job):
    tree = job.build_tree()
    for leaves in (np.arange(len(job)), np.arange(len(job))[::-1]):
        assert replay_cache(tree, leaves, np.zeros(len(job)), np.inf).sum() == tree.shared.sum()


@given(jobs(), st.integers(1, 50_000), st.integers(1, 3))
def test_every_order_is_of_all_requests_and_slower_than_the_bound(job, capacity, replicas):
    plan = make_plan(job, LLAMA_ON_A100)
    parts = partition(plan, replicas, LLAMA_ON_A100).plans
    found = predict(plan, LLAMA_ON_A100, capacity, parts)
    for runs in (found.fcfs, found.dfs, found.blend):
        assert sorted(np.concatenate([run.order for run in runs])) == sorted(plan.order)
    fastest = min(found.fcfs_seconds, found.dfs_seconds, found.blend_seconds)
    assert fastest >= found.bound_seconds * (1 - 1e-9)


def test_the_bound_is_the_larger_sum_after_the_best_sharing():
    job = mixed_job(500)
    plan = make_plan(job, LLAMA_ON_A100)
    tree = job.build_tree()
    d = job.known_output_tokens[tree.requests]
    compute = LLAMA_ON_A100.compute_seconds(tree.length, d).sum()
    compute -= LLAMA_ON_A100.prefill_seconds_saved(tree.shared).sum()
    memory = LLAMA_ON_A100.memory_seconds(tree.length, d).sum()
    assert predict(plan, LLAMA_ON_A100, 1e6).bound_seconds == pytest.approx(max(compute, memory))


@given(jobs(), st.integers(1, 40_000))
def test_a_window_is_one_filling_of_the_pool(job, capacity):
    plan = make_plan(job, LLAMA_ON_A100)
    run = predict_order(plan, np.sort(plan.order), LLAMA_ON_A100, capacity)
    held = 0.0
    windows: dict[int, list[float]] = {}
    for k, request in enumerate(run.order):
        p, d = len(job.token_ids[request]), int(job.known_output_tokens[request])
        sums = windows.setdefault(int(held // capacity), [0.0, 0.0])
        saved = LLAMA_ON_A100.prefill_seconds_saved(run.cached_tokens[k])
        sums[0] += float(LLAMA_ON_A100.compute_seconds(p, d) - saved)
        sums[1] += float(LLAMA_ON_A100.memory_seconds(p, d))
        held += p - run.cached_tokens[k] + d / 2
    found = [sums for sums in zip(*run.window_seconds(), strict=True) if any(sums)]
    expected = [sums for sums in windows.values() if any(sums)]
    assert np.ravel(found) == pytest.approx(np.ravel(expected))


def test_the_scanners_keep_the_density_of_what_is_left():
    job = mixed_job(3_000)
    job.known_output_tokens[:] = np.minimum(job.known_output_tokens, 3_000)
    plan = make_plan(job, LLAMA_ON_A100)
    order, left = dual_scan_sequence(plan)
    assert sorted(order.tolist()) == sorted(plan.order.tolist())
    assert order[left].tolist() == plan.order[: left.sum()].tolist()
    assert order[~left].tolist() == plan.order[left.sum() :][::-1].tolist()
    place = np.empty(3_000, dtype=np.int64)
    place[plan.order] = np.arange(3_000)
    compute = np.cumsum(plan.compute_seconds[place[order]]) / plan.compute_seconds.sum()
    memory = np.cumsum(plan.memory_seconds[place[order]]) / plan.memory_seconds.sum()
    largest = (plan.compute_seconds / plan.compute_seconds.sum()).max()
    largest += (plan.memory_seconds / plan.memory_seconds.sum()).max()
    assert np.abs(compute - memory).max() <= largest


def test_a_plan_keeps_the_sharing_that_a_shuffle_loses():
    job = mixed_job(4_000, seed=2)
    job.known_output_tokens[:] = np.minimum(job.known_output_tokens, 4_000)
    plan = make_plan(job, LLAMA_ON_A100)
    found = predict(plan, LLAMA_ON_A100, 20_000)
    assert found.sharing_random < 0.9 * plan.sharing_best
    assert found.sharing_planned > 0.97 * plan.sharing_best


def test_an_empty_job_takes_no_time():
    job = mixed_job(0)
    found = predict(make_plan(job, LLAMA_ON_A100), LLAMA_ON_A100, 100)
    assert (found.fcfs_seconds, found.blend_seconds, found.bound_seconds) == (0.0, 0.0, 0.0)


def test_the_kv_cache_has_what_the_weights_leave():
    expected = (80e9 * 0.9 - LLAMA_ON_A100.model.weight_bytes) / 131_072
    assert kv_capacity_tokens(LLAMA_ON_A100) == int(expected)
    small = replace(LLAMA_ON_A100.hardware, memory_bytes=17e9)
    with pytest.raises(ValueError, match="no room for a KV cache: take more devices"):
        kv_capacity_tokens(CostModel(LLAMA_ON_A100.model, small))


def test_a_cache_without_tokens_is_refused():
    plan = make_plan(mixed_job(3), LLAMA_ON_A100)
    with pytest.raises(ValueError, match="capacity must be at least one token"):
        predict(plan, LLAMA_ON_A100, 0)
