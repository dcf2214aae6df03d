"""No policy beats a bound, whatever the model, the device, the job and the costs of a step."""

from __future__ import annotations

import functools

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from public_configs import DEEPSEEK_V3, GEMMA_3_27B, GPT_OSS_20B, LLAMA_4_SCOUT, QWEN3_NEXT_80B
from simulator_jobs import workload, workloads

from blendserve.planner import MODEL_SPECS, CostModel, ModelSpec, hardware
from blendserve.simulator.simulate import Policy, Setting, Simulation
from blendserve.simulator.step_time import Overlap
from blendserve.simulator.workloads import Workload

MODELS = {
    "llama-8b": MODEL_SPECS["llama-3.1-8b"],
    "gpt-oss": ModelSpec.from_config(GPT_OSS_20B),
    "gemma-3": ModelSpec.from_config(GEMMA_3_27B),
    "qwen3-next": ModelSpec.from_config(QWEN3_NEXT_80B),
    "llama-4": ModelSpec.from_config(LLAMA_4_SCOUT),
    "deepseek-v3": ModelSpec.from_config(DEEPSEEK_V3),
}
CHIPS = ("a100", "h200", "b200", "l40s", "mi300x", "4090")


@functools.cache
def costs(model: str, chip: str, ranks: int) -> CostModel:
    return CostModel.attained(MODELS[model], hardware(chip), ranks)


@settings(max_examples=40)
@given(
    workloads(),
    st.sampled_from(list(MODELS)),
    st.sampled_from(CHIPS),
    st.sampled_from([1, 2, 8]),
    st.sampled_from(list(Policy)),
    st.sampled_from([4_000, 30_000]),
    st.booleans(),
    st.sampled_from([(), ("traffic",), ("step", "sampled")]),
)
def test_no_policy_beats_the_bound(
    job: Workload,
    model: str,
    chip: str,
    ranks: int,
    policy: Policy,
    capacity: int,
    shared: bool,
    off: tuple[str, ...],
) -> None:
    cost_model = costs(model, chip, ranks)
    setting = Setting(
        cost_model,
        policy,
        tuple(Overlap),
        sampling=0.25,
        capacity=capacity,
        shared_decode=shared,
        costs=cost_model.step_costs.without(off),
    )
    for result in Simulation(job).run(setting):
        assert result.share_of_bound <= 1 + 1e-9


@pytest.mark.parametrize("model", ["llama-8b", "deepseek-v3"])
def test_a_lone_request_is_near_its_bound(model: str) -> None:
    """A bound that counts 671 billion parameters for a lone token is no bound: it would be far
    above what this takes."""
    import numpy as np

    job = workload([np.arange(50)], [400])
    setting = Setting(costs(model, "h200", 8), Policy.DFS, tuple(Overlap), sampling=1.0)
    for result in Simulation(job).run(setting):
        assert 0.8 < result.share_of_bound <= 1
