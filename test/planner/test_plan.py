"""Plans as a whole: what holds for every job."""

import math
from itertools import pairwise

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from planner_workloads import LLAMA_ON_A100, jobs, mixed_job, permuted, shared_tokens

from blendserve.planner import EncoderWork, Job, MediaRuns, PlannerConfig, make_plan, transform
from blendserve.planner.annotation import annotate

SAVED = EncoderWork.of(LLAMA_ON_A100, MediaRuns.none()).saved(LLAMA_ON_A100)


def lines(job, order):
    """The content of the requests in this order, without their indices."""
    return [(tuple(job.token_ids[r].tolist()), int(job.known_output_tokens[r])) for r in order]


def transformed(job, sharing_preserved=0.99):
    tree = job.build_tree()
    outputs = job.known_output_tokens[tree.requests]
    compute = LLAMA_ON_A100.compute_seconds(tree.length, outputs)
    memory = LLAMA_ON_A100.memory_seconds(tree.length, outputs)
    return tree, compute, memory, transform(tree, compute, memory, SAVED, sharing_preserved)


@given(jobs())
def test_every_request_is_planned_exactly_once(job):
    plan = make_plan(job, LLAMA_ON_A100)
    assert sorted(plan.order.tolist()) == list(range(len(job)))


@given(jobs(), st.randoms(use_true_random=False))
def test_the_order_of_the_lines_does_not_matter(job, random):
    permutation = np.array(random.sample(range(len(job)), len(job)), dtype=np.int64)
    other = permuted(job, permutation)
    first, second = make_plan(job, LLAMA_ON_A100), make_plan(other, LLAMA_ON_A100)
    assert lines(job, first.order) == lines(other, second.order)
    assert first.density.tolist() == second.density.tolist()


def test_the_order_of_the_lines_does_not_matter_with_estimates():
    job = mixed_job(300)
    job.known_output_tokens[:] = -1
    permutation = np.random.default_rng(1).permutation(300)
    other = permuted(job, permutation)
    first, second = make_plan(job, LLAMA_ON_A100), make_plan(other, LLAMA_ON_A100)
    assert lines(job, first.sample) == lines(other, second.sample)
    back = {int(old): new for new, old in enumerate(permutation)}
    observed = {int(r): 10 + 3 * k for k, r in enumerate(first.sample)}
    first = make_plan(job, LLAMA_ON_A100, observed=observed, exclude=observed)
    moved = {back[r]: tokens for r, tokens in observed.items()}
    second = make_plan(other, LLAMA_ON_A100, observed=moved, exclude=moved)
    assert lines(job, first.order) == lines(other, second.order)


@given(jobs())
def test_sharing_is_counted_token_by_token_and_kept(job):
    plan = make_plan(job, LLAMA_ON_A100)
    prompts = [job.token_ids[r] for r in plan.order]
    shared = [shared_tokens(a, b) for a, b in pairwise(prompts)]
    assert plan.shared_with_previous[1:].tolist() == shared
    best = plan.prompt_tokens - plan.unique_tokens
    assert sum(shared) >= 0.99 * best - 1e-6
    if plan.prompt_tokens:
        assert plan.sharing_planned == pytest.approx(sum(shared) / plan.prompt_tokens)
        assert plan.sharing_best == pytest.approx(best / plan.prompt_tokens)


@given(jobs())
def test_compute_and_memory_add_up_to_the_job(job):
    plan = make_plan(job, LLAMA_ON_A100)
    p = np.array([len(ids) for ids in job.token_ids])
    d = job.known_output_tokens
    compute = LLAMA_ON_A100.compute_seconds(p, d).sum()
    compute -= LLAMA_ON_A100.prefill_seconds_saved(plan.shared_with_previous).sum()
    memory = LLAMA_ON_A100.memory_seconds(p, d).sum()
    assert plan.compute_seconds.sum() == pytest.approx(compute)
    assert plan.memory_seconds.sum() == pytest.approx(memory)
    if memory > 0:
        assert plan.target_density == pytest.approx(compute / memory)
    else:
        assert plan.target_density == math.inf
    assert plan.request_density[plan.order].tolist() == plan.density.tolist()


@given(jobs())
def test_node_densities_equal_a_brute_force_recomputation(job):
    tree, compute, memory, _ = transformed(job)
    marks = annotate(tree, compute, memory, SAVED)
    prompts = [job.token_ids[r] for r in tree.requests]
    for node in range(tree.num_nodes):
        below = range(tree.first[node], tree.end[node])
        common = [shared_tokens(prompts[k - 1], prompts[k]) for k in list(below)[1:]]
        total = sum(compute[k] for k in below)
        saved = sum(float(LLAMA_ON_A100.prefill_seconds_saved(c)) for c in common)
        reads = sum(memory[k] for k in below)
        assert marks.compute_seconds[node] == pytest.approx(total)
        assert marks.saved_seconds[node] == pytest.approx(saved)
        assert marks.memory_seconds[node] == pytest.approx(reads)
        if reads > 0:
            assert marks.density[node] == pytest.approx((1 - saved / total) * total / reads)
        else:
            assert marks.density[node] == math.inf


@given(jobs(), st.sampled_from([0.0, 0.5, 0.9, 0.99, 1.0]))
def test_units_are_non_increasing_and_what_stays_whole_is_over_the_budget(job, preserved):
    tree, _, _, result = transformed(job, preserved)
    assert np.all(result.unit_density[1:] <= result.unit_density[:-1])
    whole = ~result.split_nodes
    whole[0] = False
    assert np.all(result.split_cost[whole] > result.threshold)
    assert np.all(result.split_cost[result.split_nodes] <= result.threshold)
    # A unit of several requests is below one whole node: nothing inside it was split.
    for unit in range(len(result.unit_density)):
        leaves = result.order[result.unit == unit]
        if len(leaves) > 1:
            below = (tree.first <= leaves.min()) & (leaves.max() < tree.end) & (tree.depth > 0)
            assert np.any(below & whole)


@given(jobs())
def test_each_leaf_splits_at_most_once(job):
    _, _, _, result = transformed(job)
    assert sorted(result.order.tolist()) == list(range(len(job)))
    sizes = np.bincount(result.unit, minlength=len(result.unit_density))[result.unit]
    assert np.all(sizes[result.alone[result.order]] == 1)


@given(jobs())
def test_nothing_is_split_when_all_sharing_must_stay_or_no_order_is_better(job):
    uniform = Job(job.token_ids, job.max_output_tokens, np.zeros(len(job)))
    plan = make_plan(uniform, LLAMA_ON_A100)
    assert (plan.split_nodes, plan.moved_requests) == (0, 0)
    plan = make_plan(job, LLAMA_ON_A100, PlannerConfig(sharing_preserved=1.0))
    assert plan.shared_with_previous.sum() == plan.prompt_tokens - plan.unique_tokens


@given(jobs())
def test_with_no_sharing_to_keep_the_leaf_sequence_is_non_increasing(job):
    tree, compute, memory, result = transformed(job, 0.0)
    marks = annotate(tree, compute, memory, SAVED)
    alone = marks.leaf_density[result.order]
    assert np.all(alone[1:] <= alone[:-1])


def test_a_mixed_job_is_blended_within_the_sharing_budget():
    job = mixed_job(2_000)
    plan = make_plan(job, LLAMA_ON_A100)
    assert plan.sharing_planned >= 0.99 * plan.sharing_best
    assert plan.moved_requests > 0
    outputs = job.known_output_tokens[plan.order]
    assert np.mean(outputs[-100:]) > 100 * np.mean(outputs[:1000])
    # In tenths of the order, density falls (within what sharing costs to put right).
    tenths = [
        part.sum() / reads.sum()
        for part, reads in zip(
            np.array_split(plan.compute_seconds, 10),
            np.array_split(plan.memory_seconds, 10),
            strict=True,
        )
    ]
    for earlier, later in pairwise(tenths):
        assert later < 1.05 * earlier


def test_one_long_answer_leaves_its_subject():
    """A single outlier moves to the memory end; the subject keeps its shared prefix."""
    rng = np.random.default_rng(3)
    prefix = rng.integers(0, 1000, 600).astype(np.int32)
    ids = [np.append(prefix, np.int32(k)) for k in range(300)]
    ids += [rng.integers(0, 1000, 200).astype(np.int32) for _ in range(50)]
    known = np.array([2] * 300 + [400] * 50)
    known[150] = 5_000
    plan = make_plan(Job(ids, np.full(350, 10_000), known), LLAMA_ON_A100)
    assert plan.order[-1] == 150
    assert plan.sharing_planned >= 0.99 * plan.sharing_best
    assert plan.moved_requests == 1


def test_sampled_answers_inform_the_plan_of_the_rest():
    job = mixed_job(1_000, seed=5)
    truth = job.known_output_tokens.copy()
    job.known_output_tokens[:] = -1
    first = make_plan(job, LLAMA_ON_A100, PlannerConfig(sample_fraction=0.05))
    observed = {int(r): int(truth[r]) for r in first.sample}
    second = make_plan(
        job, LLAMA_ON_A100, observed=observed, exclude=observed.keys(), tree=first.tree
    )
    assert len(second.sample) == 0
    assert set(second.order.tolist()) == set(range(1_000)) - observed.keys()
    assert np.isnan(second.request_density[first.sample]).all()
    error = np.abs(second.estimated_output_tokens - truth).sum()
    assert error < 0.5 * np.abs(first.estimated_output_tokens - truth).sum()


@pytest.mark.parametrize(
    ("ids", "known"),
    [
        ([], []),
        ([[7]], [0]),
        ([[7]], [1]),
        ([[]], [3]),
        ([[1, 2]] * 5, [4] * 5),
        ([[1], [2], [3]], [0, 1, 0]),
        ([[], [1], [1], [1, 2]], [0, 0, 0, 0]),
    ],
)
def test_small_jobs(ids, known):
    job = Job([np.array(p, dtype=np.int32) for p in ids], np.full(len(ids), 9), np.array(known))
    plan = make_plan(job, LLAMA_ON_A100)
    assert sorted(plan.order.tolist()) == list(range(len(ids)))
    assert not np.isnan(plan.density).any()


@settings(max_examples=10)
@given(jobs(repeat=16_384))
def test_prompts_of_up_to_147k_tokens_are_planned_like_short_ones(job):
    """Up to nine ids, each 16,384 times: chains of nested prompts, duplicates, empty ones."""
    plan = make_plan(job, LLAMA_ON_A100)
    assert sorted(plan.order.tolist()) == list(range(len(job)))
    short = [job.token_ids[r][::16_384] for r in plan.order]
    shared = [16_384 * shared_tokens(a, b) for a, b in pairwise(short)]
    assert plan.shared_with_previous.tolist() == [0] * bool(short) + shared
    best = plan.prompt_tokens - plan.unique_tokens
    assert sum(shared) >= 0.99 * best - 1e-6
    distinct = {tuple(ids[:k].tolist()) for ids in short for k in range(1, len(ids) + 1)}
    assert plan.unique_tokens == 16_384 * len(distinct)
    p, d = np.array([16_384 * len(ids) for ids in short]), job.known_output_tokens[plan.order]
    compute = LLAMA_ON_A100.compute_seconds(p, d).sum()
    compute -= LLAMA_ON_A100.prefill_seconds_saved(plan.shared_with_previous).sum()
    assert plan.compute_seconds.sum() == pytest.approx(compute)
    assert plan.memory_seconds.sum() == pytest.approx(LLAMA_ON_A100.memory_seconds(p, d).sum())


def test_a_very_long_prompt_keeps_exact_sums():
    ids = [np.zeros(131_072, dtype=np.int32), np.zeros(1, dtype=np.int32)]
    plan = make_plan(Job(ids, np.array([5, 5]), np.array([5, 1])), LLAMA_ON_A100)
    assert plan.unique_tokens == 131_072


def test_wrong_input_is_refused():
    ids = [np.array([1], dtype=np.int32)]
    with pytest.raises(ValueError, match="max_output_tokens has shape"):
        Job(ids, np.array([1, 2]))
    with pytest.raises(ValueError, match="must not be negative"):
        Job(ids, np.array([-1]))
    with pytest.raises(ValueError, match="observed request 4"):
        make_plan(Job(ids, np.array([1])), LLAMA_ON_A100, observed={4: 1})
    with pytest.raises(ValueError, match="excluded request 4"):
        make_plan(Job(ids, np.array([1])), LLAMA_ON_A100, exclude=[4])
    with pytest.raises(ValueError, match="sharing_preserved"):
        PlannerConfig(sharing_preserved=1.5)


def test_an_estimate_says_how_far_it_may_be_off():
    job = mixed_job(400)
    outputs = job.known_output_tokens.copy()
    known = make_plan(job, LLAMA_ON_A100).likely_output_tokens
    assert (known == outputs[:, None]).all()
    job.known_output_tokens[:] = -1
    observed = {r: int(outputs[r]) for r in range(0, 400, 2)}
    plan = make_plan(job, LLAMA_ON_A100, observed=observed)
    likely = plan.likely_output_tokens
    assert (likely[::2] == outputs[::2, None]).all()
    assert (np.diff(likely, axis=1) >= 0).all()
    # Chat answers are exponential, so they deviate by about their mean; exams have 2 tokens each.
    unseen = np.arange(1, 400, 2)
    chat = unseen[(outputs[unseen] > 2) & (outputs[unseen] < 2_000)]
    exam = unseen[outputs[unseen] == 2]
    spread = likely.std(axis=1)
    assert 0.5 < np.median(spread[chat] / plan.estimated_output_tokens[chat]) < 1.5
    assert np.median(spread[exam]) < 1.0
