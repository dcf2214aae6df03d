"""What the slow targets of the Makefile said last: all went well, and the code is still that."""

from __future__ import annotations

import re
import sys
from pathlib import Path

import pytest

TESTS = Path(__file__).parents[1]
LOGS = TESTS / "logs"
sys.path[:0] = [str(TESTS / "gpu"), str(TESTS / "end_to_end")]

import cuda_imports  # noqa: E402
import flashinfer_workspace  # noqa: E402
import overlap_engines  # noqa: E402

from sgl_kernel_ext.batch import AttentionShape  # noqa: E402
from sgl_kernel_ext.gpu.flashinfer_steps import plan_bytes  # noqa: E402


def said(name: str) -> list[str]:
    return (LOGS / name).read_text().splitlines()


def test_flashinfers_planner_never_asked_for_more_than_it_is_given() -> None:
    """`make test-flashinfer-workspace`; the sizes are those of today's formula."""
    *lines, last = said("flashinfer-workspace.log")
    assert last == "0 over"
    logged = {}
    for line in lines:
        found = re.fullmatch(r"(.+), (\d+) multiprocessors: (\d+) of (\d+) in \d+ steps", line)
        assert found is not None, line
        logged[found[1], int(found[2])] = int(found[3]), int(found[4])
    models, chips = flashinfer_workspace.MODELS, flashinfer_workspace.CHIPS
    assert set(logged) == {(model, chip) for model in models for chip in chips}
    for (model, chip), (most, bound) in logged.items():
        assert most <= bound == plan_bytes(AttentionShape(*models[model], scale=1.0), chip)


def test_every_engine_answered_as_stock_does() -> None:
    """`make test-overlap`"""
    *lines, last = said("overlap-engines.log")
    assert last == "0 sides with faults"
    assert [line.partition(":")[0] for line in lines] == [s.name for s in overlap_engines.SIDES]
    count = len(overlap_engines.requests())
    assert all(f": {count} of {count} as stock" in line for line in lines)


def test_the_cuda_wheels_took_everything_of_ours() -> None:
    """`make test-cuda-imports`"""
    *lines, last = said("cuda-imports.log")
    assert last == "0 failed"
    ended = [line for line in lines if not line.startswith(" ")]
    assert [re.sub(r": ok, \d+ s$", "", line) for line in ended] == [
        check.name for check in cuda_imports.checks()
    ]


def test_a_job_outlived_a_node_of_ray_and_its_own_front() -> None:
    """`make test-ray`"""
    *lines, last = said("ray-nodes.log")
    assert last.endswith("stopped: no engine stayed behind")
    assert sum("400 lines, each answered once" in line for line in lines) == 2


@pytest.mark.parametrize("log", sorted(LOGS.iterdir()), ids=lambda path: path.name)
def test_no_log_names_the_machine_it_is_from(log: Path) -> None:
    assert not re.search(r"/(home|root|tmp|work|usr|opt)/", log.read_text())
