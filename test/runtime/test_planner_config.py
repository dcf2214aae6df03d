"""What the plan of a server's jobs counts as memory traffic."""

from __future__ import annotations

from types import SimpleNamespace

import pytest

from blendserve.config import Settings
from blendserve.runtime import executor
from blendserve.runtime.executor import planner_config


@pytest.mark.parametrize(
    ("backend", "device", "built", "shared"),
    [
        ("blend", "cpu", True, 4_096),
        ("blend", "cuda", False, 4_096),
        ("blend", "cpu", False, None),  # computes as torch_native
        ("torch_native", "cpu", True, None),
        ("flashinfer", "cuda", True, None),
    ],
)
def test_reads_are_counted_as_the_attention_makes_them(
    monkeypatch: pytest.MonkeyPatch, backend: str, device: str, built: bool, shared: int | None
) -> None:
    reason = None if built else "no compiler"
    monkeypatch.setattr(executor.cpu, "unavailable_reason", lambda: reason)
    args = SimpleNamespace(attention_backend=backend, device=device, dp_size=2)
    settings = Settings(sample_fraction=0.02)
    config = planner_config(args, settings, 4_096)
    assert config.shared_decode_tokens == shared
    assert config.sample_fraction == 0.02
    assert config.kv_tokens == 2 * 4_096
    unknown = planner_config(args, settings, None)
    assert unknown.shared_decode_tokens is None
    assert unknown.kv_tokens is None
