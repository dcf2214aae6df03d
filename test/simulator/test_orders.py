"""Depth-first orders with sorted children, and paced prefill on one queue."""

from __future__ import annotations

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st
from simulator_jobs import mixed_workload, workload, workloads

from blendserve.planner import MODEL_SPECS, CostModel, hardware
from blendserve.simulator.orders import sorted_depth_first
from blendserve.simulator.simulate import Policy, Setting, Simulation
from blendserve.simulator.step_time import Overlap
from blendserve.simulator.workloads import Workload

A100 = CostModel.attained(MODEL_SPECS["llama-3.1-8b"], hardware("a100"))


@settings(max_examples=30)
@given(workloads(), st.integers(0, 2**32 - 1))
def test_children_are_sorted_and_no_subtree_is_torn(job: Workload, seed: int) -> None:
    tree = Simulation(job).tree
    above = np.random.default_rng(seed).random(tree.num_leaves)
    below = np.ones(tree.num_leaves)
    order = sorted_depth_first(tree, above, below)
    assert sorted(order.tolist()) == list(range(len(job)))
    leaf = np.empty(tree.num_leaves, dtype=np.int64)
    leaf[tree.requests] = np.arange(tree.num_leaves)
    place = np.empty(tree.num_leaves, dtype=np.int64)
    place[leaf[order]] = np.arange(tree.num_leaves)
    means = {}
    for node in range(tree.num_nodes):
        leaves = np.arange(tree.first[node], tree.end[node])
        assert place[leaves].max() - place[leaves].min() == len(leaves) - 1
        means[node] = above[leaves].mean()
    for node in range(1, tree.num_nodes):
        for other in range(1, node):
            if tree.parent[node] == tree.parent[other] and means[node] > means[other] + 1e-9:
                assert place[tree.first[node]] < place[tree.first[other] : tree.end[other]].min()


def run(job: Workload, policy: Policy, sampling: float = 0.05) -> tuple[float, int, float]:
    setting = Setting(A100, policy, (Overlap.INTERFERENCE,), sampling=sampling)
    (result,) = Simulation(job).run(setting)
    return result.seconds, result.steps, result.sharing


def test_the_best_child_order_is_no_slower_than_any_and_shares_as_much() -> None:
    job = mixed_workload(600)
    plain, best, paced = (
        run(job, policy) for policy in (Policy.DFS, Policy.DFS_BEST, Policy.DFS_PACED)
    )
    assert best[0] <= plain[0]
    assert best[2] >= 0.99 * plain[2]
    assert paced[2] >= 0.97 * plain[2]


def test_nested_prefixes_stay_together_in_groups_by_decoding_per_prefill() -> None:
    """Sixteen questions on each of four documents of two libraries: whoever groups by the last
    prefix only computes a library again and again."""
    rng = np.random.default_rng(0)
    libraries = [rng.integers(0, 5_000, 3_000) for _ in range(2)]
    documents = [(library, rng.integers(0, 5_000, 300)) for library in libraries for _ in range(4)]
    prompts, output = [], []
    for number in range(128):
        library, document = documents[number % 8]
        question = rng.integers(0, 5_000, 20)
        prompts.append(np.concatenate([library, document, question]).astype(np.int32))
        output.append(1 + (number % 8) * 10)
    job = workload(prompts, output)
    setting = Setting(A100, Policy.BATCHLLM, sampling=1.0, capacity=6_000)
    (result,) = Simulation(job).run(setting)
    assert result.sharing > 0.99 * result.sharing_best


def test_a_scoring_job_takes_no_more_steps_than_depth_first() -> None:
    rng = np.random.default_rng(0)
    prompts = [rng.integers(0, 40_000, 900).astype(np.int32) for _ in range(4_000)]
    job = workload(prompts, [1] * len(prompts))
    steps = {policy: run(job, policy, 0.01)[1] for policy in (Policy.DFS, Policy.BLEND)}
    assert steps[Policy.BLEND] <= 1.05 * steps[Policy.DFS]
