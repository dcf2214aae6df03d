"""Kinds of jobs that are hard on an order, ours beside all others in three worlds.

    python benchmark/simulator/job_kinds.py [--workers 2] [--kind NAME ...]

Synthetic jobs, Llama-3.1-8B on an A100, measured steps, lengths from a sample of 1 %. Writes
benchmark/results/simulator/job_kinds.json. A row is one job under one overlap model: seconds of
each policy, and how many times as fast ours is as the best of the others.
"""

from __future__ import annotations

import argparse
import multiprocessing
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

sys.path.insert(0, str(Path(__file__).parents[1]))
import record
from run import RESULTS

from blendserve.planner import CostModel, FlatTokens, hardware, model_spec
from blendserve.simulator.simulate import Policy, Setting, Simulation
from blendserve.simulator.step_time import Overlap
from blendserve.simulator.workloads import Workload

MODEL, CHIP = "llama-3.1-8b", "a100-80g-sxm"
RIVALS = (Policy.FCFS, Policy.DFS, Policy.DFS_BEST, Policy.DFS_PACED, Policy.BLEND_PAPER)
VOCABULARY = 100_000

Ints = NDArray[np.int64]
Rng = np.random.Generator
Requests = list[tuple[Ints, int]]


def fresh(rng: Rng, tokens: int) -> Ints:
    return rng.integers(0, VOCABULARY, tokens)


def around(rng: Rng, mean: float, sigma: float, count: int, most: int = 8_000) -> list[int]:
    """Log-normal lengths."""
    drawn = rng.lognormal(np.log(mean) - sigma**2 / 2, sigma, count)
    return [int(x) for x in np.clip(drawn, 1, most)]


def alike(count: int, prompt: int, output: int) -> Callable[[Rng], Requests]:
    """Unique prompts of one length, answers of one length."""
    return lambda rng: [(fresh(rng, prompt), output) for _ in range(count)]


def identical(rng: Rng) -> Requests:
    prompt = fresh(rng, 300)
    return [(prompt, length) for length in around(rng, 200, 0.5, 3_000)]


def unique(rng: Rng) -> Requests:
    outputs = around(rng, 150, 0.8, 3_000)
    return [(fresh(rng, n), d) for n, d in zip(around(rng, 500, 0.8, 3_000), outputs, strict=True)]


def agents(rng: Rng) -> Requests:
    """Traces of ten turns, each of which extends the one before."""
    found: Requests = []
    system = fresh(rng, 600)
    for _ in range(200):
        trace = system
        for _ in range(10):
            trace = np.concatenate([trace, fresh(rng, int(rng.integers(50, 400)))])
            found.append((trace, int(rng.integers(20, 300))))
    return found


def huge_among_tiny(rng: Rng) -> Requests:
    return [(fresh(rng, 60_000), 200), *((fresh(rng, 30), 60) for _ in range(3_000))]


def very_unequal(rng: Rng) -> Requests:
    return [(fresh(rng, 200), length) for length in around(rng, 500, 1.5, 300)]


def barely_fits(rng: Rng) -> Requests:
    return [(fresh(rng, 20_000), 100), *((fresh(rng, 500), 300) for _ in range(400))]


def bimodal(rng: Rng) -> Requests:
    """Two lengths behind one prompt."""
    system = fresh(rng, 500)
    return [
        (np.concatenate([system, fresh(rng, 100)]), 20 if rng.random() < 0.7 else 1_500)
        for _ in range(2_000)
    ]


def reasoning(rng: Rng) -> Requests:
    return [(fresh(rng, 150), length) for length in around(rng, 2_500, 0.7, 1_500)]


def two_kinds(rng: Rng) -> Requests:
    """Long prompts with short answers, and short ones with long answers of one length."""
    return [*alike(4_000, 800, 20)(rng), *alike(1_500, 100, 1_500)(rng)]


# Name: requests, KV tokens of the device if not its own.
KINDS: dict[str, tuple[Callable[[Rng], Requests], int | None]] = {
    "scoring": (alike(4_000, 900, 1), None),
    "identical prompts": (identical, None),
    "all unique": (unique, None),
    "nested agent traces": (agents, None),
    "equal long decodes": (alike(2_500, 100, 1_000), None),
    "equal long decodes, scarce memory": (alike(1_200, 100, 1_000), 60_000),
    "one huge prompt among tiny ones": (huge_among_tiny, None),
    "a handful": (alike(8, 300, 400), None),
    "some hundred, very unequal": (very_unequal, None),
    "pool barely above the longest": (barely_fits, 21_000),
    "two lengths behind one prompt": (bimodal, None),
    "prompts of 32k": (alike(60, 32_000, 200), None),
    "reasoning": (reasoning, None),
    "two kinds": (two_kinds, None),
    "two kinds, scarce memory": (two_kinds, 60_000),
}


def run(kind: str) -> list[dict[str, Any]]:
    """All policies on one job; a row per overlap model."""
    make, capacity = KINDS[kind]
    rng = np.random.default_rng(0)
    requests = make(rng)
    requests = [requests[k] for k in rng.permutation(len(requests))]
    output = np.array([length for _, length in requests])
    simulation = Simulation(
        Workload(
            name=kind,
            prompts=FlatTokens.of([prompt for prompt, _ in requests]),
            output_tokens=output,
            max_output_tokens=np.full(len(output), 8_192),
            source=np.zeros(len(output), dtype=np.int64),
            sources=(kind,),
        )
    )
    costs = CostModel.attained(model_spec(MODEL), hardware(CHIP))
    ours, *others = (
        simulation.run(Setting(costs, policy, tuple(Overlap), capacity=capacity))
        for policy in (Policy.BLEND, *RIVALS)
    )
    rows = []
    for at, overlap in enumerate(Overlap):
        seconds = {found[at].policy: round(found[at].seconds, 2) for found in others}
        best = min(seconds, key=lambda policy: seconds[policy])
        rows.append(
            {
                "kind": kind,
                "overlap": overlap.value,
                "requests": len(output),
                "ours_seconds": round(ours[at].seconds, 2),
                "seconds": seconds,
                "best_other": best,
                "ours_over_best": round(seconds[best] / ours[at].seconds, 4),
                "ours_over_dfs": round(seconds[Policy.DFS.value] / ours[at].seconds, 4),
                "retractions": ours[at].retractions,
                "share_of_bound": round(ours[at].share_of_bound, 4),
            }
        )
    return rows


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--kind", action="append", choices=sorted(KINDS))
    options = parser.parse_args(argv)
    rows: list[dict[str, Any]] = []
    with multiprocessing.Pool(options.workers) as pool:
        for found in pool.imap(run, options.kind or KINDS):
            rows += found
            for row in found:
                print(row["kind"], row["overlap"], row["best_other"], row["ours_over_best"])
    if not options.kind:
        record.save(RESULTS / "job_kinds.json", {"rows": rows})


if __name__ == "__main__":
    main()
