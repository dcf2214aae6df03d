"""`blendserve doctor`: what it finds on machines that are only pretended."""

from __future__ import annotations

import json
import subprocess
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from blendserve.cli import doctor
from blendserve.cli.doctor import Finding
from blendserve.runtime import cpu_platform, device
from blendserve.runtime.device import Gpu

SHOWN = {
    "device": "cuda", "enable_mixed_chunk": True, "disable_overlap_schedule": False,
    "radix_cache_backend": "blendserve", "attention_backend": "fa3", "ranks": 8, "nnodes": 1,
}  # fmt: skip


@pytest.fixture
def gpu_machine(monkeypatch: pytest.MonkeyPatch) -> pytest.MonkeyPatch:
    """One H200 with everything in place; SGLang's answer is as it would be."""
    gpu = Gpu("NVIDIA H200", (9, 0), 132, 1.98e9, 3.2e9, 6144, 141 * 10**9)
    monkeypatch.setattr(device, "first_gpu", lambda: gpu)
    monkeypatch.setattr(cpu_platform, "needs_cpu_engine", lambda: False)
    monkeypatch.setattr(doctor, "driver_versions", lambda: ("580.65", "13.0"))
    monkeypatch.setattr(doctor, "visible_gpus", lambda: 8)
    monkeypatch.setattr(doctor.shutil, "which", lambda tool: f"/usr/bin/{tool}")
    monkeypatch.delenv("SGLANG_USE_CPU_ENGINE", raising=False)
    answer(monkeypatch, stdout=f"noise\n{doctor.MARK}{json.dumps(SHOWN)}\n")
    return monkeypatch


def answer(monkeypatch: pytest.MonkeyPatch, **said: Any) -> None:
    done = SimpleNamespace(**{"returncode": 0, "stdout": "", "stderr": "", **said})
    monkeypatch.setattr(subprocess, "run", lambda command, **_: done)


def failing() -> list[Finding]:
    return [finding for finding in doctor.examine([]) if finding.fails]


def test_a_machine_with_everything_is_told_what_is_used_and_why(
    gpu_machine: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert doctor.main(["--tp", "8"]) == 0
    said = capsys.readouterr().out
    for part in (
        *("NVIDIA 580.65, for CUDA up to 13.0", "NVIDIA H200", "4800 GB/s", "fa3"),
        *("next step is scheduled while the GPU", "would start with these flags"),
    ):
        assert part in said


def test_what_is_missing_fails_with_a_remedy(gpu_machine: pytest.MonkeyPatch) -> None:
    gpu_machine.setattr(doctor.shutil, "which", lambda tool: None)
    gpu_machine.setattr(doctor, "_in_toolkit", lambda tool: None)
    gpu_machine.setattr(doctor, "visible_gpus", lambda: 4)
    found = {finding.name: finding.text for finding in failing()}
    assert set(found) == {"nvcc", "ninja", "ranks"}
    assert "install the CUDA toolkit" in found["nvcc"]
    assert found["ranks"] == "8 GPUs are asked for on this node, 4 are usable"


def test_a_gpu_that_pytorch_cannot_use_fails(gpu_machine: pytest.MonkeyPatch) -> None:
    """An old driver: SGLang's CPU engine would start instead."""
    gpu_machine.setattr(cpu_platform, "needs_cpu_engine", lambda: True)
    (found,) = failing()
    assert found.name == "driver"
    assert "update the driver" in found.text
    gpu_machine.setenv("SGLANG_USE_CPU_ENGINE", "1")
    assert failing() == []


def test_the_last_word_of_a_process_that_could_not_resolve_is_told(
    gpu_machine: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    answer(gpu_machine, returncode=1, stderr="a warning\nblendserve: --disaggregation-mode: ...\n")
    assert doctor.main(["--json"]) == 1
    said = json.loads(capsys.readouterr().out)
    assert [row["text"] for row in said if row["fails"]] == [
        "blendserve: --disaggregation-mode: ..."
    ]


def test_without_a_gpu_the_cpu_engine_serves(monkeypatch: pytest.MonkeyPatch) -> None:
    if torch.cuda.is_available():
        pytest.skip("this machine has a GPU")
    answer(monkeypatch, stdout=doctor.MARK + json.dumps({**SHOWN, "device": "cpu"}))
    found = {finding.name: finding for finding in doctor.examine([])}
    assert not any(finding.fails for finding in found.values())
    assert "CPU engine serves" in found["device"].text
    assert found["figures"].text.startswith("cpu: ")


TINY = {
    "architectures": ["LlamaForCausalLM"], "model_type": "llama", "hidden_size": 32,
    "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2,
    "num_key_value_heads": 1, "head_dim": 16, "vocab_size": 1_000, "max_position_embeddings": 4_096,
    "rms_norm_eps": 1e-5, "bos_token_id": 1, "eos_token_id": 2, "torch_dtype": "float32",
}  # fmt: skip


def test_sglang_itself_is_asked_and_its_answer_is_the_exit_status(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "config.json").write_text(json.dumps(TINY))
    flags = ["--model-path", str(tmp_path), "--load-format", "dummy", "--skip-tokenizer-init"]
    assert doctor.main(["--json", *flags, "--disaggregation-mode", "prefill"]) == 1
    said = {row["name"]: row["text"] for row in json.loads(capsys.readouterr().out)}
    assert said["flags"].startswith("blendserve: --disaggregation-mode")
    assert "--enable-pdmux" in said["flags"]
    assert doctor.main(["--json", *flags, "--schedule-p", "lpm"]) == 0
    said = {row["name"]: row["text"] for row in json.loads(capsys.readouterr().out)}
    assert "schedule_policy lpm" in said["flags"]
