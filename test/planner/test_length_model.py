"""The learning length model: what it must never get wrong, and that it beats the sibling mean."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from planner_workloads import LLAMA_ON_A100, mixed_job, prompts

from blendserve.planner import (
    DEFAULT_OUTPUT_TOKENS,
    LengthModel,
    PrefixTree,
    choose_sample,
    estimate,
    make_plan,
)
from blendserve.planner.length_factors import continuation_tokens


def free(tree, limit=100_000):
    n = tree.num_leaves
    return LengthModel(tree, np.full(n, limit), np.zeros(n, dtype=bool))


def families(sizes, prefix_tokens=20, seed=0):
    """A tree of as many unrelated prefixes as there are sizes, and the family of each request."""
    rng = np.random.default_rng(seed)
    kind = np.repeat(np.arange(len(sizes)), sizes)
    ids = [np.append(np.full(prefix_tokens, k), rng.integers(10**6, 10**9, 5)) for k in kind]
    return PrefixTree.build(ids), kind


@given(prompts, st.data())
def test_estimates_are_finite_within_limits_and_true_where_known(ids, data):
    n = len(ids)
    lengths = st.lists(st.sampled_from([0, 1, 2, 300, 20_000]), min_size=n, max_size=n)
    flags = st.lists(
        st.sampled_from(["unknown", "finished", "running", "exact"]), min_size=n, max_size=n
    )
    limit, truth, state = np.array(data.draw(lengths)), data.draw(lengths), data.draw(flags)
    exact = np.array([s == "exact" for s in state], dtype=bool)
    finished = {r: int(min(truth[r], limit[r])) for r in range(n) if state[r] == "finished"}
    running = {r: int(min(truth[r], limit[r])) for r in range(n) if state[r] == "running"}
    model = LengthModel(PrefixTree.build(ids), limit, exact).fit(finished, running)
    low, mean, high = model.quantile(0.1), model.mean(), model.quantile(0.9)
    spread = model.deviation()
    assert np.all(np.isfinite(spread))
    assert np.all(spread >= 0)
    for values in (low, mean, high):
        assert np.all(np.isfinite(values))
        assert np.all((values >= 0) & (values <= limit))
        assert [values[r] for r in finished] == list(finished.values())
        assert all(values[r] >= k for r, k in running.items())
        assert np.array_equal(values[exact], limit[exact])
    assert np.all(low <= high)


def test_without_answers_the_prior_holds_and_a_limit_cuts_its_tail():
    tree, _ = families([3])
    assert free(tree).mean() == pytest.approx(np.full(3, DEFAULT_OUTPUT_TOKENS))
    capped = free(tree, limit=256).mean()
    assert np.all((capped > 100) & (capped < 256))


def test_kinds_far_apart_keep_their_own_lengths():
    tree, kind = families([400, 400, 400])
    truth = np.array([2, 300, 16_000])[kind]
    observed = {int(r): int(truth[r]) for r in choose_sample(tree, 36, 0)}
    assert free(tree).fit(observed).mean() == pytest.approx(truth, rel=0.02)


def test_a_lone_answer_among_alike_families_is_drawn_to_the_rest():
    """Pairs from one distribution: the partner of a long answer is no longer than any other."""
    tree, kind = families([2] * 300)
    rng = np.random.default_rng(1)
    truth = 1 + rng.exponential(300, len(kind)).astype(int)
    half = {r: int(truth[r]) for r in range(0, 600, 2)}
    model = free(tree).fit(half).mean()
    paper = estimate(tree, half, np.full(600, 10**5), np.zeros(600, dtype=bool))
    rest = np.arange(1, 600, 2)
    assert np.abs(model - truth)[rest].mean() < 0.8 * np.abs(paper - truth)[rest].mean()
    assert model[rest].mean() == pytest.approx(truth[rest].mean(), rel=0.15)


def test_families_that_differ_are_told_apart():
    tree, kind = families([40] * 30)
    rng = np.random.default_rng(2)
    means = rng.uniform(20, 2_000, 30)
    truth = rng.poisson(means[kind])
    observed = {r: int(truth[r]) for r in range(0, len(kind), 20)}
    assert free(tree).fit(observed).mean() == pytest.approx(means[kind], rel=0.5)


def test_prompt_length_counts_where_it_tells():
    rng = np.random.default_rng(3)
    ids = [rng.integers(0, 10**9, length) for length in rng.integers(10, 1_000, 2_000)]
    truth = np.array([20 if len(p) < 250 else 400 for p in ids])
    tree = PrefixTree.build(ids)
    observed = {int(r): int(truth[r]) for r in choose_sample(tree, 100, 0)}
    error = np.abs(free(tree).fit(observed).mean() - truth).mean()
    assert error < 0.3 * np.abs(truth - truth.mean()).mean()


def test_still_running_counts_as_longer_than_that():
    """After 100 tokens only the short ones of 200 exponential lengths are finished."""
    tree, _ = families([400])
    truth = 1 + np.random.default_rng(4).exponential(200, 400).astype(int)
    finished = {r: int(truth[r]) for r in range(200) if truth[r] <= 100}
    running = {r: 100 for r in range(200) if truth[r] > 100}
    blind = free(tree).fit(finished).mean()[300:]
    told = free(tree).fit(finished, running).mean()
    assert blind.mean() < 0.4 * 200
    assert told[300:].mean() == pytest.approx(200, rel=0.3)
    assert all(told[r] > 101 for r in running)


def test_observing_one_by_one_is_fitting_all_and_a_result_ends_the_running():
    tree, _ = families([10, 10])
    model = free(tree)
    before = model.mean()
    model.observe(3, 50, finished=False)
    model.observe(3, 80)
    model.observe(12, 7)
    assert np.array_equal(model.mean(), free(tree).fit({3: 80, 12: 7}).mean())
    assert not np.array_equal(model.mean(), before)
    assert np.array_equal(model.fit({}).mean(), before)


def test_the_deviation_is_that_of_the_lengths_and_a_limit_cuts_it():
    tree, kind = families([1_500, 1_500])
    rng = np.random.default_rng(10)
    truth = np.where(kind == 0, 2, 1 + rng.exponential(200, 3_000).astype(int))
    observed = {r: int(truth[r]) for r in range(0, 3_000, 3)}
    found = free(tree).fit(observed).deviation()
    assert not found[::3].any()
    rest = np.arange(3_000) % 3 > 0
    assert np.all(found[rest & (kind == 0)] < 2)
    assert found[rest & (kind == 1)].mean() == pytest.approx(200, rel=0.15)
    capped = free(tree, limit=100).fit(observed).deviation()
    cut = np.minimum(truth[kind == 1], 100).std()
    assert capped[rest & (kind == 1)].mean() == pytest.approx(cut, rel=0.15)
    # Of exponential lengths the rest is as spread as the whole.
    running = free(tree).fit(observed, {2_999: 150}).deviation()[2_999]
    assert running == pytest.approx(200, rel=0.3)


def test_a_continued_conversation_tells_the_length_of_its_answers():
    """The next turn's prompt holds this turn's answer and a short message."""
    rng = np.random.default_rng(11)
    ids, truth = [], []
    for _ in range(500):
        prompt = rng.integers(0, 10**9, 30)
        for _ in range(4):
            ids.append(prompt)
            truth.append(1 + int(rng.exponential(300)))
            prompt = np.append(prompt, rng.integers(0, 10**9, truth[-1] + rng.integers(5, 30)))
    tree, truth = PrefixTree.build(ids), np.array(truth)
    observed = {r: int(truth[r]) for r in range(0, 2_000, 20)}
    found = free(tree).fit(observed).mean()
    continued = np.arange(2_000) % 4 < 3
    continued[list(observed)] = False
    blind = np.abs(truth[continued] - truth[list(observed)].mean()).mean()
    assert np.abs(found - truth)[continued].mean() < 0.5 * blind


def test_the_continuation_of_a_prompt_is_the_longer_one_next_to_it():
    rows = [[1], [1, 2], [1, 2], [1, 2, 3, 4], [5, 5], [5, 6], [7]]
    tree = PrefixTree.build([np.array(row, dtype=np.int32) for row in rows])
    found = continuation_tokens(tree)
    assert dict(zip(tree.requests.tolist(), found.tolist(), strict=True)) == {
        0: 1, 1: 2, 2: 2, 3: 0, 4: 0, 5: 0, 6: 0
    }  # fmt: skip
    assert continuation_tokens(PrefixTree.build([])).tolist() == []


def test_quantiles_cover_as_often_as_they_say():
    tree, _ = families([3_000])
    truth = 1 + np.random.default_rng(5).exponential(200, 3_000).astype(int)
    model = free(tree).fit({r: int(truth[r]) for r in range(1_000)})
    for q in (0.1, 0.5, 0.9):
        assert np.mean(truth[1_000:] <= model.quantile(q)[1_000:]) == pytest.approx(q, abs=0.05)


def test_wrong_observations_are_refused():
    model = free(families([2])[0])
    with pytest.raises(ValueError, match="observed request 2"):
        model.observe(2, 1)
    with pytest.raises(ValueError, match="negative"):
        model.observe(0, -1)
    with pytest.raises(ValueError, match="between 0 and 1"):
        model.quantile(1.5)


def test_a_sample_favours_requests_that_have_less_in_common():
    rng = np.random.default_rng(6)
    exam = rng.integers(0, 10**9, 600)
    ids = [np.append(exam, rng.integers(0, 10**9, 60)) for _ in range(2_000)]
    ids += [rng.integers(0, 10**9, 300) for _ in range(2_000)]
    sample = choose_sample(PrefixTree.build(ids), 40, 0)
    assert len(sample) == 40
    assert 1 <= np.sum(sample < 2_000) < 10


def test_a_plan_takes_what_runs_into_account():
    job = mixed_job(400)
    job.known_output_tokens[:] = -1
    plan = make_plan(job, LLAMA_ON_A100, observed={0: 5}, exclude=[0, 1], running={1: 9_000})
    assert plan.estimated_output_tokens[1] > 9_000
    assert 1 not in plan.order
