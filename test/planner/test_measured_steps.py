"""Steps of an engine, fitted from a trace and read from a hardware file."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from blendserve.planner import (
    MODEL_SPECS,
    CostModel,
    HardwareError,
    UnusableSteps,
    fit_steps,
    hardware,
)

MODEL = MODEL_SPECS["smollm2-135m"]
STEPS: dict[str, Any] = {
    "model": "smollm2-135m",
    "total_params": int(MODEL.total_params),
    "layers": MODEL.shape.num_layers,
    "ranks": 1,
    "token_seconds": 1e-3,
    "pair_seconds": 1e-7,
    "context_seconds": 1e-5,
    "weight_seconds": 0.02,
    "error": 0.1,
    "steps": 200,
}
FIGURES = {"compute_flops": 2e11, "bandwidth_bytes": 2e10, "memory_bytes": 16e9}


def file_of(folder: Path, *steps: Any) -> str:
    path = folder / "this.json"
    path.write_text(json.dumps({**FIGURES, "name": "this", "steps": list(steps)}))
    return str(path)


def test_a_fit_finds_the_terms_that_made_the_steps() -> None:
    rng = np.random.default_rng(0)
    prefill = np.where(rng.random(300) < 0.3, rng.integers(20, 512, 300), 0)
    decodes = np.where(prefill > 0, 0, rng.integers(1, 40, 300))
    work = np.column_stack((prefill + decodes, decodes * 200, prefill * prefill)).astype(float)
    seconds = np.maximum(0.02, work[:, 0] * 1e-3) + work[:, 1] * 1e-6 + work[:, 2] * 1e-7
    # A few steps are no steps alone.
    seconds[::50] *= 10
    found = fit_steps(seconds * rng.normal(1, 0.001, 300), work)
    assert found.weight_seconds == pytest.approx(0.02, rel=0.1)
    assert found.token_seconds == pytest.approx(1e-3, rel=0.1)
    assert found.context_seconds == pytest.approx(1e-6, rel=0.2)
    assert found.pair_seconds == pytest.approx(1e-7, rel=0.2)
    assert found.left_out == 6
    assert found.mean_error < 0.03


def test_too_few_steps_say_nothing() -> None:
    with pytest.raises(UnusableSteps, match="too few"):
        fit_steps(np.ones(3), np.ones((3, 3)))


def test_plans_take_the_steps_that_were_measured_with_their_model(tmp_path: Path) -> None:
    chip = hardware(file_of(tmp_path, STEPS))
    assert not chip.guess
    costs = CostModel.attained(MODEL, chip).step_costs
    assert "200 steps of an engine, measured with smollm2-135m" in costs.source
    assert costs.token_seconds(1) == pytest.approx(0.02)
    assert costs.token_seconds(100) == pytest.approx(0.1)
    assert costs.decode_seconds(1, 300) == pytest.approx(3e-3)
    other = CostModel.attained(MODEL_SPECS["llama-3.1-8b"], chip).step_costs
    assert "measured with" not in other.source


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"token_seconds": -1.0}, "token_seconds is -1.0"),
        ({"token_seconds": 0}, "must be above 0"),
        ({"layers": 1.5}, "layers is 1.5"),
        ({"weight_seconds": "much"}, "weight_seconds is 'much'"),
        ({"more": 1}, "each entry is an object with"),
    ],
)
def test_steps_that_cannot_be_right_are_refused(
    tmp_path: Path, change: dict[str, Any], said: str
) -> None:
    with pytest.raises(HardwareError, match=said) as refused:
        hardware(file_of(tmp_path, {**STEPS, **change}))
    assert "blendserve calibrate" in str(refused.value)


def test_a_description_of_an_engine_keeps_its_steps(tmp_path: Path) -> None:
    from dataclasses import asdict

    from blendserve.planner import Hardware

    chip = hardware(file_of(tmp_path, STEPS))
    assert Hardware.from_dict(json.loads(json.dumps(asdict(chip)))) == chip
