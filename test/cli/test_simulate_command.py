"""``blendserve simulate``: its output, its files, and what it says to wrong input."""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import pytest

from blendserve.cli import main

BASE = ["simulate", "--model-spec", "llama-3.1-8b", "--hardware", "a100-80g-sxm"]
KEYS = [
    "policy",
    "overlap",
    "requests",
    "tokens",
    "seconds",
    "throughput",
    "bound_seconds",
    "share_of_bound",
    "sharing",
    "sharing_best",
    "retractions",
    "steps",
]


@pytest.fixture
def job(tmp_path: Path) -> Path:
    path = tmp_path / "job.jsonl"
    lines = [
        {"id": str(k), "input_ids": [7] * 40 + [k] * (20 + k), "output_len": 1 + k * k}
        for k in range(30)
    ]
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return path


def test_json_has_one_object_per_policy(job: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([*BASE, "--workload", str(job), "--policy", "all", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert [run["policy"] for run in found][:3] == ["fcfs", "random", "dfs"]
    assert len(found) == 10
    for run in found:
        assert list(run) == KEYS
        assert run["requests"] == 30
        assert run["tokens"] == sum(60 + k + 1 + k * k for k in range(30))
        assert run["throughput"] == pytest.approx(run["tokens"] / run["seconds"])
        assert 0 < run["share_of_bound"] <= 1


def test_a_table_of_lengths_is_a_workload(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "lengths.csv"
    path.write_text("TIMESTAMP,ContextTokens,GeneratedTokens\nx,100,20\nx,300,1\n\n")
    picture = tmp_path / "run.png"
    assert main([*BASE, "--workload", str(path), "--plot", str(picture)]) == 0
    assert "2 requests, 421 tokens" in capsys.readouterr().out
    assert picture.stat().st_size > 5_000


def test_limits_are_what_a_user_gave(tmp_path: Path) -> None:
    from blendserve.cli.workload_file import read_workload

    path = tmp_path / "job.jsonl"
    lines = [
        {"id": "a", "input_ids": [1, 2], "output_len": 5, "max_tokens": 40},
        {"id": "b", "input_ids": [3], "output_len": 50, "max_tokens": 20},
        {"id": "c", "input_ids": [4], "output_len": 7},
    ]
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    workload = read_workload(path, 1_000)
    assert workload.output_tokens.tolist() == [5, 20, 7]
    assert workload.max_output_tokens.tolist() == [40, 20, 98_304]


@pytest.mark.parametrize(
    ("arguments", "status", "says"),
    [
        (["--hardware", "missing.json"], 2, "missing.json: No such file"),
        (["--hardware", "h101"], 2, "did you mean 'h100'"),
        (["--requests", "1"], 1, "1 requests are too few"),
    ],
)
def test_no_traceback(
    arguments: list[str], status: int, says: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main([*BASE, "--workload", "trace2", *arguments]) == status
    assert says in capsys.readouterr().err


def test_empty_prompts_share_nothing(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "job.jsonl"
    path.write_text('{"id": "a", "input_ids": [], "output_len": 3}\n')
    assert main([*BASE, "--workload", str(path), "--policy", "dfs", "--json"]) == 0
    (run,) = json.loads(capsys.readouterr().out)
    assert run["sharing"] == 0


def test_ranks_keep_copies_of_kv_heads_in_simulate_as_in_plan(
    job: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """On 16 ranks eight KV heads are kept twice: half of the tokens that sixteen devices have."""
    from blendserve.cli.engine_flags import add_engine_flags, engine_of

    capacities = []
    for ranks in ("8", "16"):
        parser = argparse.ArgumentParser()
        add_engine_flags(parser)
        flags = ["--model-spec", "llama-3.1-70b", "--hardware", "a100", "--tp", ranks]
        capacities.append(engine_of(parser.parse_args([*flags, "--page-size", "64"]))[1])
    weights, layer = 2 * 70_553_706_496, 8 * 128 * 2 * 2 * 80
    expected = [(8 * 72e9 - weights) / layer, (16 * 72e9 - weights) / layer / 2]
    assert capacities == [int(tokens) // 64 * 64 for tokens in expected]


def test_a_named_workload_on_two_replicas(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("BLENDSERVE_DATA", str(tmp_path))  # No data: synthetic twins.
    arguments = ["--workload", "trace1", "--requests", "1500", "--policy", "blend", "--dp", "2"]
    assert main([*BASE, *arguments, "--sampling", "1", "--json"]) == 0
    (run,) = json.loads(capsys.readouterr().out)
    assert run["requests"] == 1_500


@pytest.mark.parametrize(
    ("text", "name", "says"),
    [
        ("a,b\n1,2\n", "x.csv", "line 1: no column 'prompt_tokens'"),
        ("prompt_tokens,output_tokens\n1,many\n", "x.csv", "line 2"),
        ("prompt_tokens,output_tokens\n1,-2\n", "x.csv", "line 2: a length is negative"),
        ("prompt_tokens,output_tokens\n", "x.csv", "no requests"),
        ('{"id": "a", "input_ids": [1]}\n', "x.jsonl", "line 1: 'a' has no output_len"),
        (
            '{"custom_id": "a", "method": "POST", "url": "/v1/completions", '
            '"body": {"prompt": "x"}}\n',
            "x.jsonl",
            "needs token ids",
        ),
    ],
)
def test_a_bad_file_is_an_error_that_names_the_place(
    text: str, name: str, says: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / name
    path.write_text(text)
    assert main([*BASE, "--workload", str(path)]) == 1
    error = capsys.readouterr().err
    assert says in error
    assert name in error or "token ids" in says


@pytest.mark.parametrize(
    ("arguments", "status", "says"),
    [
        (["--workload", "trace9"], 2, "did you mean 'trace"),
        (["--workload", "missing.jsonl"], 1, "no such file"),
        (["--workload", "trace1", "--plot", "x.pdf"], 1, "PNG"),
        (["--workload", "trace1", "--plot", "no/where/x.png"], 1, "does not exist"),
        (["--workload", "burstgpt:1.2:0.001", "--requests", "2000"], 1, "raise the sharing"),
    ],
)
def test_wrong_usage_is_an_error_with_a_remedy(
    arguments: list[str], status: int, says: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main([*BASE, *arguments]) == status
    assert says in capsys.readouterr().err


@pytest.mark.parametrize(
    "arguments",
    [["--policy", "best"], ["--dp", "2"], ["--sampling", "0"], ["--overlap", "some"]],
)
def test_wrong_options_end_with_the_usage(
    arguments: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as ended:
        main([*BASE, "--workload", "trace1", *arguments])
    assert ended.value.code == 2
    assert "blendserve simulate" in capsys.readouterr().err
