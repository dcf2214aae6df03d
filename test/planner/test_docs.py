"""The worked example in docs/planner.md, recomputed."""

from pathlib import Path

import numpy as np
import pytest
from planner_workloads import LLAMA_ON_A100

from blendserve.planner import DualScanner, Job, Side, make_plan, partition_memory

DOC = Path(__file__).parents[2] / "docs" / "planner.md"


def table(heading):
    """Rows below the table header that starts with this cell."""
    lines = DOC.read_text(encoding="utf-8").splitlines()
    start = next(k for k, line in enumerate(lines) if line.startswith(f"| {heading} |"))
    rows = []
    for line in lines[start + 2 :]:
        if not line.startswith("|"):
            break
        rows.append([cell.strip() for cell in line.strip("|").split("|")])
    return rows


@pytest.fixture(scope="module")
def example():
    rows = table("request")
    prefix = np.arange(600)
    ids = []
    for k, (name, p, *_) in enumerate(rows):
        tail = np.arange(int(p)) + 10_000 * (k + 1)
        ids.append(np.concatenate((prefix, tail))[: int(p)] if name in "AB" else tail)
    outputs = np.array([int(row[2]) for row in rows])
    job = Job(ids, np.full(len(rows), 20_000), outputs)
    return rows, job, make_plan(job, LLAMA_ON_A100)


def test_the_requests_of_the_worked_example(example):
    rows, job, plan = example
    shared_compute = dict(zip(plan.order.tolist(), plan.compute_seconds, strict=True))
    for request, (name, p, d, *printed) in enumerate(rows):
        assert len(job.token_ids[request]) == int(p)
        found = [
            float(LLAMA_ON_A100.compute_seconds(int(p), int(d))) * 1e3,
            float(LLAMA_ON_A100.memory_seconds(int(p), int(d))) * 1e3,
            float(LLAMA_ON_A100.density(int(p), int(d))),
            shared_compute[request] * 1e3,
            plan.request_density[request],
        ]
        for value, text in zip(found, printed, strict=True):
            decimals = len(text.partition(".")[2])
            assert round(float(value), decimals) == float(text), (name, text, value)


def test_the_figures_of_the_worked_example(example):
    rows, _, plan = example
    scanner = DualScanner(plan)
    left, _ = partition_memory(
        100_000, scanner.target_density, scanner.density(Side.LEFT), scanner.density(Side.RIGHT)
    )
    printed = dict(table("figure"))
    assert printed == {
        "order": " ".join(rows[r][0] for r in plan.order),
        "prompt tokens": str(plan.prompt_tokens),
        "unique tokens": str(plan.unique_tokens),
        "sharing": f"{plan.sharing_planned:.4f}",
        "target density": f"{plan.target_density:.3f}",
        "M_L of 100000 tokens": f"{left:.1f}",
    }
