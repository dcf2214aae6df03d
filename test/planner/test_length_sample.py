"""Which requests are sampled: first all over the tree, then where lengths vary."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from planner_workloads import LLAMA_ON_A100, prompts

from blendserve.planner import (
    Job,
    LengthModel,
    PlannerConfig,
    PrefixTree,
    choose_sample,
    choose_second_sample,
    first_part,
    make_plan,
    sample_size,
)
from blendserve.planner.length_sample import FIRST_PART, TWO_PART_REQUESTS


def test_a_sample_is_a_part_of_the_job_and_at_most_a_quarter_unless_all_are_asked_for():
    assert sample_size(10_000, 0.01, 8) == 100
    assert sample_size(400, 0.01, 8) == 8
    assert sample_size(20, 0.01, 8) == 5
    assert sample_size(20, 1.0, 8) == 20
    assert sample_size(400, 0.0, 8) == 0
    assert first_part(TWO_PART_REQUESTS - 1) == TWO_PART_REQUESTS - 1
    assert first_part(1_000) == FIRST_PART * 1_000
    with pytest.raises(ValueError, match="between 0 and 1"):
        sample_size(10, 1.5, 0)
    with pytest.raises(ValueError, match="min_requests"):
        sample_size(10, 0.5, -1)


@given(prompts, st.integers(0, 24), st.integers(0, 9), st.data())
def test_both_parts_are_distinct_seeded_and_add_up(rows, size, seed, data):
    n = len(rows)
    size = min(size, n)
    tree = PrefixTree.build(rows)
    first = choose_sample(tree, size, seed)
    assert len(set(first.tolist())) == len(first) == size
    assert first.tolist() == choose_sample(tree, size, seed).tolist()
    sampled = np.zeros(n, dtype=bool)
    sampled[first[: size // 2]] = True
    spread = np.array(data.draw(st.lists(st.sampled_from([0.0, 1.0, 1e6]), min_size=n, max_size=n)))
    second = choose_second_sample(tree, size, seed, sampled, spread, spread, ~sampled)
    assert len(set(second.tolist())) == len(second)
    assert not sampled[second].any()
    assert abs(len(second) + size // 2 - size) <= 1


def test_a_sample_covers_every_large_subtree():
    rows = [np.array([k // 100, k], dtype=np.int32) for k in range(2_000)]
    for seed in range(5):
        sample = choose_sample(PrefixTree.build(rows), 20, seed)
        assert sorted(int(r) // 100 for r in sample) == list(range(20))


def test_a_small_subtree_of_its_own_kind_has_one_in_the_sample():
    """Videos among chats, and as many turns of one conversation, which are no kind of their own."""
    chats = [np.array([1, 10_000 + k, *range(20)], dtype=np.int32) for k in range(4_000)]
    videos = [np.array([2, 20_000 + k, *range(k, k + 20)], dtype=np.int32) for k in range(12)]
    turns = [np.arange(50_000, 50_050 + 40 * k, dtype=np.int32) for k in range(12)]
    tree = PrefixTree.build(chats + videos + turns)
    drawn = np.array([choose_sample(tree, 40, seed) for seed in range(8)])
    kind = np.digitize(drawn, [4_000, 4_012])
    assert ((kind == 1).sum(axis=1) == 1).all()
    assert (kind == 2).mean() < 0.02
    assert len(set(drawn[kind == 1].tolist())) > 2


def test_known_lengths_are_not_sampled():
    tree = PrefixTree.build([np.array([k % 3, k], dtype=np.int32) for k in range(40)])
    only = np.arange(40) != 4
    assert sorted(choose_sample(tree, 39, 0, only).tolist()) == np.flatnonzero(only).tolist()


def exams_and_chats(n, seed):
    """Half of them answered with 2 tokens behind as long a prefix as the chats have of their own
    (so that the first part of the sample cannot tell), half at length."""
    rng = np.random.default_rng(seed)
    kind = np.arange(n) % 2
    ids = [np.append(np.full(20, k), rng.integers(2, 10**9, 20)).astype(np.int32) for k in kind]
    return ids, np.where(kind == 0, 2, 1 + rng.exponential(300, n).astype(int))


def test_the_second_part_goes_where_the_first_one_showed_that_lengths_vary():
    ids, truth = exams_and_chats(20_000, 7)
    job = Job(ids, np.full(20_000, 10_000))
    first = make_plan(job, LLAMA_ON_A100)
    assert len(first.sample) == FIRST_PART * 200
    assert 0.4 < np.mean(first.sample % 2) < 0.6
    observed = {int(r): int(truth[r]) for r in first.sample}
    second = make_plan(
        job, LLAMA_ON_A100, observed=observed, exclude=observed, tree=first.tree, sampled=observed
    )
    assert len(second.sample) == 200 - len(first.sample)
    assert not set(second.sample.tolist()) & observed.keys()
    assert np.mean(second.sample % 2) > 0.95
    observed |= {int(r): int(truth[r]) for r in second.sample}
    third = make_plan(
        job, LLAMA_ON_A100, observed=observed, exclude=observed, tree=first.tree, sampled=observed
    )
    assert len(third.sample) == 0


def test_a_small_sample_is_drawn_at_once():
    n = 100 * (TWO_PART_REQUESTS - 1)
    job = Job([np.array([k]) for k in range(n)], np.full(n, 100))
    plan = make_plan(job, LLAMA_ON_A100)
    assert len(plan.sample) == TWO_PART_REQUESTS - 1
    again = make_plan(job, LLAMA_ON_A100, sampled=plan.sample.tolist(), exclude=plan.sample)
    assert len(again.sample) == 0


def test_two_parts_estimate_better_than_one():
    """Of twelve kinds one varies: the total of what is not sampled, over 30 seeds."""
    rng = np.random.default_rng(8)
    kind = np.arange(6_000) % 12
    ids = [np.append(np.full(20, k), rng.integers(12, 10**9, 20)).astype(np.int32) for k in kind]
    truth = np.where(kind, 50, 1 + rng.exponential(2_000, 6_000).astype(int))
    tree = PrefixTree.build(ids)
    limit, exact = np.full(6_000, 10**5), np.zeros(6_000, dtype=bool)

    def error(sample):
        rest = np.ones(6_000, dtype=bool)
        rest[sample] = False
        found = LengthModel(tree, limit, exact).fit({int(r): int(truth[r]) for r in sample})
        return abs(float((found.mean() - truth)[rest].sum()))

    one_part, two_parts = [], []
    for seed in range(30):
        random = np.random.default_rng(seed)
        one_part.append(error(random.permutation(6_000)[:240]))
        first = choose_sample(tree, first_part(240), seed)
        model = LengthModel(tree, limit, exact).fit({int(r): int(truth[r]) for r in first})
        done = np.isin(np.arange(6_000), first)
        second = choose_second_sample(tree, 240, seed, done, model.deviation(), model.mean(), ~done)
        two_parts.append(error(np.concatenate((first, second))))
    assert np.mean(two_parts) < 0.6 * np.mean(one_part)


def test_the_config_may_ask_for_every_request():
    ids, _ = exams_and_chats(600, 9)
    job = Job(ids, np.full(600, 10_000))
    config = PlannerConfig(sample_fraction=1.0)
    first = make_plan(job, LLAMA_ON_A100, config).sample
    second = make_plan(job, LLAMA_ON_A100, config, sampled=first, exclude=first).sample
    assert sorted([*first.tolist(), *second.tolist()]) == list(range(600))
