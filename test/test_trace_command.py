"""`blendserve trace` on files as the scheduler writes them."""

from __future__ import annotations

import math
from pathlib import Path
from types import SimpleNamespace

import msgspec
import pytest

from blendserve.cli import main
from blendserve.runtime.trace import StepTrace, TraceStep


def step(number: int, compute: float, memory: float) -> bytes:
    line = TraceStep(
        step=number,
        seconds=number / 2,
        prefill_requests=1,
        prefill_tokens=10,
        prefill_context_tokens=100,
        prefill_pairs=1900,
        decode_requests=3,
        decode_context_tokens=300,
        compute_seconds=compute,
        memory_seconds=memory,
        left_tokens=50.0,
        right_tokens=60.0,
        free_tokens=1000,
        target_density=1.0,
    )
    return msgspec.json.encode(line) + b"\n"


@pytest.fixture
def trace(tmp_path: Path) -> Path:
    path = tmp_path / "steps.jsonl"
    path.write_bytes(step(1, 4.0, 1.0) + step(2, 1.0, 2.0) + step(3, 3.0, 3.0))
    return path


def test_the_summary_adds_up(trace: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["trace", str(trace)]) == 0
    out = capsys.readouterr().out
    assert "3 steps in 1.0 s: 30 prompt tokens, 9 output tokens" in out
    assert "compute 8.0, memory 6.0" in out
    assert (
        "one after the other 14.0; overlapped within each step 9.0; if all steps were alike 8.0"
        in out
    )


def test_the_plot_is_a_png(trace: Path, tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    assert main(["trace", str(trace), "--plot", str(tmp_path / "out.png")]) == 0
    assert (tmp_path / "out.png").read_bytes().startswith(b"\x89PNG")


def test_the_cut_off_last_line_of_a_killed_server_is_left_out(
    trace: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    trace.write_bytes(trace.read_bytes()[:-20])
    assert main(["trace", str(trace)]) == 0
    assert "2 steps" in capsys.readouterr().out


def test_a_step_after_which_no_memory_work_is_left_is_read(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Its density is infinite, which JSON cannot say."""
    scheduler = SimpleNamespace(
        blend_pace=SimpleNamespace(seconds=lambda tokens, context: (1.0, 0.0)),
        blend=SimpleNamespace(account=SimpleNamespace(left_tokens=5.0, right_tokens=0.0)),
        blend_report=SimpleNamespace(steps=1),
        blend_policy=SimpleNamespace(target_density=math.inf),
        token_to_kv_pool_allocator=SimpleNamespace(available_size=lambda: 10),
        tree_cache=SimpleNamespace(evictable_size=lambda: 0),
    )
    request = SimpleNamespace(origin_input_ids=[1, 2], output_ids=[])
    batch = SimpleNamespace(
        reqs=[request],
        prefix_lens=[0],
        extend_lens=[2],
        decoding_reqs=None,
        forward_mode=SimpleNamespace(is_decode=lambda: False),
    )
    StepTrace(tmp_path / "steps.jsonl").step(scheduler, batch, prefilled=2, decoded=0)
    assert main(["trace", str(tmp_path / "steps.jsonl")]) == 0
    assert "2 prompt tokens" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("content", "message"),
    [(b"", "has no steps"), (b'{"a": 1}\n' + step(1, 1, 1), "line 1"), (b"\xff\xfe\n", "line 1")],
)
def test_what_is_no_trace_is_named(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], content: bytes, message: str
) -> None:
    path = tmp_path / "other.txt"
    path.write_bytes(content)
    assert main(["trace", str(path)]) == 2
    assert message in capsys.readouterr().err


def test_a_missing_file_is_an_error_and_no_traceback(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["trace", "nowhere.jsonl"]) == 2
    assert "nowhere.jsonl" in capsys.readouterr().err
