"""What a GPU alone registers with SGLang, registered without one."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

REGISTER = """
from blendserve.runtime import attention, cpu_platform

cpu_platform.activate()  # SGLang can be imported; what follows believes in a GPU.
attention.needs_cpu_engine = lambda: False
from sglang.srt.plugins import load_plugins

load_plugins()
from sglang.srt.managers import scheduler
from sglang.srt.model_executor.runner.decode_cuda_graph_runner import DecodeCudaGraphRunner
from sglang.srt.utils import common

assert DecodeCudaGraphRunner.can_run_graph.__wrapped__
assert scheduler.Scheduler.__module__.startswith("blendserve")
assert scheduler.PrefillAdder.__module__.startswith("blendserve")
assert not hasattr(common.support_triton, "__wrapped__"), "for CPUs only"
"""


def test_the_graph_runner_asks_and_scheduler_and_adder_are_ours(tmp_path: Path) -> None:
    environment = {**os.environ, "BLENDSERVE_ENABLED": "1", "BLENDSERVE_BATCH_DIR": str(tmp_path)}
    done = subprocess.run(
        [sys.executable, "-c", REGISTER], env=environment, capture_output=True, text=True,
        timeout=300,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3_000:]
