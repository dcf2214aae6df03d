"""What might bring NanoFlow-DFS to the paper's 71.7 % of the optimum and its gap of 1.2084: tried.

    python benchmark/simulator/ruled_out.py

Writes benchmark/results/simulator/ruled-out.json: one change each, means over the four traces.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace

import numpy as np
from run import RESULTS, TRACES, commit, cost_model, sources

from blendserve.planner import kv_capacity_tokens
from blendserve.simulator.simulate import Policy, Setting, Simulation
from blendserve.simulator.step_time import Overlap
from blendserve.simulator.workloads import build

REQUESTS = 10_000
POLICIES = (Policy.DFS, Policy.BLEND_PAPER)


def changes() -> dict[str, Callable[[Setting], Setting]]:
    model = cost_model(None)
    costs, pool = model.step_costs, kv_capacity_tokens(model)
    slow = replace(costs, step=costs.step + 2e-3)
    return {
        "nothing": lambda setting: setting,
        "steps of at most 512 tokens": lambda setting: replace(setting, chunk_tokens=512),
        "half of the memory": lambda setting: replace(setting, capacity=pool // 2),
        "a quarter of the memory": lambda setting: replace(setting, capacity=pool // 4),
        "2 ms more a step": lambda setting: replace(setting, costs=slow),
        "DFS without mixed steps": lambda setting: replace(
            setting, mixed=setting.policy is not Policy.DFS
        ),
        "all lengths known": lambda setting: replace(setting, sampling=1.0),
    }


def main() -> None:
    simulations = [Simulation(build(name, REQUESTS)) for name in TRACES]
    rows = []
    for name, change in changes().items():
        settings = [
            change(Setting(cost_model(None), policy, (Overlap.INTERFERENCE,)))
            for policy in POLICIES
        ]
        found = [[one.run(setting)[0] for setting in settings] for one in simulations]
        gaps = [dfs.seconds / blend.seconds for dfs, blend in found]
        shares = np.array([[result.share_of_bound for result in pair] for pair in found])
        rows.append(
            {
                "change": name,
                "dfs": round(float(shares[:, 0].mean()), 4),
                "blend_paper": round(float(shares[:, 1].mean()), 4),
                "gap": round(float(np.mean(gaps)), 4),
                "gaps": [round(gap, 3) for gap in gaps],
            }
        )
        print(rows[-1], flush=True)
    head = {
        "command": "python benchmark/simulator/ruled_out.py",
        "requests": REQUESTS,
        "commit": commit(),
        "sources": sources(),
        "rows": rows,
    }
    (RESULTS / "ruled-out.json").write_text(json.dumps(head, indent=1) + "\n")


if __name__ == "__main__":
    main()
