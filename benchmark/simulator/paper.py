"""Writes docs/paper.md and its plots, and the table of kept sharing in docs/planner.md, from the
results of run.py."""

from __future__ import annotations

from pathlib import Path

from page import PAGE, ROOT, code_of_results, load
from sections_main import (
    kept_sharing,
    plot_balance,
    plot_main,
    section_baselines,
    section_grid,
    section_main,
    section_sharing,
    section_workloads,
)
from sections_more import (
    plot_interference,
    section_ablation,
    section_costs,
    section_dp,
    section_effort,
    section_grids,
    section_models,
    section_real_engine,
    section_reasoning,
    section_ruled_out,
    section_sampling,
)
from sections_worlds import section_worlds

PLANNER_PAGE = ROOT / "docs" / "planner.md"
MARKS = ("<!-- sharing -->\n", "<!-- end of sharing -->")


def page() -> str:
    """The text of docs/paper.md."""
    table2 = load("table2")
    parts = [
        "# The paper's evaluation, on the modelled engine\n",
        "Every figure here is simulated ([how](simulator.md)), but for one section; `make paper` "
        "runs it all and writes this page from `benchmark/results/simulator/`. The paper "
        "(arXiv 2411.16102) measured on GPUs, so absolute numbers differ; what is to be "
        "compared are ratios. Engine, memory test and length estimates are the same for all "
        "policies, which differ in order (and ours in the prefill of each step).\n",
        section_worlds(),
        code_of_results(),
        section_workloads(table2),
        section_main(table2),
        plot_main(table2),
        section_sharing(table2),
        section_baselines(load("policies")),
        plot_balance(table2),
        section_grid(load("grid")),
        section_grids(load("grids")),
        section_dp(load("dp"), table2),
        section_sampling(table2),
        section_ablation(load("ablation")),
        section_models(load("models")),
        section_reasoning(load("reasoning")),
        section_ruled_out(),
        section_real_engine(),
        section_costs(),
        section_effort(table2),
        "## Interference\n\nNanoFlow's table, which `interference` uses: beside a GEMM that keeps "
        "the rest of the GPU.\n\n" + plot_interference(),
        (Path(__file__).parent / "differences.md").read_text(),
    ]
    return "\n".join(part for part in parts if part)


def planner_page() -> str:
    """docs/planner.md with the table of the sharing that is kept written anew."""
    text = PLANNER_PAGE.read_text()
    before, _, rest = text.partition(MARKS[0])
    _, _, after = rest.partition(MARKS[1])
    return before + MARKS[0] + kept_sharing() + MARKS[1] + after


def main() -> None:
    PAGE.write_text(page())
    PLANNER_PAGE.write_text(planner_page())
    print(f"wrote {PAGE.relative_to(ROOT)} and the table of sharing in {PLANNER_PAGE.name}")


if __name__ == "__main__":
    main()
