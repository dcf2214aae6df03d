"""How even the sub-plans of data-parallel replicas are, and what sharing they lose.

    python benchmark/planner/partition_balance.py

Synthetic: the mix of the planner's tests (exams, chats and videos; test/planner), on Llama-3.1-8B
and an A100. Per row the worst of some seeds, and the median seconds to carve.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import sys
import time
from pathlib import Path

import numpy as np

from blendserve.planner import make_plan, partition

ROOT = Path(__file__).parents[2]
RESULTS = ROOT / "benchmark" / "results" / "partition.json"
sys.path.insert(0, str(ROOT / "test" / "planner"))
from planner_workloads import LLAMA_ON_A100, mixed_job  # noqa: E402

REPLICAS = (2, 4, 8)


def measure(requests: int, seeds: int) -> list[dict[str, float]]:
    rows: dict[int, list[tuple[float, ...]]] = {k: [] for k in REPLICAS}
    for seed in range(seeds):
        plan = make_plan(mixed_job(requests, seed), LLAMA_ON_A100)
        longest = np.maximum(plan.compute_seconds, plan.memory_seconds).max()
        for k in REPLICAS:
            start = time.perf_counter()
            parts = partition(plan, k, LLAMA_ON_A100)
            spent = time.perf_counter() - start
            share = float(longest / parts.seconds.mean())
            rows[k].append(
                (parts.imbalance, parts.density_spread, parts.lost_sharing, share, spent)
            )
    found = []
    for k, samples in rows.items():
        table = np.array(samples)
        names = ("imbalance", "density_spread", "lost_sharing")
        worst = dict(zip(names, table[:, :3].max(axis=0), strict=True))
        found.append(
            {
                "requests": requests,
                "replicas": k,
                **{name: round(float(value), 5) for name, value in worst.items()},
                "largest_request_over_share": round(float(table[:, 3].max()), 3),
                "seconds_median": round(float(np.median(table[:, 4])), 3),
                "imbalance_by_seed": table[:, 0].round(5).tolist(),
            }
        )
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--json", type=Path, default=RESULTS)
    options = parser.parse_args()
    results = []
    print("requests  k  times apart  densities apart  sharing lost  largest / share  seconds")
    for requests, seeds in ((600, 8), (1_000, 8), (6_000, 8), (40_000, 3), (100_000, 1)):
        for row in measure(requests, seeds):
            results.append({**row, "seeds": seeds})
            print(
                f"{requests:8,} {row['replicas']:2} {row['imbalance']:12.2%} "
                f"{row['density_spread']:16.2%} {row['lost_sharing']:13.3%} "
                f"{row['largest_request_over_share']:16.2f} {row['seconds_median']:8.2f}",
                flush=True,
            )
    document = {
        "command": "python benchmark/planner/partition_balance.py",
        "device": f"{platform.machine()}, {os.cpu_count()} cores",
        "versions": {"python": platform.python_version(), "numpy": np.__version__},
        "synthetic": "all: prompts, output lengths and their mix",
        "apart": "(highest - lowest) / mean over the replicas; the worst of the seeds",
        "rows": results,
    }
    options.json.parent.mkdir(parents=True, exist_ok=True)
    options.json.write_text(json.dumps(document, indent=1) + "\n")


if __name__ == "__main__":
    main()
