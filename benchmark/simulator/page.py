"""What the pages' sections have in common: results, names, tables, pictures."""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")
from matplotlib import pyplot

ROOT = Path(__file__).parents[2]
RESULTS = ROOT / "benchmark" / "results" / "simulator"
PAGE = ROOT / "docs" / "paper.md"
PLOTS = ROOT / "docs" / "paper"

TRACES = ("trace1", "trace2", "trace3", "trace4")
NAMES = {
    "dfs": "NanoFlow-DFS",
    "dfs-best": "best of three DFS",
    "dfs-paced": "DFS with our pacing",
    "random": "NanoFlow-Balance",
    "blend-paper": "blend as in the paper",
    "blend": "blend (ours)",
    "fcfs": "FCFS",
    "longest": "longest first",
    "batchllm": "BatchLLM-style",
    "disaggregated": "xPyD",
}
COLOURS = {"dfs": "#999999", "random": "#c9a227", "blend-paper": "#7fa8d1", "blend": "#1f5fa8"}
# What the paper reports (ALGORITHM and Table/Section names of arXiv 2411.16102).
PAPER_DP = {
    "trace1": (11_080, 20_561, 41_928),
    "trace2": (8_408, 16_261, 32_537),
    "trace3": (8_403, 15_623, 32_026),
    "trace4": (6_325, 12_246, 24_541),
}
PAPER_COSTS = {512: (1.038, 1.087, 1.239, 1.317), 768: (1.494, 1.537, 1.859, 1.913)}
PAPER_COSTS[1_024] = (1.916, 2.005, 2.478, 2.515)
PAPER_GRIDS = {
    "burstgpt": "1.14 to 1.34, mean 1.2253",
    "azure-code": "1.14 to 1.31",
    "sharegpt": "1.08 to 1.17",
    "wildchat": "1.07 to 1.16",
}

Run = dict[str, Any]


def load(part: str) -> list[Run]:
    path = RESULTS / f"{part}.json"
    return list(json.loads(path.read_text())["runs"]) if path.is_file() else []


def code_of_results() -> str:
    """Which commit each part was run on, and which parts are older than that was recorded."""
    parts: dict[str, list[str]] = {}
    for path in sorted(RESULTS.glob("*.json")):
        record = json.loads(path.read_text())
        if "runs" in record and "commit" in record:
            parts.setdefault(record.get("commit", ""), []).append(f"`{path.stem}`")
    said = [
        f"{', '.join(names)}: commit {commit}"
        if commit
        else f"{', '.join(names)}: before commits were recorded, on an earlier form of the "
        "memory test and of the cache"
        for commit, names in sorted(parts.items(), reverse=True)
    ]
    return "Code that the results are of: " + "; ".join(said) + ".\n"


def one(runs: Iterable[Run], **wanted: Any) -> Run | None:
    wanted = {"off": [], "sampling": 0.01, "replicas": 1, "overlap": "interference", **wanted}
    found = [run for run in runs if all(run[name] == value for name, value in wanted.items())]
    return found[0] if found else None


def table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    lines = ["| " + " | ".join(head) + " |", "|" + "---|" * len(head)]
    lines += ["| " + " | ".join(row) + " |" for row in rows]
    return "\n".join(lines) + "\n"


def ratio(a: Run, b: Run) -> float:
    """How many times faster a is than b."""
    return float(b["seconds"]) / float(a["seconds"])


def save(figure: Any, name: str) -> str:
    PLOTS.mkdir(parents=True, exist_ok=True)
    figure.savefig(PLOTS / f"{name}.png", dpi=80)
    pyplot.close(figure)
    return f"![{name}](paper/{name}.png)\n"
