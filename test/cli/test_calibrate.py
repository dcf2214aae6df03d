"""``blendserve calibrate``: what it refuses, the job that it runs, the file that it writes."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from blendserve.cli import calibrate, main
from blendserve.planner import MODEL_SPECS, StepTerms, hardware
from blendserve.runtime.ceilings import Ceilings

SPEC = MODEL_SPECS["smollm2-135m"]
CEILINGS = Ceilings("this", "bfloat16", 2e11, 2e10, 16e9)
TERMS = StepTerms(1e-3, 1e-7, 1e-5, 0.02, 0.99, 0.05, 200, 1)


@pytest.mark.parametrize("name", ["hw.txt", "missing/hw.json", ""])
def test_an_output_that_cannot_be_is_refused_before_anything_is_measured(
    tmp_path: Path, name: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["calibrate", "-o", str(tmp_path / name)]) == 2
    assert "a .json file in a folder that exists" in capsys.readouterr().err


def test_a_file_that_is_none_is_not_overwritten(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "hw.json"
    path.write_text("my notes")
    assert main(["calibrate", "-o", str(path)]) == 2
    assert "not valid JSON" in capsys.readouterr().err
    assert path.read_text() == "my notes"


def test_the_job_differs_in_all_that_a_step_costs_and_fits_the_model() -> None:
    lines = list(calibrate._lines(SPEC))
    prompts = [line["body"]["prompt"] for line in lines]
    outputs = [line["body"]["max_tokens"] for line in lines]
    assert len({tuple(prompt) for prompt in prompts}) == len(prompts)
    assert max(map(len, prompts)) > 1_000 > 100 > min(map(len, prompts))
    assert max(outputs) > 100 > 3 > min(outputs)
    assert all(max(prompt) < SPEC.shape.vocab_size for prompt in prompts)


def test_a_file_of_another_model_keeps_its_steps(tmp_path: Path) -> None:
    path = tmp_path / "hw.json"
    first = calibrate._as_measured(TERMS, "one", SPEC, 1)
    second = calibrate._as_measured(TERMS, "other", MODEL_SPECS["llama-3.1-8b"], 2)
    calibrate._write(path, CEILINGS, [first])
    calibrate._write(path, CEILINGS, [second, *hardware(str(path)).steps])
    found = hardware(str(path))
    assert [steps.model for steps in found.steps] == ["other", "one"]
    assert (found.name, found.bandwidth_bytes, found.attained) == ("this", 2e10, True)
    assert json.loads(path.read_text())["steps"][0]["ranks"] == 2
    assert [entry.name for entry in tmp_path.iterdir()] == ["hw.json"]
