"""What `plan` finds out about a job, and what of it deserves a warning."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np

from blendserve.cli.job_file import JobFile
from blendserve.planner import CostModel, Partition, Plan, Prediction

_QUARTILES = ((25, "p25"), (50, "p50"), (75, "p75"))

# What `predict` assumes; `simulate` has other worlds.
PREDICTED_WORLD = "sequential: nothing overlaps; the bound: all does, in large steps"


class PlanError(RuntimeError):
    """Nothing can be planned; the message says what to do."""


@dataclass(frozen=True)
class Report:
    """All that was found out about a job. plan_seconds: making the plan, without reading the file
    and predicting. devices: of a replica. price_per_hour: of one of them, None if not told."""

    job: JobFile
    cost_model: CostModel
    capacity_tokens: int
    plan: Plan
    parts: Partition
    prediction: Prediction
    plan_seconds: float
    devices: int = 1
    price_per_hour: float | None = None


def quartiles(plan: Plan) -> dict[str, float]:
    """Density that a quarter, half, three quarters of the requests do not exceed; after sharing.
    Always that of a request, so that requests without decoding (inf) do no harm."""
    found = np.quantile(plan.density, [q / 100 for q, _ in _QUARTILES], method="inverted_cdf")
    return {name: float(value) for (_, name), value in zip(_QUARTILES, found, strict=True)}


def finite(value: float) -> float | None:
    return value if math.isfinite(value) else None


def warnings(report: Report) -> list[str]:
    """What is likely to surprise in this run, each a sentence with its first example."""
    job, plan, model = report.job, report.plan, report.cost_model.model
    found = list(model.caveats)
    if report.cost_model.hardware.guess:
        found.append(
            f"nobody has measured {report.cost_model.hardware.name!r}: seconds and prices are a "
            "guess, good for comparing orders only; `blendserve calibrate` measures this machine"
        )
    for lines, reason in (
        (job.too_long, f"leave no room for an answer in {model.context_length} tokens of context"),
        (job.media, f"have media that cannot be counted ({job.media_fault})"),
    ):
        if lines:
            name, line = lines[0]
            count = f"{len(lines)} request" + ("s" if len(lines) > 1 else "")
            found.append(f"{count} left out: they {reason} (first: {name!r}, line {line})")
    output = plan.estimated_output_tokens
    length = np.empty(len(output), dtype=np.int64)
    length[plan.tree.requests] = plan.tree.length
    large = np.flatnonzero(length + output > report.capacity_tokens)
    if len(large):
        found.append(
            f"{len(large)} need more than the {report.capacity_tokens} tokens of KV cache on their "
            f"own (first: {_place(job, int(large[0]))}): take more devices"
        )
    alone = alone_seconds(report)
    total = report.prediction.blend_seconds
    slow = np.flatnonzero(alone > 0.25 * total)
    if len(slow) and len(plan.order) > 1:
        worst = int(slow[np.argmax(alone[slow])])
        found.append(
            f"{len(slow)} will dominate the tail: alone, with the weights read for every token, "
            f"they take over a quarter of the predicted run; the longest, {_place(job, worst)}, "
            f"{alone[worst]:.3g} s for {output[worst]:.0f} output tokens"
            + (", and no run is shorter than that" if alone[worst] > total else "")
        )
    if len(plan.sample):
        unknown = sum(known < 0 for known in job.known_output_tokens)
        found.append(
            f"{unknown} output lengths are unknown: {len(plan.sample)} requests run first as a "
            "sample; until their answers are in, the figures rest on limits and an assumed length"
        )
    if all(run.window[-1] == 0 for run in report.prediction.blend if len(run.window)):
        found.append("all requests fit into the KV cache at once, so their order matters little")
    return found


def _place(job: JobFile, request: int) -> str:
    return f"{job.ids[request]!r} in line {job.lines[request]}"


def alone_seconds(report: Report) -> np.ndarray:
    """(n,) seconds that a request takes with the engine for itself: its prefill, and per output
    token the traffic of all weights and of its KV cache. No batch can make it faster."""
    plan, cost_model = report.plan, report.cost_model
    tree = plan.tree
    output = plan.estimated_output_tokens[tree.requests]
    weights = cost_model.step_costs.token_seconds(1) + cost_model.step_costs.step
    seconds = np.empty(tree.num_leaves)
    seconds[tree.requests] = (
        plan.encoder.saved_seconds(cost_model, tree.requests, tree.length)
        + output * weights
        + cost_model.memory_seconds(tree.length, output)
    )
    return seconds
