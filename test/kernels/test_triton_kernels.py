"""The Triton kernels against the float64 reference, in Triton's interpreter.

The interpreter has to be chosen before Triton is imported, so a process of its own runs each part;
on a machine with a GPU the same cases run there, compiled.
"""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("triton")

HERE = Path(__file__).parent


def run_cases(*arguments: str) -> str:
    process = subprocess.run(
        [sys.executable, str(HERE / "triton_cases.py"), *arguments],
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert process.returncode == 0, process.stdout + process.stderr
    return process.stdout


@pytest.mark.parametrize("first", [0, 150])
def test_random_batches_equal_the_reference(first: int) -> None:
    assert "150 cases" in run_cases("--first", str(first), "--count", "150")


def test_half_precision_stays_within_its_precision() -> None:
    assert "10 cases" in run_cases("--count", "10", "--dtype", "bfloat16")
    assert "10 cases" in run_cases("--count", "10", "--dtype", "float16")
