"""What docs/paper.md says first: the policies on measured kernels, in several worlds and seeds."""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from page import NAMES, RESULTS, Run, table

WORLDS = ("sequential", "interference", "ideal")
RIVALS = ("dfs", "dfs-best", "dfs-paced", "blend-paper")
CHIPS = {"a100": "A100", "h100": "H100", "h200": "H200", "b200": "B200", "l40s": "L40S"}


def section_worlds() -> str:
    path = RESULTS / "worlds.json"
    if not path.is_file():
        return ""
    record = json.loads(path.read_text())
    runs = [run for run in record["runs"] if run["terms"] == "nothing"]
    parts = [
        "## On measured kernels\n",
        f"Llama-3.1-8B, {record['requests']:,} requests (the end of a run, a few lone decodes, "
        "weighs more than in 400,000), lengths from a 1 % sample. How many times as fast ours is "
        "with the same overlap: mean over seeds (least to most; their number), which change the "
        f"traces' lengths, the sample, the system prompts and the token ids. "
        f"`{record['command']}`, commits {', '.join(sorted({run['commit'] for run in runs}))}.\n",
        (Path(__file__).parent / "measured.md").read_text(),
    ]
    for world in WORLDS:
        here = [run for run in runs if run["overlap"] == world]
        parts.append(f"### {HEADS[world]}\n")
        parts.append(_ratios(here))
    parts.append(_terms(record["runs"]))
    return "\n".join(part for part in parts if part)


HEADS = {
    "sequential": "Nothing overlaps (`sequential`): what a user of today's SGLang gets",
    "interference": "Overlap as measured by NanoFlow (`interference`)",
    "ideal": "Perfect overlap (`ideal`)",
}


def _ratios(runs: Sequence[Run]) -> str:
    head = ["chip", "trace", *(f"ours / {NAMES[name]}" for name in RIVALS)]
    head += ["DFS, of the bound", "ours, of the bound"]
    rows = []
    for chip, trace in _cells(runs):
        by_seed = _by_seed([r for r in runs if (r["chip"], r["workload"]) == (chip, trace)])
        row = [CHIPS[chip], trace]
        for name in RIVALS:
            row.append(
                _range(
                    found[name]["seconds"] / found["blend"]["seconds"]
                    for found in by_seed
                    if name in found
                )
            )
        for name in ("dfs", "blend"):
            row.append(_range((found[name]["share_of_bound"] for found in by_seed), percent=True))
        rows.append(row)
    return table(head, rows)


def _terms(runs: Sequence[Run]) -> str:
    """What each term of a step changes, on one chip, trace and seed."""
    chip, trace, seed = "a100", "trace2", 0
    here = [r for r in runs if (r["chip"], r["workload"], r["seed"]) == (chip, trace, seed)]
    names = list(dict.fromkeys(run["terms"] for run in here))
    if len(names) < 2:
        return ""
    rows = []
    for terms in names:
        row = [terms]
        for world in WORLDS:
            found = {
                run["policy"]: run["seconds"]
                for run in here
                if run["terms"] == terms and run["overlap"] == world
            }
            if {"dfs", "blend"} <= set(found):
                row += [f"{found['dfs']:,.0f} s", f"{found['dfs'] / found['blend']:.3f}"]
        if len(row) == 1 + 2 * len(WORLDS):
            rows.append(row)
    head = ["off"]
    for world in WORLDS:
        head += [f"{world}: DFS", "ours / DFS"]
    return (
        "### What each term of a step does\n\nOne term as the data sheet has it, or left out; "
        f"{CHIPS[chip]}, {trace}, one seed.\n\n" + table(head, rows)
    )


def _cells(runs: Sequence[Run]) -> list[tuple[str, str]]:
    found = {(run["chip"], run["workload"]) for run in runs}
    return sorted(found, key=lambda cell: (list(CHIPS).index(cell[0]), cell[1]))


def _by_seed(runs: Sequence[Run]) -> list[dict[str, Any]]:
    seeds = sorted({run["seed"] for run in runs if run["policy"] == "blend"})
    return [{run["policy"]: run for run in runs if run["seed"] == seed} for seed in seeds]


def _range(values: Iterable[float], percent: bool = False) -> str:
    found = list(values)
    if not found:
        return "-"
    mean, least, most = sum(found) / len(found), min(found), max(found)
    one = (lambda value: f"{value:.1%}") if percent else (lambda value: f"{value:.3f}")
    if len(found) == 1:
        return f"{one(mean)} (1)"
    return f"{one(mean)} ({one(least)} to {one(most)}; {len(found)})"
