"""Results that were asked for have the mode of the user's other files; the state is private."""

from __future__ import annotations

import os
import stat
from pathlib import Path

import pytest

from blendserve.cli.offline_job import _place


@pytest.mark.parametrize(("umask", "mode"), [(0o022, 0o644), (0o077, 0o600), (0o002, 0o664)])
def test_a_placed_result_has_the_umask_of_its_user(tmp_path: Path, umask: int, mode: int) -> None:
    source, target = tmp_path / "state", tmp_path / "out.jsonl"
    source.write_text("answers")
    source.chmod(0o600)
    before = os.umask(umask)
    try:
        _place(source, target)
    finally:
        os.umask(before)
    assert stat.S_IMODE(target.stat().st_mode) == mode
    assert target.read_text() == "answers"
