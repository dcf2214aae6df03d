"""Whose an output is, and in which order a job's results appear and its state goes."""

from __future__ import annotations

import os
import shutil
import sys
from pathlib import Path

import pytest
from run_process import FAKES, jsonl, lines

from blendserve.cli import main, offline_job, run_state
from blendserve.cli.run_state import RunState, StateBusy


def test_one_at_a_time_has_the_state(tmp_path: Path) -> None:
    folder = tmp_path / "out.blendserve"
    with RunState(folder):
        with pytest.raises(StateBusy, match=f"process {os.getpid()}"), RunState(folder):
            pass
        # No file in it is the lock.
        for path in folder.iterdir():
            path.unlink()
        with pytest.raises(StateBusy), RunState(folder):
            pass
    with RunState(folder):
        pass


def test_a_state_that_another_run_has_just_removed_is_made_again(tmp_path: Path) -> None:
    folder = tmp_path / "out.blendserve"
    with RunState(folder) as first:
        first.remove()
        with RunState(folder) as second:
            assert folder.is_dir()
            second.remove()
    assert list(tmp_path.iterdir()) == []


def test_what_is_set_aside_is_kept_until_the_end(tmp_path: Path) -> None:
    folder = tmp_path / "out.blendserve"
    for text in ("first", "second"):
        with RunState(folder) as state:
            state.set_aside()
            (folder / "journal").write_text(text)
    with RunState(folder) as state:
        state.set_aside()
        assert not (folder / "journal").exists()
        kept = {path.parent.name: path.read_text() for path in folder.glob("*/journal")}
        assert kept == {"replaced-0": "first", "replaced-1": "second"}
        state.remove()
    assert not folder.exists()


def test_a_removal_that_is_cut_short_leaves_no_state(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tmp_path / "out.blendserve"
    with RunState(folder) as state:
        (folder / "journal").write_text("x")
        monkeypatch.setattr(shutil, "rmtree", lambda path, **_: None)
        state.remove()
        monkeypatch.undo()
    assert not folder.exists()
    assert len(list(tmp_path.iterdir())) == 1
    with RunState(folder):
        assert [path.name for path in tmp_path.iterdir()] == ["out.blendserve"]


def test_results_are_durable_before_the_state_goes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "elsewhere").mkdir()
    source = tmp_path / "in.jsonl"
    source.write_bytes(jsonl(lines(3, {1: "fail"})))
    steps: list[str] = []

    def note(name: str, place: object) -> None:
        steps.append(f"{name} {Path(str(place)).name}")

    replace, fsync = os.replace, offline_job.fsync_folder
    monkeypatch.setattr(os, "replace", lambda a, b: (note("replace", b), replace(a, b))[1])
    monkeypatch.setattr(offline_job, "fsync_folder", lambda f: (note("fsync", f), fsync(f))[1])
    monkeypatch.setattr(run_state, "fsync_folder", lambda f: (note("fsync", f), fsync(f))[1])
    command = (sys.executable, str(FAKES / "fake_engine.py"))
    monkeypatch.setattr(offline_job, "ENGINE_COMMAND", command)
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join(filter(None, sys.path)))
    errors = tmp_path / "elsewhere" / "bad.jsonl"
    flags = ["--errors", str(errors), "--served-model-name", "fake-model"]
    assert main(["run-batch", "-i", str(source), "-o", str(tmp_path / "out.jsonl"), *flags]) == 1
    assert errors.exists()
    begin = steps.index("replace out.jsonl")
    assert steps[begin:] == [
        "replace out.jsonl",
        f"fsync {tmp_path.name}",
        "replace bad.jsonl",
        "fsync elsewhere",
        "replace .out.jsonl.blendserve.ended",
        f"fsync {tmp_path.name}",
    ]
