"""The GPU campaign's driver: what a step that hangs or crashes costs, and a dry run on a CPU."""

from __future__ import annotations

import itertools
import json
import resource
import sys
from pathlib import Path
from typing import Any

import pytest

from blendserve.planner import MODEL_SPECS, hardware, step_costs

HERE = Path(__file__).parents[2] / "benchmark" / "gpu"
sys.path.insert(0, str(HERE))

import campaign  # noqa: E402
import kernel_times  # noqa: E402
from campaign import Step  # noqa: E402

DRY_RUN_SECONDS = 120.0

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


def made_up_costs() -> list[dict[str, Any]]:
    """Rows of the step `costs`, of a chip of 100 TFLOP/s and 1 TB/s that reaches them."""
    rows: list[dict[str, Any]] = [
        {"kind": "gemm", "n": n, "k": k, "tokens": tokens,
         "seconds": max(2 * n * k * tokens / 1e14, 2 * n * k / 1e12)}
        for n, k in itertools.product((4096, 6144, 28672), (4096, 14336))
        for tokens in (1, 128, 8192)
    ]  # fmt: skip
    for requests, tokens in ((1, 512), (64, 512), (1, 8192)):  # 64 x 8192 was not measured
        seconds = requests * tokens * 4096 / 1e12
        rows.append({"kind": "decode", "requests": requests, "tokens": tokens, "seconds": seconds})
    for tokens in (256, 8192):
        seconds = 2 * 4096 * tokens**2 / 1e14
        rows.append({"kind": "prefill", "requests": 1, "tokens": tokens, "seconds": seconds})
    return rows


def test_the_engine_model_reads_the_measured_step_costs(tmp_path: Path) -> None:
    heads = (32, 8, 128, 0)
    kernel_times.tables(made_up_costs(), heads, "a test", "made up").save(tmp_path / "kernels.npz")
    ceilings = tmp_path / "ceilings.jsonl"
    ceilings.write_text('{"copy_gb_s": 1000.0, "gemm_tflop_s": 100.0}')
    found = campaign.measured_hardware(ceilings, {"device": "a test", "memory_bytes": 8e10})
    found["hardware"]["kernels"] = "kernels.npz"
    (tmp_path / "hardware.json").write_text(json.dumps(found))
    device = hardware(str(tmp_path / "hardware.json"))
    costs = step_costs(MODEL_SPECS["llama-3.1-8b"], device)
    assert costs.source == "a test, measured: measured (made up)"
    weights = 32 * (4096 * 6144 + 4096 * 4096 + 4096 * 28672 + 14336 * 4096)
    gemms = 2 * weights * 8192 / 1e14
    # Beside them only the small operators.
    assert gemms < costs.token_seconds(8192) < 1.1 * gemms
    # Between and beyond what was measured; each layer of 32.
    (attention,) = costs.attention
    assert attention.decode.at(64, 64 * 8192) == pytest.approx(
        32 * 64 * 8192 * 4096 / 1e12, rel=0.01
    )
    assert attention.prefill.at(1, 8192**2) == pytest.approx(
        32 * 2 * 4096 * 8192**2 / 1e14, rel=0.01
    )


def test_a_dry_run_goes_through_every_step_without_a_gpu(tmp_path: Path) -> None:
    pytest.importorskip("triton")
    out = tmp_path / "out"
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    assert campaign.main(["--out", str(out), "--dry-run"]) == 0, (out / "campaign.json").read_text()
    spent = resource.getrusage(resource.RUSAGE_CHILDREN)
    # Two cores are idle half of the time; how busy the machine is does not count.
    assert spent.ru_utime + spent.ru_stime - before.ru_utime - before.ru_stime < DRY_RUN_SECONDS
    summary = json.loads((out / "campaign.json").read_text())
    assert "dry run" in summary["device"]["device"]
    assert list(summary["steps"]) == [step.name for step in campaign.STEPS]
    assert all(step["rows"] for step in summary["steps"].values())
    rows = [json.loads(line) for line in (out / "shared.jsonl").read_text().splitlines()]
    assert {row["part"] for row in rows} == {"groups", "no-groups"}
    # Its figures are of an interpreter, but can be read.
    costs = step_costs(MODEL_SPECS["llama-3.1-8b"], hardware(str(out / "hardware.json")))
    assert "benchmark/gpu/campaign.py" in costs.source
