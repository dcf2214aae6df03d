"""A job of like requests is not paced in small steps for ever."""

from __future__ import annotations

import numpy as np

from blendserve.planner import HARDWARE, MODEL_SPECS, CostModel, FlatTokens, StepPace
from blendserve.policy.pacing import FILLING_PART, context_to_pace
from blendserve.simulator.simulate import Policy, Setting, Simulation
from blendserve.simulator.workloads import Workload

COSTS = CostModel.attained(MODEL_SPECS["llama-3.1-8b"], HARDWARE["a100-80g-sxm"])


def test_while_requests_wait_steps_are_paced_as_if_memory_were_filled() -> None:
    assert context_to_pace(10, 1_000, waits=False) == 10
    assert context_to_pace(10, 1_000, waits=True) == FILLING_PART * 1_000
    assert context_to_pace(900, 1_000, waits=True) == 900
    # The same density gives larger steps, and so more decodes to pace the next ones by.
    pace = StepPace.of(COSTS.step_costs, 2_048)
    few, filled = (
        pace.prefill_tokens(3.0, context_to_pace(5_000, 430_000, waits), 10)
        for waits in (False, True)
    )
    assert filled > 2 * few


def test_unique_requests_take_about_as_many_steps_as_unpaced() -> None:
    rng = np.random.default_rng(0)
    count, prompt, output = 1_000, 500, 150
    lengths = np.full(count, output)
    simulation = Simulation(
        Workload(
            name="unique",
            prompts=FlatTokens.of([rng.integers(0, 100_000, prompt) for _ in range(count)]),
            output_tokens=lengths,
            max_output_tokens=np.full(count, 4_096),
            source=np.zeros(count, dtype=np.int64),
            sources=("all",),
        )
    )
    ours = simulation.run(Setting(COSTS, Policy.BLEND, sampling=1.0))[0]
    fcfs = simulation.run(Setting(COSTS, Policy.FCFS, sampling=1.0))[0]
    assert ours.steps < 3 * fcfs.steps
    assert ours.seconds < 1.1 * fcfs.seconds
