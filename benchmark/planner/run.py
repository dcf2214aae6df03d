"""Seconds and peak memory of a plan, each in a process of its own.

    python benchmark/planner/run.py

Jobs are synthetic: random token ids that share prefixes as MMLU's 5-shot prompts do (57 subjects),
outputs drawn per subject between 2 tokens and about a thousand. Timed is what a job goes through:
the tree and a first plan, then, with the lengths of each part of the sample, a plan of the rest.
Peak memory is that of the whole process, Python included, with the tokens in it
(resource.getrusage).
"""

from __future__ import annotations

import argparse
import json
import math
import os
import platform
import resource
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from synthetic import exam_job, exam_outputs

from blendserve.planner import HARDWARE, MODEL_SPECS, CostModel, Job, make_plan

RESULTS = Path(__file__).parents[1] / "results" / "planner.json"


@dataclass(frozen=True)
class Case:
    """bar_seconds: what the plan may take; bar_memory: times the size of the token array."""

    requests: int
    tokens_each: int
    bar_seconds: float | None = None
    bar_memory: float | None = None


CASES = (
    Case(40_000, 510, bar_seconds=5),
    Case(50_000, 510),
    Case(400_000, 510, bar_seconds=60, bar_memory=2),
    Case(1_000_000, 100, bar_seconds=60),
)


def plan_once(requests: int, tokens_each: int) -> dict[str, float]:
    """Runs in a process of its own."""
    tokens, offsets = exam_job(requests, tokens_each)
    truth = exam_outputs(requests)
    job = Job.from_flat(tokens, offsets, np.full(requests, 4_096))
    cost_model = CostModel(MODEL_SPECS["llama-3.1-8b"], HARDWARE["a100-80g-sxm"])
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    start = time.perf_counter()
    tree = job.build_tree()
    built = time.perf_counter()
    plan = make_plan(job, cost_model, tree=tree)
    planned = time.perf_counter()
    observed: dict[int, int] = {}
    replans = 0
    while len(plan.sample):
        observed |= {int(r): int(truth[r]) for r in plan.sample}
        plan = make_plan(
            job, cost_model, observed=observed, exclude=observed, tree=tree, sampled=observed
        )
        replans += 1
    end = time.perf_counter()
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    return {
        "prompt_tokens": len(tokens),
        "token_bytes": tokens.nbytes,
        "tree_seconds": built - start,
        "first_plan_seconds": planned - built,
        "replan_seconds": end - planned,
        "replans": replans,
        "seconds": end - start,
        "peak_bytes_before": before,
        "peak_bytes": peak,
        "sharing_best": plan.sharing_best,
        "sharing_planned": plan.sharing_planned,
        "moved_requests": plan.moved_requests,
    }


def measure(case: Case, repeats: int) -> dict[str, Any]:
    samples = []
    for _ in range(repeats):
        out = subprocess.run(
            [sys.executable, __file__, "--one", str(case.requests), str(case.tokens_each)],
            check=True,
            capture_output=True,
            text=True,
        )
        samples.append(json.loads(out.stdout))
    seconds = float(np.median([s["seconds"] for s in samples]))
    memory = max(s["peak_bytes"] / s["token_bytes"] for s in samples)
    return {
        "requests": case.requests,
        "prompt_tokens": samples[0]["prompt_tokens"],
        "seconds_median": round(seconds, 3),
        "peak_over_token_array": round(memory, 3),
        "bar_seconds": case.bar_seconds,
        "bar_memory": case.bar_memory,
        "met": (case.bar_seconds is None or seconds <= case.bar_seconds)
        and (case.bar_memory is None or memory <= case.bar_memory),
        "samples": samples,
    }


def growth(results: list[dict[str, Any]]) -> dict[str, float]:
    """Seconds at 400,000 over those at 50,000, and what n log n allows."""
    seconds = {found["requests"]: found["seconds_median"] for found in results}
    small, large = 50_000, 400_000
    return {
        "ratio": round(seconds[large] / seconds[small], 3),
        "n_log_n": round(large * math.log(large) / (small * math.log(small)), 3),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--json", type=Path, default=RESULTS)
    parser.add_argument("--one", type=int, nargs=2, metavar=("REQUESTS", "TOKENS"))
    options = parser.parse_args()
    if options.one:
        print(json.dumps(plan_once(*options.one)))
        return
    results = []
    print(
        f"{'requests':>9} {'tokens':>12} {'seconds':>8} {'bar':>4} {'peak / tokens':>13} {'bar':>4}"
    )
    for case in CASES:
        results.append(found := measure(case, options.repeats))
        print(
            f"{case.requests:9,} {found['prompt_tokens']:12,} {found['seconds_median']:8.2f} "
            f"{case.bar_seconds or '-':>4} {found['peak_over_token_array']:13.2f} "
            f"{case.bar_memory or '-':>4}",
            flush=True,
        )
    grown = growth(results)
    print(f"50,000 to 400,000: {grown['ratio']}x the time; n log n gives {grown['n_log_n']}x")
    document = {
        "command": f"python benchmark/planner/run.py --repeats {options.repeats}",
        "device": f"{platform.machine()}, {os.cpu_count()} cores",
        "versions": {"python": platform.python_version(), "numpy": np.__version__},
        "synthetic": "token ids and output lengths; prefixes shared as in MMLU 5-shot prompts",
        "growth_50k_to_400k": grown,
        "cases": results,
    }
    options.json.parent.mkdir(parents=True, exist_ok=True)
    options.json.write_text(json.dumps(document, indent=1) + "\n")


if __name__ == "__main__":
    main()
