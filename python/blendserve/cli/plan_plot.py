"""The picture of ``blendserve plan``: the planned tree, and what the run leans on over its time."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from blendserve.cli.plan_report import PlanError, Report
from blendserve.planner import OrderPrediction, PrefixTree
from blendserve.planner.annotation import annotate

# Densities further than this factor from 1 have the full colour.
_COLOUR_FACTOR = 100.0
_COLUMNS, _ROWS = 1400, 500
_LEAST_PIECES = 12
# Nodes at least this part of the picture wide have an outline.
_OUTLINE = 0.004


def draw(path: Path, report: Report) -> None:
    """Write a PNG. Raises PlanError when matplotlib is not installed."""
    try:
        import matplotlib
    except ImportError as error:
        raise PlanError("--plot needs the package matplotlib; install it with pip") from error
    matplotlib.use("Agg")
    from matplotlib import pyplot
    from matplotlib.cm import ScalarMappable
    from matplotlib.colors import LogNorm

    norm = LogNorm(1 / _COLOUR_FACTOR, _COLOUR_FACTOR)
    colours = pyplot.get_cmap("RdBu_r")
    figure, (tree_axes, run_axes) = pyplot.subplots(
        2, 1, figsize=(12, 8), height_ratios=(3, 2), layout="constrained"
    )
    tree = _planned_tree(report)
    image, depth = icicle(report, tree)
    _draw_tree(tree_axes, report, tree, colours(norm(image)), np.isnan(image), depth)
    bar = figure.colorbar(ScalarMappable(norm, colours), ax=tree_axes, pad=0.01)
    bar.set_label("compute density\n(blue: memory, red: compute)")
    ticks = [0.01, 0.03, 0.1, 0.3, 1, 3, 10, 30, 100]
    bar.set_ticks(ticks, labels=[f"{tick:g}" for tick in ticks])
    bar.minorticks_off()
    _draw_run(run_axes, report)
    figure.savefig(path, dpi=120)
    pyplot.close(figure)


def _planned_tree(report: Report) -> PrefixTree:
    """The tree of the planned order, where a split prefix stands several times."""
    plan = report.plan
    leaf = np.empty(plan.tree.num_leaves, dtype=np.int64)
    leaf[plan.tree.requests] = np.arange(plan.tree.num_leaves)
    return PrefixTree.from_lcp(
        plan.order, plan.tree.length[leaf[plan.order]], plan.shared_with_previous
    )


def icicle(report: Report, tree: PrefixTree) -> tuple[NDArray[np.float64], int]:
    """(densities [rows, columns], tokens that the rows stand for).

    A column is a request in planned order (of several, the middle one), its rows the prefix tree
    nodes above it, from the root down, then its own prompt; nan below its end.
    """
    plan, cost_model = report.plan, report.cost_model
    length = tree.length
    output = plan.estimated_output_tokens[plan.order]
    marks = annotate(
        tree,
        plan.encoder.compute_seconds(cost_model, plan.order, length, output),
        cost_model.memory_seconds(length, output),
        plan.encoder.saved(cost_model),
    )
    n = tree.num_leaves
    columns = min(_COLUMNS, n)
    # A few giants would flatten all else: what is above the 99th percentile is cut off.
    depth = int(np.quantile(length, 0.99, method="inverted_cdf")) or 1
    image = np.full((_ROWS, columns), np.nan)
    for column in range(columns):
        at = min(int((column + 0.5) * n / columns), n - 1)
        image[: _row(int(length[at]), depth), column] = plan.density[at]
        node = int(tree.leaf_parent[at])
        while node > 0:
            image[: _row(int(tree.depth[node]), depth), column] = marks.density[node]
            node = int(tree.parent[node])
    return image, depth


def _row(tokens: int, depth: int) -> int:
    return min(round(tokens * _ROWS / depth), _ROWS)


def _draw_tree(
    axes: Any,
    report: Report,
    tree: PrefixTree,
    image: NDArray[np.float64],
    empty: NDArray[np.bool_],
    depth: int,
) -> None:
    image[empty] = (1.0, 1.0, 1.0, 1.0)
    n = len(report.plan.order)
    axes.imshow(image, aspect="auto", interpolation="nearest", extent=(0, n, depth, 0))
    from matplotlib.collections import PolyCollection

    wide = np.flatnonzero(tree.end - tree.first >= max(_OUTLINE * n, 2))[1:]
    boxes = [
        [(low, top), (high, top), (high, bottom), (low, bottom)]
        for low, high, top, bottom in zip(
            tree.first[wide],
            tree.end[wide],
            tree.depth[tree.parent[wide]],
            tree.depth[wide],
            strict=True,
        )
    ]
    axes.add_collection(
        PolyCollection(boxes, facecolors="none", edgecolors="white", linewidths=0.7)
    )
    axes.set_ylim(depth, 0)
    axes.set_title(
        f"{n:,} requests, {report.plan.prompt_tokens:,} prompt tokens, "
        f"{report.plan.sharing_best:.0%} shared, density {report.plan.target_density:.3g}"
    )
    axes.set_xlabel("requests in planned order (left scanner from the left, right from the right)")
    axes.set_ylabel("prompt tokens")


def _draw_run(axes: Any, report: Report) -> None:
    prediction = report.prediction
    for name, runs, colour, width in (
        ("FCFS", prediction.fcfs, "0.7", 1.2),
        ("DFS", prediction.dfs, "tab:orange", 1.2),
        ("blend", prediction.blend, "tab:green", 2.2),
    ):
        run = max(runs, key=lambda run: run.seconds)
        times, compute_share = balance(run)
        label = f"{name}: {run.seconds:.3g} s"
        axes.stairs(compute_share, times, baseline=None, color=colour, linewidth=width, label=label)
    compute, memory = report.plan.compute_seconds.sum(), report.plan.memory_seconds.sum()
    if compute + memory > 0:
        share = compute / (compute + memory)
        axes.axhline(share, color="black", linewidth=0.9, linestyle=":", label="the whole job")
    axes.set_ylim(0, 1.2)  # Room for the legend.
    axes.set_yticks([0, 0.25, 0.5, 0.75, 1])
    axes.set_xlim(left=0)
    axes.set_xlabel("predicted seconds")
    axes.set_ylabel("compute / (compute + memory)")
    which = " of the slowest replica" if len(report.parts.plans) > 1 else ""
    axes.set_title(f"balance over the run{which}: the closer to the dotted line, the more overlaps")
    axes.legend(loc="upper center", ncols=4, frameon=False)


def balance(run: OrderPrediction) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """(edges [w + 1] in seconds, compute / (compute + memory) [w]) of the windows of a run.

    A run of few windows is cut finer, into pieces of equal work, to show what it starts with.
    """
    compute, memory = run.window_seconds()
    if len(compute) < _LEAST_PIECES:
        work = run.compute_seconds + run.memory_seconds
        passed = (np.cumsum(work) - work) / max(float(work.sum()), 1e-300)
        piece = np.floor(passed * _LEAST_PIECES).astype(np.int64)
        compute = np.bincount(piece, run.compute_seconds).astype(np.float64)
        memory = np.bincount(piece, run.memory_seconds).astype(np.float64)
    used = compute + memory > 0
    compute, memory = compute[used], memory[used]
    longest = np.maximum(compute, memory)
    # Pieces of one window overlap too: they are scaled to the window's time.
    edges = np.concatenate(([0.0], np.cumsum(longest)))
    edges *= run.seconds / max(float(edges[-1]), 1e-300)
    return edges, compute / (compute + memory)
