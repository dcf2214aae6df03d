"""`blendserve trace` on files as the scheduler writes them."""

from __future__ import annotations

from pathlib import Path

import msgspec
import pytest

from blendserve.cli import main
from blendserve.runtime.trace import TraceStep


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
