"""The paper's evaluation on the modelled engine: runs every part, writes raw results as JSON.

    python benchmark/simulator/run.py [--part NAME] [--workers 2] [--scale 1.0] [--fresh]

What is in the results already is not run again, unless --fresh: so a run that was cut off goes on.
But every row names the sources that it is of, and what is of others is forgotten.
"""

from __future__ import annotations

import argparse
import functools
import hashlib
import itertools
import json
import multiprocessing
import os
import platform
import resource
import subprocess
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np

from blendserve.planner import HARDWARE, CostModel, ModelSpec, model_spec
from blendserve.simulator.blend import BlendOptions
from blendserve.simulator.simulate import Policy, Setting, Simulation
from blendserve.simulator.step_time import Overlap
from blendserve.simulator.workloads import (
    GRID_DENSITIES,
    GRID_SHARINGS,
    REFERENCE,
    Workload,
    build,
)

ROOT = Path(__file__).parents[2]
RESULTS = ROOT / "benchmark" / "results" / "simulator"

TRACES = ("trace1", "trace2", "trace3", "trace4")
ALL = tuple(Overlap)
ABLATIONS = tuple(BlendOptions.__dataclass_fields__)
COARSE_SHARINGS, COARSE_DENSITIES = (0.05, 0.25, 0.45), (0.8, 0.95, 1.1, 1.3, 1.4)
SMALL_GRID = ((0.8, 1.0, 1.2, 1.4), (0.05, 0.25, 0.45))
WILDCHAT_SHARINGS = (0.25, 0.35, 0.45)

# Public config.json values of the paper's other models.
OTHER_MODELS: dict[str, tuple[int, dict[str, Any]]] = {
    "llama-3.1-70b": (8, {}),
    "qwen-2.5-7b": (
        1,
        {
            "hidden_size": 3584,
            "intermediate_size": 18944,
            "num_hidden_layers": 28,
            "num_attention_heads": 28,
            "num_key_value_heads": 4,
            "vocab_size": 152064,
        },
    ),
    "llama-2-7b": (
        1,
        {
            "hidden_size": 4096,
            "intermediate_size": 11008,
            "num_hidden_layers": 32,
            "num_attention_heads": 32,
            "num_key_value_heads": 32,
            "vocab_size": 32000,
        },
    ),
    "qwen-2.5-72b": (
        8,
        {
            "hidden_size": 8192,
            "intermediate_size": 29568,
            "num_hidden_layers": 80,
            "num_attention_heads": 64,
            "num_key_value_heads": 8,
            "vocab_size": 152064,
        },
    ),
    "deepseek-67b": (
        8,
        {
            "hidden_size": 8192,
            "intermediate_size": 22016,
            "num_hidden_layers": 95,
            "num_attention_heads": 64,
            "num_key_value_heads": 8,
            "vocab_size": 102400,
        },
    ),
}


@dataclass(frozen=True)
class Run:
    """One simulation of a part. model: None for the reference. off: additions switched off."""

    policy: Policy
    overlaps: tuple[Overlap, ...] = (Overlap.INTERFERENCE,)
    sampling: float = 0.01
    replicas: int = 1
    off: tuple[str, ...] = ()
    model: str | None = None
    trace_points: int = 0

    @property
    def key(self) -> dict[str, Any]:
        return {
            "policy": self.policy.value,
            "sampling": self.sampling,
            "replicas": self.replicas,
            "off": list(self.off),
            "model": self.model or REFERENCE.model.name,
        }


@dataclass(frozen=True)
class Task:
    """The runs of one workload in one part."""

    part: str
    workload: str
    requests: int
    runs: list[Run] = field(default_factory=list)


@functools.cache
def cost_model(name: str | None) -> CostModel:
    """On kernels measured on an A100."""
    if name is None:
        return CostModel.attained(REFERENCE.model, REFERENCE.hardware)
    ranks, config = OTHER_MODELS[name]
    spec = model_spec(name) if not config else ModelSpec.from_config(_llama_like(name, config))
    return CostModel.attained(spec, HARDWARE["a100-80g-sxm"], ranks)


def _llama_like(name: str, config: dict[str, Any]) -> dict[str, Any]:
    common = {"model_type": "llama", "max_position_embeddings": 131_072, "torch_dtype": "bfloat16"}
    return {"_name_or_path": name, **common, "tie_word_embeddings": False, **config}


def tasks(scale: float) -> Iterator[Task]:
    """Everything, the most important first."""
    large, small, point = (max(int(n * scale), 1_000) for n in (400_000, 40_000, 20_000))
    for name in TRACES:
        yield Task(
            "table2",
            name,
            large,
            [
                Run(Policy.DFS, ALL, trace_points=400),
                Run(Policy.BLEND, ALL, trace_points=400),
                Run(Policy.RANDOM, ALL, trace_points=400),
                Run(Policy.BLEND_PAPER, ALL, trace_points=400),
                Run(Policy.BLEND, ALL, sampling=1.0),
            ],
        )
    for name in TRACES:
        yield Task("policies", name, small, [Run(policy, ALL) for policy in Policy])
    for replicas in (4, 2):
        for name in TRACES:
            yield Task("dp", name, large, [Run(Policy.BLEND, replicas=replicas)])
    # Those whose order the paper has too: three orders each of the others would take as long again.
    everything = [
        Run(policy, ALL) for policy in Policy if policy not in (Policy.DFS_BEST, Policy.DFS_PACED)
    ]
    # Corners and middle lines first: a run that is cut off has seen all of the grid.
    points = list(itertools.product(GRID_SHARINGS, GRID_DENSITIES))
    for sharing, density in sorted(
        points, key=lambda at: at not in set(itertools.product(COARSE_SHARINGS, COARSE_DENSITIES))
    ):
        yield Task("grid", f"burstgpt:{density:g}:{sharing:g}", point, everything)
    compared = [Run(policy, ALL) for policy in (Policy.DFS, Policy.BLEND_PAPER, Policy.BLEND)]
    for trace in ("sharegpt", "wildchat", "azure-code"):
        # WildChat's prompts share more than 20 % as they are.
        for sharing in WILDCHAT_SHARINGS if trace == "wildchat" else SMALL_GRID[1]:
            for density in SMALL_GRID[0]:
                yield Task("grids", f"{trace}:{density:g}:{sharing:g}", point, compared)
    for name in TRACES:
        switched = [Run(Policy.BLEND, ALL, off=(one,)) for one in ABLATIONS]
        yield Task("ablation", name, 2 * small, [Run(Policy.BLEND, ALL), *switched])
    for name in TRACES:
        yield Task(
            "models",
            name,
            small,
            [
                Run(policy, model=model)
                for model in OTHER_MODELS
                for policy in (Policy.DFS, Policy.BLEND)
            ],
        )
    yield Task("reasoning", "reasoning", small, compared)


def run_task(task: Task) -> list[dict[str, Any]]:
    started = time.process_time()
    workload = build(task.workload, task.requests)
    simulation = Simulation(workload)
    prepared = time.process_time() - started
    records = []
    for run in task.runs:
        setting = Setting(
            cost_model=cost_model(run.model),
            policy=run.policy,
            overlaps=run.overlaps,
            sampling=run.sampling,
            replicas=run.replicas,
            options=replace(BlendOptions(), **dict.fromkeys(run.off, False)),
            trace_every=max(task.requests // run.trace_points, 1) if run.trace_points else 0,
        )
        began, wall = time.process_time(), time.perf_counter()
        results = simulation.run(setting)
        used = time.process_time() - began, time.perf_counter() - wall
        for at, result in enumerate(results):
            found = {name: value for name, value in asdict(result).items() if name != "trace"}
            record = {
                "workload": task.workload,
                **run.key,
                **{k: round(v, 6) if isinstance(v, float) else v for k, v in found.items()},
                "sources": sources(),
                "cpu_seconds": round(used[0], 2),
                "wall_seconds": round(used[1], 2),
                "prepare_cpu_seconds": round(prepared, 2),
                "peak_gib": round(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20, 2),
            }
            if at == 0:
                record["job"] = describe(workload, simulation, setting)
                record["trace"] = [
                    [round(t), round(c * 1e3, 2), round(m * 1e3, 2), kv]
                    for t, c, m, kv in result.trace
                ]
            records.append(record)
    return records


def describe(workload: Workload, simulation: Simulation, setting: Setting) -> dict[str, Any]:
    # Densities are named by the datasheet, whatever the job runs on.
    bound = simulation.bound(replace(setting, cost_model=REFERENCE, costs=None), Overlap.IDEAL)
    return {
        "requests_by_source": dict(
            zip(
                workload.sources,
                np.bincount(workload.source, minlength=len(workload.sources)).tolist(),
                strict=True,
            )
        ),
        "notes": dict(zip(workload.sources, workload.notes, strict=True)),
        "prompt_tokens": simulation.tree.prompt_tokens,
        "output_tokens": int(workload.output_tokens.sum()),
        "density": round(bound.compute_seconds / max(bound.memory_seconds, 1e-12), 4),
        "compute_seconds": round(bound.compute_seconds, 1),
        "memory_seconds": round(bound.memory_seconds, 1),
        "longest_seconds": round(bound.longest_seconds, 1),
    }


def load(part: str) -> list[dict[str, Any]]:
    """The rows of a part that are of the sources as they are now."""
    path = RESULTS / f"{part}.json"
    rows = json.loads(path.read_text())["runs"] if path.is_file() else []
    return [row for row in rows if row.get("sources") == sources()]


@functools.cache
def sources() -> str:
    """What decides a row: a digest of planner, simulator and these scripts, tables included."""
    package = ROOT / "python" / "blendserve"
    folders = package / "planner", package / "simulator"
    files = [path for folder in folders for path in folder.rglob("*") if path.is_file()]
    files += [Path(__file__).with_name(name) for name in ("run.py", "worlds.py")]
    digest = hashlib.sha256()
    for path in sorted(files):
        if path.suffix in (".py", ".npz"):
            digest.update(path.name.encode() + path.read_bytes())
    return digest.hexdigest()[:12]


@functools.cache
def commit() -> str:
    """Of the code that runs; empty outside a repository."""
    asked = ["git", "rev-parse", "--short", "HEAD"]
    return subprocess.run(asked, cwd=ROOT, capture_output=True, text=True).stdout.strip()


def save(part: str, runs: list[dict[str, Any]], scale: float) -> None:
    RESULTS.mkdir(parents=True, exist_ok=True)
    head = {
        "command": f"python benchmark/simulator/run.py --part {part}"
        + (f" --scale {scale:g}" if scale != 1 else ""),
        "device": f"{platform.machine()}, {os.cpu_count()} cores",
        "commit": commit(),
        "versions": {"python": platform.python_version(), "numpy": np.__version__},
    }
    lines = ",\n".join(json.dumps(run) for run in runs)
    text = json.dumps(head, indent=1)[:-2] + f',\n "runs": [\n{lines}\n]}}\n'
    (RESULTS / f"{part}.json").write_text(text)


def missing(task: Task, known: list[dict[str, Any]]) -> Task:
    done = [
        {"workload": run["workload"], "requests": run["requests"]}
        | {name: run[name] for name in ("policy", "sampling", "replicas", "off", "model")}
        for run in known
    ]
    here = {"workload": task.workload, "requests": task.requests}
    return replace(task, runs=[run for run in task.runs if here | run.key not in done])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--part", action="append", help="only this part; may be repeated")
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--scale", type=float, default=1.0, help="of the numbers of requests")
    parser.add_argument("--fresh", action="store_true", help="forget earlier results")
    options = parser.parse_args()
    sources()  # Before anything can change.
    todo = [task for task in tasks(options.scale) if not options.part or task.part in options.part]
    results = {task.part: [] if options.fresh else load(task.part) for task in todo}
    todo = [missing(task, results[task.part]) for task in todo]
    todo = [task for task in todo if task.runs]
    with multiprocessing.Pool(options.workers, maxtasksperchild=8) as pool:
        jobs = [(task, pool.apply_async(run_task, (task,))) for task in todo]
        for task, job in jobs:
            results[task.part] += job.get()
            save(task.part, results[task.part], options.scale)
            print(f"{task.part}: {task.workload}", flush=True)


if __name__ == "__main__":
    main()
