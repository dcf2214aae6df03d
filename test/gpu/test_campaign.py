"""The GPU campaign's driver: what a step that hangs or crashes costs, and a dry run on a CPU."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest

HERE = Path(__file__).parents[2] / "benchmark" / "gpu"
sys.path.insert(0, str(HERE))

import campaign  # noqa: E402
from campaign import Step  # noqa: E402

WRITES = """
import json, os, pathlib, subprocess, sys, time
rows = pathlib.Path(sys.argv[-1]) / "{name}.jsonl"
rows.write_text(json.dumps(dict(copy_gb_s=2.0, gemm_tflop_s=3.0)) + "\\n")
{then}
"""
HANGS = """
child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"])
(rows.parent / "child").write_text(str(child.pid))
time.sleep(600)
"""


def script(folder: Path, name: str, then: str, seconds: float = 60.0) -> Step:
    path = folder / f"{name}.py"
    path.write_text(WRITES.format(name=name, then=then))
    return Step(name, seconds, (str(path),))


def test_a_step_that_hangs_or_crashes_costs_only_itself(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(campaign, "described", lambda out, environment: {"device": "a test"})
    out = tmp_path / "out"
    steps = [
        script(tmp_path, "hangs", HANGS, seconds=5.0),
        script(tmp_path, "crashes", "os.abort()"),
        script(tmp_path, "ceilings", "print('the last word')"),
    ]
    assert campaign.run(steps, out, {}, 600) == 1
    summary = json.loads((out / "campaign.json").read_text())["steps"]
    assert summary["hangs"]["status"] == "stopped after 5 s"
    assert summary["crashes"]["status"] == "ended with status -6"
    assert summary["ceilings"]["status"] == "done"
    assert summary["ceilings"]["last_words"] == ["the last word"]
    # What each had written is kept, and what it had started is gone.
    assert [step["rows"] for step in summary.values()] == [1, 1, 1]
    child = (out / "child").read_text()
    stat = Path(f"/proc/{child}/stat")
    assert not stat.exists() or stat.read_text().split()[2] == "Z"
    measured = json.loads((out / "hardware.json").read_text())["hardware"]
    assert (measured["compute_flops"], measured["bandwidth_bytes"]) == (3e12, 2e9)


def test_what_does_not_fit_into_the_time_is_not_begun(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(campaign, "described", lambda out, environment: {})
    assert campaign.run([script(tmp_path, "late", "")], tmp_path / "out", {}, 5.0) == 1
    assert not (tmp_path / "out" / "late.jsonl").exists()


def test_the_steps_fit_and_the_most_valuable_come_first() -> None:
    names = [step.name for step in campaign.STEPS]
    assert names[:3] == ["runs", "ceilings", "decode"]
    assert len(set(names)) == len(names)
    # At their limits they need a little more than the ten minutes: most end long before.
    assert sum(step.seconds for step in campaign.STEPS) < 15 * 60


def test_a_dry_run_writes_rows_without_a_gpu(tmp_path: Path) -> None:
    pytest.importorskip("triton")
    out = tmp_path / "out"
    arguments = ["--out", str(out), "--dry-run", "--steps", "ceilings", "shared"]
    assert campaign.main(arguments) == 0, (out / "shared.log").read_text()
    rows = [json.loads(line) for line in (out / "shared.jsonl").read_text().splitlines()]
    assert {row["part"] for row in rows} == {"groups", "no-groups"}
    assert "dry run" in json.loads((out / "campaign.json").read_text())["device"]["device"]
