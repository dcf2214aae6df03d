"""What it changes, simulated, that decode attention reads shared prefixes once a step for all.

    python benchmark/simulator/shared_decode.py    # about 3 minutes on 2 cores

Jobs of synthetic prompts for Llama-3.1-8B on an A100: long prompts with short answers (compute),
decodes of hundreds of tokens in groups behind a long prefix, and long decodes without one. Each job
runs with every decode reading its whole context, and with shared reads; there, the plan counts what
is really read (`reads`), or each request's whole context (`contexts`). Steps are paced by what is
really read in both. Five seeds; `summary` has the geometric means of the ratios of seconds.
"""

from __future__ import annotations

import json
import platform
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from blendserve.planner import FlatTokens
from blendserve.simulator.blend import BlendOptions
from blendserve.simulator.simulate import Policy, Setting, Simulation
from blendserve.simulator.workloads import REFERENCE, Workload

RESULT = Path(__file__).parents[1] / "results" / "simulator" / "shared-decode.json"
VOCABULARY = 40_000
SEEDS = 5
# compute requests, groups, requests of each, tokens of a group's prefix, mean answer of a group's
# request, decodes without a prefix
JOBS = {
    "few long prefixes, compute-bound": (4_000, 4, 400, 4_000, 800, 500),
    "few long prefixes": (1_500, 4, 400, 4_000, 800, 500),
    "few long prefixes, memory-bound": (500, 4, 400, 4_000, 800, 500),
    "many prefixes": (1_500, 40, 60, 1_500, 800, 300),
    "many prefixes, short answers": (1_500, 40, 60, 1_500, 200, 500),
    "one prefix for all decodes": (1_500, 1, 2_000, 2_000, 600, 0),
}


def workload(name: str, seed: int = 0) -> Workload:
    compute, groups, each, prefix_tokens, answer, alone = JOBS[name]
    rng = np.random.default_rng(seed)

    def text(low: int, high: int) -> Any:
        return rng.integers(0, VOCABULARY, int(rng.integers(low, high)), dtype=np.int32)

    requests = [(text(800, 2_200), int(rng.integers(8, 60)), 0) for _ in range(compute)]
    for _ in range(groups):
        prefix = text(prefix_tokens, prefix_tokens + 1)
        for _ in range(each):
            length = int(rng.integers(answer // 2, answer * 3 // 2))
            requests.append((np.concatenate([prefix, text(50, 300)]), length, 1))
    requests += [(text(50, 300), int(rng.integers(1_000, 3_000)), 2) for _ in range(alone)]
    order = rng.permutation(len(requests))
    prompts, outputs, sources = zip(*(requests[i] for i in order), strict=True)
    return Workload(
        name=name,
        prompts=FlatTokens.of(prompts),
        output_tokens=np.array(outputs),
        max_output_tokens=np.full(len(order), 4_096),
        source=np.array(sources),
        sources=("compute", "groups", "alone"),
    )


def rows(name: str, seed: int) -> list[dict[str, Any]]:
    simulation = Simulation(workload(name, seed))
    found = []
    for sampling in (1.0, 0.01):
        apart = Setting(REFERENCE, sampling=sampling, seed=seed)
        shared = replace(apart, shared_decode=True)
        settings = {
            "apart": apart,
            "shared, reads": shared,
            "shared, contexts": replace(shared, options=BlendOptions(shared_memory=False)),
            "shared, dfs": replace(shared, policy=Policy.DFS),
        }
        for what, setting in settings.items():
            result = simulation.run(setting)[0]
            found.append(
                {
                    "job": name,
                    "seed": seed,
                    "lengths": "known" if sampling == 1.0 else "1 % sampled",
                    "decode": what,
                    "seconds": round(result.seconds, 1),
                    "memory_seconds": round(result.memory_seconds, 1),
                    "share_of_bound": round(result.share_of_bound, 4),
                    "retractions": result.retractions,
                }
            )
            print(*found[-1].values(), sep="  ", flush=True)
    return found


def summary(found: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Per knowledge of lengths, seconds over those of another way to run the same jobs."""
    lines = []
    for lengths in ("known", "1 % sampled"):
        seconds = {
            (row["job"], row["seed"], row["decode"]): row["seconds"]
            for row in found
            if row["lengths"] == lengths
        }
        jobs = sorted({key[:2] for key in seconds})
        for one, other in (
            ("apart", "shared, reads"),
            ("shared, contexts", "shared, reads"),
            ("shared, dfs", "shared, reads"),
        ):
            ratios = np.array([seconds[*job, one] / seconds[*job, other] for job in jobs])
            lines.append(
                {
                    "lengths": lengths,
                    "ratio": f"{one} : {other}",
                    "geometric_mean": round(float(np.exp(np.log(ratios).mean())), 3),
                    "lowest": round(float(ratios.min()), 3),
                    "highest": round(float(ratios.max()), 3),
                    "above_one": f"{int((ratios > 1).sum())} of {len(ratios)}",
                }
            )
    return lines


def main() -> None:
    found = [row for seed in range(SEEDS) for name in JOBS for row in rows(name, seed)]
    for line in summary(found):
        print(*line.values(), sep="  ")
    report = {
        "command": "python benchmark/simulator/shared_decode.py",
        "device": f"{platform.machine()}, Python {platform.python_version()}",
        "synthetic": "prompts, lengths and the engine",
        "model": "llama-3.1-8b on a100-80g-sxm",
        "summary": summary(found),
        "rows": found,
    }
    RESULT.write_text(json.dumps(report, indent=1) + "\n")


if __name__ == "__main__":
    main()
