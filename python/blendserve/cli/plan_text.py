"""The report of ``blendserve plan`` as a person reads it."""

from __future__ import annotations

import math

import numpy as np

from blendserve.cli.plan_costs import Dear, job_costs
from blendserve.cli.plan_report import PREDICTED_WORLD, Report, quartiles, warnings

_LARGEST_PREFIXES = 5


def as_text(report: Report) -> str:
    """Plain lines, for a terminal or a log."""
    plan, prediction, model = report.plan, report.prediction, report.cost_model.model
    parts = [
        section
        for section in (
            [
                f"{model.name} on {report.cost_model.hardware.name}, "
                f"{report.capacity_tokens:,} tokens of KV cache per replica",
                f"costs: {report.cost_model.step_costs.source}",
            ],
            [
                _row("requests", f"{len(plan.order):,}"),
                _row("prompt tokens", f"{plan.prompt_tokens:,}"),
                _row("unique tokens", f"{plan.unique_tokens:,}"),
                _row("output tokens", f"{plan.estimated_output_tokens.sum():,.0f}{_basis(report)}"),
            ],
            [
                "prefix sharing (part of the prompt tokens found in the cache)",
                _row("  best", f"{plan.sharing_best:.1%}"),
                _row("  planned", f"{prediction.sharing_planned:.1%}"),
                _row("  random order", f"{prediction.sharing_random:.1%}"),
            ],
            [
                "compute density (above 1: compute-bound, below: memory-bound)",
                _row("  job", _density(plan.target_density)),
                _row("  quartiles", "  ".join(_density(v) for v in quartiles(plan).values())),
            ],
            _seconds(report),
            *_costs(report),
            _replicas(report),
            _prefixes(report),
            [f"warning: {warning}" for warning in warnings(report)],
            [f"planned in {report.plan_seconds:.2f} s"],
        )
        if section
    ]
    return "\n\n".join("\n".join(section) for section in parts)


def _row(name: str, value: str) -> str:
    return f"{name:<20} {value}"


def _density(value: float) -> str:
    return "inf" if math.isinf(value) else f"{value:.3g}"


def _basis(report: Report) -> str:
    known = sum(length >= 0 for length in report.job.known_output_tokens)
    total = len(report.job.known_output_tokens)
    return "" if known == total else f" (estimated for {total - known:,} of {total:,} requests)"


def _seconds(report: Report) -> list[str]:
    prediction = report.prediction
    rows = [f"predicted time ({PREDICTED_WORLD})"]
    for name, seconds in (
        ("FCFS", prediction.fcfs_seconds),
        ("DFS", prediction.dfs_seconds),
        ("blend", prediction.blend_seconds),
        ("bound", prediction.bound_seconds),
    ):
        against = prediction.blend_seconds
        ratio = f"   {seconds / against:.2f}x blend" if against > 0 and name != "blend" else ""
        rows.append(_row(f"  {name}", f"{_duration(seconds):>12}{ratio}"))
    return rows


def _costs(report: Report) -> list[list[str]]:
    """Device time and money; what is dear; the tail."""
    costs = job_costs(report)
    spent = _duration(costs.device_seconds)
    if costs.devices > 1:
        spent += f" of {costs.devices} devices together"
    if costs.price is not None:
        price = f"{costs.price:,.2f}" if costs.price >= 1 else f"{costs.price:.2g}"
        spent += f", which costs {price} at {report.price_per_hour:g} an hour each"
    percent = max(len(report.plan.order) // 100, 1)
    rows = [
        "where the work goes (compute and memory time, after sharing)",
        _row("  prompts", f"{costs.prompts:.0%}, answers {1 - costs.prompts:.0%}"),
        _row(
            "  dearest lines",
            f"{percent:,} of {len(report.plan.order):,}: {costs.dearest_percent:.1%}",
        ),
        *(
            _row(f"  lines {part.first_line:,}-{part.last_line:,}", f"{part.share:.1%}")
            for part in costs.stretches
            if len(costs.stretches) > 1
        ),
        *(f"  {_told(dear)}, {dear.share:.1%}" for dear in costs.dearest),
    ]
    tail = ["the end of the run"]
    if costs.last:
        total = report.prediction.blend_seconds
        begins = max(1 - costs.tail_seconds / total, 0.0) if total else 0.0
        tail += [
            f"  from {begins:.0%} of it on, {_duration(costs.tail_seconds)}, few requests are left "
            f"({costs.last_count:,}), the last of them:",
            *(f"  {_told(dear)}" for dear in costs.last),
        ]
    else:
        tail.append("  no tail: many requests run together until it is over")
    return [[_row("device time", spent)], rows, tail]


def _told(dear: Dear) -> str:
    return (
        f"{dear.id!r} in line {dear.line:,}: {dear.prompt_tokens:,} prompt and "
        f"{dear.output_tokens:,} output tokens"
    )


def _duration(seconds: float) -> str:
    if seconds >= 5400:
        return f"{seconds / 3600:.2f} h"
    return f"{seconds / 60:.1f} min" if seconds >= 90 else f"{seconds:.3g} s"


def _replicas(report: Report) -> list[str]:
    parts = report.parts
    if len(parts.plans) == 1:
        return []
    rows = [
        f"replicas: times within {parts.imbalance:.2%} of each other, "
        f"{max(parts.lost_sharing, 0.0):.2%} of the sharing lost"
    ]
    for replica, (plan, run) in enumerate(zip(parts.plans, report.prediction.blend, strict=True)):
        rows.append(
            _row(
                f"  {replica}",
                f"{len(plan.order):,} requests, density {_density(plan.target_density)}, "
                f"{_duration(run.seconds)}",
            )
        )
    return rows


def _prefixes(report: Report) -> list[str]:
    """The prefixes that save most: segments by their tokens times the reuses."""
    tree, job = report.plan.tree, report.job
    if tree.num_nodes < 2:
        return []
    edge = tree.depth - tree.depth[np.maximum(tree.parent, 0)]
    saved = edge * (tree.end - tree.first - 1)
    saved[0] = 0
    rows = ["largest shared prefixes"]
    for node in np.argsort(-saved, kind="stable")[:_LARGEST_PREFIXES].tolist():
        if saved[node] <= 0:
            break
        example = job.ids[int(tree.requests[tree.first[node]])]
        rows.append(
            f"  {tree.depth[node]:,} tokens in {tree.end[node] - tree.first[node]:,} requests, "
            f"saves {saved[node]:,} ({saved[node] / report.plan.prompt_tokens:.1%}), "
            f"such as {example!r}"
        )
    return rows if len(rows) > 1 else []
