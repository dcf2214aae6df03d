"""What a job costs: device time and money, which part of the file it goes to, and its tail."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from blendserve.cli.plan_report import Report
from blendserve.planner import Plan

# The file in so many stretches of as many requests.
_STRETCHES = 10
_DEAREST = 5
_LAST = 5


@dataclass(frozen=True)
class Stretch:
    """Lines of the file, both included, and their part of the work."""

    first_line: int
    last_line: int
    share: float


@dataclass(frozen=True)
class Dear:
    """One request. share: of the work."""

    id: str
    line: int
    prompt_tokens: int
    output_tokens: int
    share: float


@dataclass(frozen=True)
class JobCosts:
    """devices: of all replicas. device_seconds: all of them, as long as the planned run takes.
    price: of these, None without a price. Shares are parts of the job's work, which is compute and
    memory seconds after sharing: prompts of the prompts against the answers; dearest_percent of
    the dearest hundredth of the requests, one at least. tail_seconds, last: the end of the slowest
    replica's run, in which few requests are left, and these, those that end last first."""

    devices: int
    device_seconds: float
    price: float | None
    prompts: float
    dearest_percent: float
    stretches: list[Stretch]
    dearest: list[Dear]
    tail_seconds: float
    last: list[Dear]
    last_count: int


def job_costs(report: Report) -> JobCosts:
    """Of the plan and the prediction."""
    plan, prediction = report.plan, report.prediction
    seconds = prediction.blend_seconds
    devices = report.devices * len(prediction.blend)
    device_seconds = seconds * devices
    hourly = report.price_per_hour
    work = _work(plan)
    share = work / (work.sum() or 1.0)
    by_share = np.argsort(-share, kind="stable")
    percent = max(len(plan.order) // 100, 1)
    slowest = max(prediction.blend, key=lambda run: run.seconds)
    length = _lengths(plan)

    def dear(request: int) -> Dear:
        job = report.job
        output = round(float(plan.estimated_output_tokens[request]))
        return Dear(
            job.ids[request], job.lines[request], int(length[request]), output, share[request]
        )

    return JobCosts(
        devices=devices,
        device_seconds=device_seconds,
        price=None if hourly is None else hourly * device_seconds / 3_600,
        prompts=_prompts_share(report, length),
        dearest_percent=float(share[by_share[:percent]].sum()),
        stretches=_stretches(report, share),
        dearest=[dear(request) for request in by_share[:_DEAREST].tolist()],
        tail_seconds=slowest.tail_seconds,
        last=[dear(request) for request in slowest.last[:_LAST].tolist()],
        last_count=len(slowest.last),
    )


def _work(plan: Plan) -> NDArray[np.float64]:
    """(n,) compute and memory seconds of each request after sharing; 0 where it is not planned."""
    work = np.zeros(plan.tree.num_leaves)
    work[plan.order] = plan.compute_seconds + plan.memory_seconds
    return work


def _lengths(plan: Plan) -> NDArray[np.int64]:
    length = np.zeros(plan.tree.num_leaves, dtype=np.int64)
    length[plan.tree.requests] = plan.tree.length
    return length


def _prompts_share(report: Report, length: NDArray[np.int64]) -> float:
    """What would be left of the work if nothing were answered."""
    plan, model = report.plan, report.cost_model
    order = plan.order
    output = plan.estimated_output_tokens[order]
    answers = model.compute_seconds(length[order], output) - model.compute_seconds(length[order], 0)
    answers = answers + model.memory_seconds(length[order], output)
    total = float((plan.compute_seconds + plan.memory_seconds).sum())
    return max(1.0 - float(answers.sum()) / total, 0.0) if total else 0.0


def _stretches(report: Report, share: NDArray[np.float64]) -> list[Stretch]:
    """The file from its beginning to its end."""
    lines = report.job.lines
    parts = np.array_split(np.arange(len(lines)), min(_STRETCHES, len(lines)))
    return [
        Stretch(lines[int(part[0])], lines[int(part[-1])], float(share[part].sum()))
        for part in parts
    ]
