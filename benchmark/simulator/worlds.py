"""The same jobs in several worlds: chips, overlaps, seeds, and the terms of a step one by one.

    python benchmark/simulator/worlds.py [--workers 2]

Writes benchmark/results/simulator/worlds.json as workloads end; what it holds of the same sources
is not run again.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import time
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

from run import RESULTS, commit, load, sources

from blendserve.planner import CostModel, StepCosts, hardware, model_spec
from blendserve.simulator.simulate import Policy, Setting, Simulation
from blendserve.simulator.step_time import Overlap
from blendserve.simulator.workloads import build

MODEL = "llama-3.1-8b"
REQUESTS, SEEDS = 40_000, range(5)
RIVALS = (Policy.BLEND_PAPER, Policy.DFS_PACED, Policy.DFS_BEST)
PATH = RESULTS / "worlds.json"
NOTHING = "nothing"
TERMS = (
    *("all of these", "GEMMs", "decode attention", "fixed time", "one memory"),
    "prefill attention",
)


def jobs() -> Iterator[dict[str, Any]]:
    """One run each, some more than once. terms: what is taken from the datasheet, or left
    out."""
    for workload in ("trace2", "trace1"):
        for seed in SEEDS:
            for policy in (Policy.DFS, Policy.BLEND):
                yield job("a100", workload, seed, policy)
        for policy in RIVALS:
            yield job("a100", workload, 0, policy)
        for chip in ("h100", "h200", "b200", "l40s"):
            for policy in (Policy.DFS, Policy.BLEND, *RIVALS):
                yield job(chip, workload, 0, policy)
        for terms in TERMS if workload == "trace2" else ():
            for policy in (Policy.DFS, Policy.BLEND):
                yield job("a100", workload, 0, policy, terms)
        for seed in SEEDS:
            for policy in RIVALS:
                yield job("a100", workload, seed, policy)


def job(
    chip: str, workload: str, seed: int, policy: Policy, terms: str = NOTHING
) -> dict[str, Any]:
    return {
        "chip": chip,
        "workload": workload,
        "seed": seed,
        "terms": terms,
        "policy": policy.value,
    }


def costs_without(costs: StepCosts, datasheet: StepCosts, terms: str) -> StepCosts:
    """One term as the datasheet has it."""
    ours, theirs = costs.attention[0], datasheet.attention[0]
    return {
        NOTHING: costs,
        "one memory": costs.without(["traffic"]),
        "fixed time": costs.without(["step"]),
        "GEMMs": replace(costs, tokens=datasheet.tokens, sampled=datasheet.sampled, tile=0),
        "decode attention": replace(costs, attention=(replace(ours, decode=theirs.decode),)),
        "prefill attention": replace(costs, attention=(replace(ours, prefill=theirs.prefill),)),
        "all of these": datasheet.without(["traffic"]),
    }[terms]


def run(job: dict[str, Any], simulation: Simulation) -> list[dict[str, Any]]:
    spec, chip = model_spec(MODEL), hardware(job["chip"])
    cost_model = CostModel.attained(spec, chip)
    costs = costs_without(cost_model.step_costs, CostModel(spec, chip).step_costs, job["terms"])
    policy = Policy(job["policy"])
    setting = Setting(cost_model, policy, tuple(Overlap), costs=costs, seed=job["seed"])
    began = time.process_time()
    results = simulation.run(setting)
    used = round(time.process_time() - began, 1)
    return [
        job
        | {
            "overlap": result.overlap,
            "seconds": round(result.seconds, 2),
            "share_of_bound": round(result.share_of_bound, 5),
            "steps": result.steps,
            "retractions": result.retractions,
            "sharing_kept": round(result.sharing / result.sharing_best, 5),
            "cpu_seconds": used,
            "commit": commit(),
            "sources": sources(),
        }
        for result in results
    ]


def run_all(workload: str, seed: int, todo: list[dict[str, Any]]) -> list[dict[str, Any]]:
    simulation = Simulation(build(workload, REQUESTS, seed))
    return [row for one in todo for row in run(one, simulation)]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--workers", type=int, default=2)
    workers = parser.parse_args().workers
    rows = load("worlds")
    todo: dict[tuple[str, int], list[dict[str, Any]]] = {}
    for one in jobs():
        group = todo.setdefault((one["workload"], one["seed"]), [])
        known = any(all(row[name] == value for name, value in one.items()) for row in rows)
        if one not in group and not known:
            group.append(one)
    head = {"command": "python benchmark/simulator/worlds.py", "model": MODEL, "requests": REQUESTS}
    with multiprocessing.Pool(workers, maxtasksperchild=1) as pool:
        # What belongs to one seed are three jobs or some dozens of them: the largest first.
        groups = sorted(todo.items(), key=lambda item: -len(item[1]))
        running = [pool.apply_async(run_all, (*key, group)) for key, group in groups if group]
        for found in running:
            rows += found.get()
            lines = ",\n".join(json.dumps(row) for row in rows)
            PATH.write_text(json.dumps(head, indent=1)[:-2] + f',\n "runs": [\n{lines}\n]}}\n')
            print(f"{len(rows)} rows", flush=True)


if __name__ == "__main__":
    main()
