"""One plan into several: nothing lost, nothing twice, equal work, sharing kept."""

from itertools import pairwise

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from planner_workloads import LLAMA_ON_A100, jobs, mixed_job, shared_tokens

from blendserve.planner import DualScanner, Job, Side, make_plan, partition


@pytest.fixture(scope="module")
def mixed_plan():
    return make_plan(mixed_job(6_000), LLAMA_ON_A100)


@pytest.mark.parametrize("replicas", [2, 4, 8])
def test_a_mixed_job_is_divided_evenly_and_keeps_its_sharing(mixed_plan, replicas):
    parts = partition(mixed_plan, replicas, LLAMA_ON_A100)
    assert parts.imbalance < 0.02
    assert parts.lost_sharing < 0.01
    assert parts.density_spread < 0.03


@pytest.mark.parametrize("replicas", [2, 4, 8])
def test_the_bars_hold_for_a_job_that_is_bound_by_compute(replicas):
    job = mixed_job(6_000, seed=1)
    job.known_output_tokens[:] = np.minimum(job.known_output_tokens, 300)
    plan = make_plan(job, LLAMA_ON_A100)
    parts = partition(plan, replicas, LLAMA_ON_A100)
    assert plan.target_density > 1
    assert parts.imbalance < 0.02
    assert parts.lost_sharing < 0.01


@pytest.mark.parametrize("replicas", [2, 4, 8])
def test_the_bars_hold_where_a_few_answers_are_most_of_the_work(replicas):
    plan = make_plan(mixed_job(1_000), LLAMA_ON_A100)
    largest = (plan.compute_seconds + plan.memory_seconds).max()
    parts = partition(plan, replicas, LLAMA_ON_A100)
    assert largest > 0.05 * parts.seconds.mean()
    assert parts.imbalance < 0.02
    assert parts.lost_sharing < 0.01


@pytest.mark.parametrize("seed", [1, 2, 3])
def test_a_few_large_answers_are_dealt_out_evenly_too(seed):
    """600 requests on 8 replicas: about 30 videos, the largest of them half of a replica's share or
    more, are nearly all of the time."""
    plan = make_plan(mixed_job(600, seed), LLAMA_ON_A100)
    parts = partition(plan, 8, LLAMA_ON_A100)
    assert plan.memory_seconds.max() > 0.4 * parts.seconds.mean()
    assert parts.imbalance < 0.02
    assert parts.lost_sharing < 0.01


def test_each_replica_has_a_part_of_both_ends():
    job = mixed_job(6_000)
    job.known_output_tokens[:] = np.minimum(job.known_output_tokens, 4_000)
    plan = make_plan(job, LLAMA_ON_A100)
    place = np.empty(6_000, dtype=np.int64)
    place[plan.order] = np.arange(6_000)
    for sub in partition(plan, 4, LLAMA_ON_A100).plans:
        assert sub.density[0] > plan.target_density
        assert sub.density[-1] < plan.target_density
        assert np.all(np.diff(place[sub.order]) > 0)


@given(jobs(), st.integers(1, 9))
def test_every_request_is_in_exactly_one_sub_plan(job, replicas):
    plan = make_plan(job, LLAMA_ON_A100)
    parts = partition(plan, replicas, LLAMA_ON_A100)
    assert len(parts.plans) == replicas
    assert sorted(r for sub in parts.plans for r in sub.order.tolist()) == sorted(plan.order)


@given(jobs(), st.integers(1, 5))
def test_the_figures_of_a_sub_plan_are_those_of_its_requests_alone(job, replicas):
    plan = make_plan(job, LLAMA_ON_A100)
    for sub in partition(plan, replicas, LLAMA_ON_A100).plans:
        prompts = [job.token_ids[r] for r in sub.order]
        shared = [shared_tokens(a, b) for a, b in pairwise(prompts)]
        assert sub.shared_with_previous.tolist() == [0] * bool(prompts) + shared
        p, d = np.array([len(ids) for ids in prompts]), job.known_output_tokens[sub.order]
        compute = LLAMA_ON_A100.compute_seconds(p, d).sum()
        compute -= LLAMA_ON_A100.prefill_seconds_saved(sub.shared_with_previous).sum()
        assert sub.compute_seconds.sum() == pytest.approx(compute)
        assert sub.memory_seconds.sum() == pytest.approx(LLAMA_ON_A100.memory_seconds(p, d).sum())
        alone = Job(prompts, job.max_output_tokens[sub.order], d)
        assert sub.prompt_tokens == p.sum()
        assert sub.unique_tokens == alone.build_tree().unique_tokens


@given(jobs(), st.integers(2, 5))
def test_no_replica_is_further_behind_than_one_request_and_one_path(job, replicas):
    """The replica with most work has at most the mean and the largest request more, where the
    requests share nothing (a shared prefix may be computed again)."""
    ids = [np.append(np.int32(100 + k), ids) for k, ids in enumerate(job.token_ids)]
    plan = make_plan(Job(ids, job.max_output_tokens, job.known_output_tokens), LLAMA_ON_A100)
    parts = partition(plan, replicas, LLAMA_ON_A100)
    largest = (plan.compute_seconds + plan.memory_seconds).max(initial=0.0)
    total = plan.compute_seconds.sum() + plan.memory_seconds.sum()
    for sub in parts.plans:
        work = sub.compute_seconds.sum() + sub.memory_seconds.sum()
        assert work <= 1.0001 * (total / replicas + 2 * largest)


def test_a_sub_plan_can_be_scanned(mixed_plan):
    sub = partition(mixed_plan, 8, LLAMA_ON_A100).plans[3]
    scanner = DualScanner(sub)
    assert scanner.target_density == pytest.approx(sub.target_density)
    taken = {scanner.take(side) for side in [Side.LEFT, Side.RIGHT] * (len(sub.order) // 2)}
    assert taken <= set(sub.order.tolist())


def test_a_sample_goes_where_its_requests_go():
    job = mixed_job(500)
    job.known_output_tokens[:] = -1
    plan = make_plan(job, LLAMA_ON_A100)
    parts = partition(plan, 3, LLAMA_ON_A100)
    for sub in parts.plans:
        assert set(sub.sample.tolist()) <= set(sub.order.tolist())
    assert sorted(r for sub in parts.plans for r in sub.sample) == sorted(plan.sample)


def test_one_replica_has_the_whole_plan(mixed_plan):
    (sub,) = partition(mixed_plan, 1, LLAMA_ON_A100).plans
    assert sub.order.tolist() == mixed_plan.order.tolist()
    assert sub.density == pytest.approx(mixed_plan.density)


def test_no_replica_is_refused(mixed_plan):
    with pytest.raises(ValueError, match="replicas must be at least 1, not 0"):
        partition(mixed_plan, 0, LLAMA_ON_A100)
