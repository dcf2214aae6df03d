"""The simulator against the real CPU engine: step times fitted on one job, another one predicted.

    python benchmark/simulator/real_engine.py [--job A] [--job B] ...

Job A runs on the real engine, blended; its trace of steps gives seconds per token, per context
token, per pair of prefill attention and per weight read (least squares). Jobs B, C and D, of other
subjects, other answer lengths and other pools, run blended and as SGLang does (FCFS, LRU), one
server at a time; the simulator, with the fitted steps, predicts both times and their ratio.

Both have the same attention, or the ratio would not be one of policies: requests without a plan are
SGLang's own business, also where our plugin is loaded. Both run on one thread, which other load on
a machine of two cores disturbs little, and process each step before the next one begins, so that
the time between two results is that of a step. Needs the data folder.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import sys
import tempfile
from pathlib import Path
from typing import Any

import numpy as np

sys.path.insert(0, str(Path(__file__).parents[2] / "benchmark" / "runtime"))

import engine
from tokenizers import Tokenizer

from blendserve.planner import (
    HARDWARE,
    CostModel,
    FlatTokens,
    StepCosts,
    fit_steps,
    linear_costs,
    model_spec,
)
from blendserve.runtime.default_model import MODEL_NAME, resolve_model_path
from blendserve.simulator.blend import BlendOptions
from blendserve.simulator.simulate import Policy, Setting, Simulation
from blendserve.simulator.step_time import Overlap
from blendserve.simulator.workloads import Workload

ROOT = Path(__file__).parents[2]
RESULTS = ROOT / "benchmark" / "results" / "simulator" / "real-engine.json"
CHUNK_TOKENS = 512
# Seed, subjects, questions of each, open prompts, tokens of an open answer, pool / shared prefixes.
JOBS = {
    "A": (0, 8, 4, 10, 96, 0.5),
    "B": (1, 8, 5, 8, 64, 0.7),
    "C": (2, 6, 6, 12, 96, 0.6),
    "D": (3, 10, 4, 4, 48, 0.8),
}
# The runtime's policy: partitioned admission, eviction by next use.
RUNTIME = BlendOptions(online=False, paced=False)


def job(name: str, model: str) -> tuple[list[dict[str, Any]], int]:
    """Lines and KV pool of a job."""
    seed, *sizes, share = JOBS[name]
    engine.SUBJECTS, engine.QUESTIONS, engine.OPEN_PROMPTS, engine.OPEN_TOKENS = sizes
    lines = engine.make_lines(seed)
    return lines, int(share * engine.shared_prefix_tokens(engine.prefix_tree(lines, model)))


def flags(pool: int) -> tuple[str, ...]:
    own = ("--attention-backend", "blend", "--schedule-policy", "fcfs")
    own += ("--disable-overlap-schedule",)
    return (*engine.COMMON, *own, "--max-total-tokens", str(pool))


def step_seconds(trace: Path) -> tuple[np.ndarray, np.ndarray]:
    """(steps,) seconds of each, and (steps, 3): tokens in its GEMMs, context of its decodes, pairs
    of its prefill attention."""
    lines = [json.loads(line) for line in trace.read_text().splitlines()]
    work = [
        (
            step["prefill_tokens"] + step["decode_requests"],
            step["decode_context_tokens"],
            step["prefill_pairs"],
        )
        for step in lines[1:]
    ]
    return np.diff([step["seconds"] for step in lines]), np.array(work, dtype=np.float64)


def fitted(trace: Path) -> tuple[dict[str, float], dict[str, float]]:
    """Terms of a step as the simulator charges it, and how well they explain step times."""
    found = fit_steps(*step_seconds(trace))
    quality = {
        "steps": found.steps,
        "steps_left_out": found.left_out,
        "variance_explained": found.variance_explained,
        "mean_error": found.mean_error,
    }
    terms = {
        "token_seconds": found.token_seconds,
        "pair_seconds": found.pair_seconds,
        "context_seconds": found.context_seconds,
        "weight_seconds": found.weight_seconds,
    }
    return terms, quality


def workload(lines: list[dict[str, Any]], model: str, name: str) -> Workload:
    tokenizer = Tokenizer.from_file(str(Path(model) / "tokenizer.json"))
    encoded = tokenizer.encode_batch([line["body"]["prompt"] for line in lines])
    output = np.array([line["body"]["max_tokens"] for line in lines], dtype=np.int64)
    return Workload(
        name=name,
        prompts=FlatTokens.of([np.array(one.ids, dtype=np.int32) for one in encoded]),
        output_tokens=output,
        max_output_tokens=output,
        source=np.zeros(len(lines), dtype=np.int64),
        sources=("mmlu and open prompts",),
    )


def predict(work: Workload, pool: int, costs: StepCosts, model: str) -> dict[str, Any]:
    cost_model = CostModel(model_spec(model), HARDWARE["a100-80g-sxm"])  # For densities only.
    found = {}
    for policy in (Policy.BLEND, Policy.FCFS):
        setting = Setting(
            cost_model,
            policy,
            (Overlap.SEQUENTIAL,),
            sampling=1.0,
            capacity=pool,
            options=RUNTIME,
            costs=costs,
            chunk_tokens=CHUNK_TOKENS,
            mixed=False,
        )
        result = Simulation(work).run(setting)[0]
        cached = round(result.sharing * sum(map(len, work.prompts)))
        found[policy.value] = {
            "seconds": result.seconds,
            "cached_tokens": cached,
            "steps": result.steps,
        }
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--json", type=Path, default=RESULTS)
    parser.add_argument("--job", choices=tuple(JOBS), action="append")
    options = parser.parse_args()
    os.environ["OMP_NUM_THREADS"] = "1"
    model = resolve_model_path(MODEL_NAME)
    record = json.loads(options.json.read_text()) if options.json.is_file() else {"jobs": {}}
    for name in options.job or JOBS:
        with tempfile.TemporaryDirectory() as folder:
            if name == "A":
                record |= fit(model, Path(folder))
            else:
                record["jobs"][name] = measure(name, model, Path(folder))
        for other, found in record["jobs"].items():
            compare(other, model, record["calibration"], found)
        options.json.parent.mkdir(parents=True, exist_ok=True)
        options.json.write_text(json.dumps(record, indent=1) + "\n")
    print(json.dumps(record, indent=1))


def fit(model: str, folder: Path) -> dict[str, Any]:
    lines, pool = job("A", model)
    trace = folder / "trace.jsonl"
    os.environ["BLENDSERVE_TRACE_FILE"] = str(trace)
    found = engine.run_blended(lines, flags(pool), folder)
    del os.environ["BLENDSERVE_TRACE_FILE"]
    costs, quality = fitted(trace)
    return {
        "command": "python benchmark/simulator/real_engine.py",
        "device": f"{platform.machine()}, {os.cpu_count()} cores, one thread",
        "model": MODEL_NAME,
        "calibration": {**found, "pool_tokens": pool, **costs, **quality},
    }


def measure(name: str, model: str, folder: Path) -> dict[str, Any]:
    lines, pool = job(name, model)
    for policy in ("blend", "fcfs"):
        (folder / policy).mkdir()
    blend = engine.run_blended(lines, flags(pool), folder / "blend")
    fcfs = engine.run_stock(lines, model, flags(pool), folder / "fcfs", enabled=True)
    return {"pool_tokens": pool, "blend": blend, "fcfs": fcfs}


def compare(name: str, model: str, calibration: dict[str, Any], found: dict[str, Any]) -> None:
    """Adds the prediction of a job to its measurement, and how far they are apart."""
    names = ("token_seconds", "pair_seconds", "context_seconds", "weight_seconds")
    terms = (calibration[term] for term in names)
    costs = linear_costs(*terms, source="this CPU", one_memory=False)
    lines, pool = job(name, model)
    predicted = predict(workload(lines, model, name), pool, costs, model)
    seconds = {policy: found[policy]["seconds"] for policy in predicted}
    ratios = (
        seconds["fcfs"] / seconds["blend"],
        (predicted["fcfs"]["seconds"] / predicted["blend"]["seconds"]),
    )
    found["predicted"] = predicted
    found["ratio"] = {
        "measured": ratios[0],
        "predicted": ratios[1],
        "error": ratios[1] / ratios[0] - 1,
    }
    found["errors"] = {
        policy: predicted[policy]["seconds"] / seconds[policy] - 1 for policy in predicted
    }


if __name__ == "__main__":
    main()
