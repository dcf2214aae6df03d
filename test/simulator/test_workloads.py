"""Workloads: their targets, their traces and twins, and what is refused."""

import numpy as np
import pytest

from blendserve.planner import PrefixTree
from blendserve.simulator import traces
from blendserve.simulator.bounds import lower_bound
from blendserve.simulator.exam import exam
from blendserve.simulator.step_time import Overlap, OverlapModel
from blendserve.simulator.workloads import (
    GRID_DENSITIES,
    GRID_SHARINGS,
    REFERENCE,
    WORKLOADS,
    UnknownWorkloadError,
    build,
    mix_named,
)


def density_and_sharing(workload):
    tree = workload.job().build_tree()
    ideal = OverlapModel.of(Overlap.IDEAL)
    bound = lower_bound(tree, workload.output_tokens, REFERENCE.step_costs, ideal)
    return bound.compute_seconds / bound.memory_seconds, tree.sharing_ratio


@pytest.mark.parametrize(
    "name", [*WORKLOADS, "sharegpt:1.2:0.25", "wildchat:1.0:0.25", "lmsys:1.3:0.15"]
)
def test_a_mix_has_the_density_and_sharing_it_is_named_for(name):
    mix = mix_named(name)
    workload = build(name, 20_000, synthetic=True)
    density, sharing = density_and_sharing(workload)
    # One video among 20,000 requests is up to 5 % of the density, and no two are alike.
    assert density == pytest.approx(mix.density, rel=0.1)
    assert sharing == pytest.approx(mix.sharing, abs=0.012)
    assert len(workload) == 20_000
    assert np.bincount(workload.source).sum() == 20_000


def test_the_grid_has_65_points():
    assert len(GRID_DENSITIES) * len(GRID_SHARINGS) == 65
    assert (min(GRID_DENSITIES), max(GRID_DENSITIES)) == (0.8, 1.4)


def test_the_same_arguments_give_the_same_workload():
    first, second = (build("trace2", 2_000, seed=3, synthetic=True) for _ in range(2))
    assert np.array_equal(first.prompts.tokens, second.prompts.tokens)
    assert np.array_equal(first.output_tokens, second.output_tokens)
    other = build("trace2", 2_000, seed=4, synthetic=True)
    assert not np.array_equal(first.output_tokens, other.output_tokens)


def test_every_trace_has_a_system_prompt_of_its_own():
    workload = build("trace1", 2_000, synthetic=True)
    tree = PrefixTree.build(workload.prompts)
    tops = np.flatnonzero(tree.parent == 0)
    kinds = [
        set(workload.source[tree.requests[tree.first[k] : tree.end[k]]].tolist()) for k in tops
    ]
    assert sorted(kinds, key=str) == [{0}, {1}, {2}]


def test_synthetic_traces_say_what_they_are():
    for name in traces.TRACES:
        lengths = traces.trace_lengths(name, 4_000, seed=1, synthetic=True)
        assert lengths.synthetic
        assert "log-normal" in lengths.source
        assert lengths.prompt.min() >= 1
        assert lengths.output.min() >= 1
    videos = traces.trace_lengths("openvid", 20_000, seed=1)
    assert videos.output.mean() == pytest.approx(16_384, rel=0.03)
    assert not np.any(videos.output % 256)
    chats = traces.trace_lengths("wildchat", 20_000, seed=1)
    assert chats.output.mean() == pytest.approx(256, rel=0.05)


def test_real_traces_are_used_where_they_are():
    if not traces.data_folder().is_dir():
        pytest.skip("the data folder is absent; set BLENDSERVE_DATA to it")
    lengths = traces.trace_lengths("azure-conv", 19_366, seed=1)
    assert not lengths.synthetic
    assert lengths.prompt.mean() == pytest.approx(1_154.7, abs=0.1)
    assert lengths.output.mean() == pytest.approx(211.1, abs=0.1)


def test_the_synthetic_exam_shares_as_mmlu_does():
    questions = exam(synthetic=True)
    total = (questions.prefix_lengths[questions.subject] + questions.question_lengths).sum()
    unique = questions.prefix_lengths.sum() + questions.question_lengths.sum()
    assert 1 - unique / total == pytest.approx(0.86, abs=0.015)


def test_unknown_names_are_refused_with_the_nearest():
    with pytest.raises(UnknownWorkloadError, match="did you mean 'trace"):
        build("trace", 100)
    with pytest.raises(UnknownWorkloadError, match="traces of burstgpt"):
        build("nothing:1:0.2", 100)
    with pytest.raises(UnknownWorkloadError, match=r"1\.2\.3"):
        build("sharegpt:1.2.3:0.2", 100)
    with pytest.raises(ValueError, match="unknown trace"):
        traces.trace_lengths("nothing", 10, seed=0)


def test_targets_out_of_reach_are_refused():
    with pytest.raises(ValueError, match="raise the sharing"):
        build("burstgpt:1.2:0.001", 5_000, synthetic=True)
    with pytest.raises(ValueError, match="at least one request"):
        build("trace1", 0)
