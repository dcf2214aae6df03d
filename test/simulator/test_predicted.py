"""What `plan` predicts, held against the simulator."""

from __future__ import annotations

import pytest

from blendserve.planner import CostModel, hardware, kv_capacity_tokens, make_plan, model_spec
from blendserve.planner.prediction import predict
from blendserve.simulator.simulate import Policy, Setting, Simulation
from blendserve.simulator.step_time import Overlap
from blendserve.simulator.workloads import WORKLOADS, build


@pytest.mark.parametrize(
    ("name", "chip"), [(name, "a100") for name in WORKLOADS] + [("trace2", "h100")]
)
def test_a_predicted_run_takes_what_the_simulator_says(name: str, chip: str) -> None:
    cost_model = CostModel.attained(model_spec("llama-3.1-8b"), hardware(chip))
    workload = build(name, 4_000)
    simulation = Simulation(workload)
    plan = make_plan(workload.job(lengths_known=True), cost_model, tree=simulation.tree)
    found = predict(plan, cost_model, kv_capacity_tokens(cost_model))
    for policy, seconds in (
        (Policy.FCFS, found.fcfs_seconds),
        (Policy.DFS, found.dfs_seconds),
        (Policy.BLEND, found.blend_seconds),
    ):
        setting = Setting(cost_model, policy, (Overlap.SEQUENTIAL,), sampling=1.0)
        assert seconds == pytest.approx(simulation.run(setting)[0].seconds, rel=0.1), policy
