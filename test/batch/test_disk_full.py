"""A disk that really is full: a small tmpfs in a name space of its own, where that is allowed.

The same failures, injected, are tested everywhere in test_batch_recovery.py.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

VICTIM = Path(__file__).with_name("disk_full_victim.py")
MOUNT = "mount -t tmpfs -o size=4m tmpfs"


def in_own_name_space(script: str) -> list[str]:
    return ["unshare", "--user", "--map-root-user", "--mount", "sh", "-c", script]


def can_mount(folder: Path) -> bool:
    if shutil.which("unshare") is None:
        return False
    tried = subprocess.run(
        in_own_name_space(f"{MOUNT} '{folder}'"), capture_output=True, check=False, timeout=20
    )
    return tried.returncode == 0


def test_a_job_waits_for_space_publishes_nothing_half_and_then_finishes(tmp_path: Path) -> None:
    if not can_mount(tmp_path):
        pytest.skip("this user may not mount a tmpfs in a name space of its own")
    run = subprocess.run(
        in_own_name_space(f"{MOUNT} '{tmp_path}' && '{sys.executable}' '{VICTIM}' '{tmp_path}'"),
        capture_output=True,
        text=True,
        timeout=100,
        check=False,
        env={**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path))},
    )
    assert run.returncode == 0, run.stderr
    seen = json.loads(run.stdout)
    assert "No space left on device" in seen["note"]
    assert 0 < seen["done_when_full"] < 600
    # The input, and no part of a result.
    assert (seen["files_when_full"], seen["files_when_full_again"]) == (1, 1)
    assert seen["status_when_full_again"] == "finalizing"
    assert sorted(seen["ids"]) == sorted(f"r{i}" for i in range(600))
