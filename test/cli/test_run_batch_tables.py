"""run-batch over tables with a fake engine: results with their columns, stopped and gone on."""

from __future__ import annotations

import json
import os
import threading
from pathlib import Path

import pytest
from run_process import Run, ids, jsonl, lines


def table(count: int) -> str:
    rows = (f"say {number},{number * number}\n" for number in range(count))
    return "question,square\n" + "".join(rows)


def test_a_stopped_table_goes_on_and_a_changed_one_is_refused(tmp_path: Path) -> None:
    source, log = tmp_path / "q.csv", tmp_path / "computed"
    source.write_text(table(60))
    flags = ("-i", str(source), "--prompt-column", "question", "--carry", "square")
    run = Run(tmp_path, *flags, options=("--delay", "0.05", "--log", str(log)))
    run.until_answers(tmp_path / "out.jsonl.partial", 8)
    run.process.kill()
    run.end()
    for changed in (table(61), table(60).replace("say 3,9", "say 3,10")):
        source.write_text(changed)
        run = Run(tmp_path, *flags)
        assert run.end() == 2
        assert "holds the state of a run over another input" in run.said
    source.write_text(table(60))
    run = Run(tmp_path, *flags, "--ordered", options=("--log", str(log)))
    assert run.end() == 0, run.said
    results = [json.loads(line) for line in (tmp_path / "out.jsonl").read_bytes().splitlines()]
    assert [line["custom_id"] for line in results] == [f"row-{n}" for n in range(1, 61)]
    assert [line["input"] for line in results] == [{"square": str(n * n)} for n in range(60)]
    computed = log.read_text().split()
    assert len(computed) < 2 * len(set(computed))


def test_answers_come_as_parquet_with_the_columns_of_the_input(tmp_path: Path) -> None:
    parquet = pytest.importorskip("pyarrow.parquet")
    pa = pytest.importorskip("pyarrow")
    source = tmp_path / "q.parquet"
    columns = {"prompt": ["ab", "cd", "fail"], "n": [1, 2, 3], "error": ["x", "y", "z"]}
    parquet.write_table(pa.table(columns), source)
    output = tmp_path / "out.parquet"
    run = Run(tmp_path, "-i", str(source), "--carry", "n,error", "--ordered", "-o", str(output))
    assert run.end() == 1, run.said
    found = parquet.read_table(output)
    assert found["answer"].to_pylist() == ["ba", "dc"]
    assert found["n"].to_pylist() == [1, 2]
    assert str(found.schema.field("n").type) == "int64"
    # A column of ours has that name.
    assert found["input_error"].to_pylist() == ["x", "y"]
    [error] = (tmp_path / "out.errors.jsonl").read_bytes().splitlines()
    assert json.loads(error)["input"] == {"n": 3, "error": "z"}


def test_lines_of_several_endpoints_and_files_run_as_one_job(tmp_path: Path) -> None:
    first, second = lines(3), lines(2)
    for number, line in enumerate(second):
        line |= {"custom_id": f"p{number}", "url": "/v1/completions"}
        line["body"] = {"prompt": "say it"}
    odd = {**second[0], "custom_id": "s", "url": "/v1/score", "body": {"items": ["a"]}}
    (tmp_path / "a.jsonl").write_bytes(jsonl(first))
    pipe = tmp_path / "pipe"
    os.mkfifo(pipe)
    writer = threading.Thread(target=pipe.write_bytes, args=(jsonl([*second, odd]),), daemon=True)
    writer.start()
    run = Run(tmp_path, "-i", str(tmp_path / "a.jsonl"), str(pipe), "--ordered")
    assert run.end() == 1, run.said
    writer.join(10)
    assert ids(tmp_path / "out.jsonl") == ["r0", "r1", "r2", "p0", "p1"]
    assert ids(tmp_path / "out.errors.jsonl") == ["s"]
    assert "The engine does not serve /v1/score" in run.said


def test_faults_name_the_file_and_the_remedy(tmp_path: Path) -> None:
    one, other = tmp_path / "a.jsonl", tmp_path / "b.jsonl"
    one.write_bytes(jsonl(lines(3)))
    other.write_bytes(jsonl(lines(2)[1:]) + b'{"prompt": "x"}\n')
    run = Run(tmp_path, "-i", str(one), str(other))
    assert run.end() == 2
    assert f"{other}, line 1: The custom_id of {one}, line 2 is used again" in run.said
    assert f"{other}, line 2: custom_id is missing" in run.said
    assert "--prompt-column" in run.said
