"""``blendserve run-batch`` over a fake engine: whole jobs, resumed ones, all kinds of input."""

from __future__ import annotations

import json
import signal
import time
from pathlib import Path
from typing import Any

from run_process import Run, ids, ids_of_whole_lines, jsonl, lines


def test_stdin_comes_out_in_order_with_status_for_machines(tmp_path: Path) -> None:
    run = Run(tmp_path, "-i", "-", "--ordered", "--json")
    assert run.end(jsonl(lines(40, {3: "fail", 9: "timeout", 20: "busy"}))) == 1
    assert ids(tmp_path / "out.jsonl") == [f"r{i}" for i in range(40) if i not in (3, 9)]
    assert ids(tmp_path / "out.errors.jsonl") == ["r3", "r9"]
    events = [json.loads(line) for line in run.out.splitlines()]
    assert {event["total"] for event in events} == {40}, "it is known before the engine is up"
    assert {"state", "total", "completed", "failed", "eta_seconds"} <= events[0].keys()
    assert events[-1]["state"] == "placed"
    assert (events[-1]["completed"], events[-1]["failed"]) == (38, 2)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out.errors.jsonl", "out.jsonl"]


def test_a_stopped_run_goes_on_and_computes_nothing_twice(tmp_path: Path) -> None:
    source, log = tmp_path / "in.jsonl", tmp_path / "computed"
    source.write_bytes(jsonl(lines(120)))
    live = tmp_path / "out.jsonl.partial"
    options = ("--delay", "0.03", "--log", str(log))
    for stop in (signal.SIGINT, signal.SIGKILL):
        run = Run(tmp_path, "-i", str(source), options=options)
        before = len(ids(live)) if live.exists() else 0
        deadline = time.monotonic() + 60
        while not live.exists() or len(live.read_bytes().splitlines()) < before + 12:
            assert time.monotonic() < deadline
            assert run.process.poll() is None, run.end()
            time.sleep(0.01)
        run.process.send_signal(stop)
        assert run.end() == (130 if stop == signal.SIGINT else -signal.SIGKILL)
        if stop == signal.SIGINT:
            assert "The same command goes on from here" in run.said
    finished = set(ids_of_whole_lines(live))
    computed = len(log.read_text().split())
    run = Run(tmp_path, "-i", str(source), options=("--log", str(log)))
    assert run.end() == 0, run.said
    again = log.read_text().split()[computed:]
    assert finished
    assert finished.isdisjoint(again)
    assert sorted(ids(tmp_path / "out.jsonl")) == sorted(f"r{i}" for i in range(120))
    assert not live.exists()


def test_another_model_or_another_input_does_not_go_on_with_a_run(tmp_path: Path) -> None:
    source = tmp_path / "in.jsonl"
    source.write_bytes(jsonl(lines(8, {2: "crash"})))
    state = tmp_path / "out.jsonl.blendserve"
    run = Run(tmp_path, "-i", str(source), "--json", options=("--delay", "30"))
    assert run.process.stdout is not None
    while json.loads(run.process.stdout.readline())["state"] != "in_progress":
        pass
    run.process.terminate()
    assert run.end() == 130
    run = Run(tmp_path, "-i", str(source), options=("--fingerprint", "other-model"))
    assert run.end() == 2
    assert "begun with the engine fake-model/float32" in run.said
    assert "--overwrite" in run.said
    other = tmp_path / "other.jsonl"
    other.write_bytes(jsonl(lines(3)))
    run = Run(tmp_path, "-i", str(other))
    assert run.end() == 2
    assert "holds the state of a run over another input" in run.said
    assert state.is_dir()


def test_all_bad_lines_are_told_before_an_engine_starts(tmp_path: Path) -> None:
    bad = [*lines(3), {"custom_id": "r1"}]
    source = tmp_path / "in.jsonl"
    source.write_bytes(jsonl(bad) + b"{nope\n")
    run = Run(tmp_path, "-i", str(source))
    assert run.end() == 2
    assert "line 4: The custom_id of line 2 is used again" in run.said
    assert "line 5: The line is not valid JSON" in run.said
    assert "Starting the engine" not in run.said
    assert [path.name for path in tmp_path.iterdir()] == ["in.jsonl"]


def test_a_dry_run_prints_the_plan_and_starts_nothing(tmp_path: Path) -> None:
    source = tmp_path / "in.jsonl"
    source.write_bytes(jsonl(lines(5)))
    odd = [{**line, "custom_id": f"odd{i}"} for i, line in enumerate(lines(30))]
    for line in odd:
        line["body"] = {**line["body"], "stream": True}
    odd[0]["body"] = {**odd[0]["body"], "stream": False, "max_tokens": 8.0}
    with source.open("ab") as more:
        more.write(jsonl(odd))
    run = Run(tmp_path, "-i", str(source), "--dry-run", "--hardware", "h100-80g-sxm", "--json")
    assert run.end() == 0, run.said
    assert "29 lines cannot run" in run.said
    assert run.said.count("A batch cannot stream") == 29
    assert json.loads(run.out)["requests"] == 6
    assert json.loads(run.out)["predicted_seconds"]["blend"] > 0
    assert [path.name for path in tmp_path.iterdir()] == ["in.jsonl"]


def test_a_dry_run_judges_each_line_as_the_engine_would(tmp_path: Path) -> None:
    odd: dict[str, Any] = {
        "text": {"max_tokens": "8"},
        "whole": {"n": 1.0, "ignore_eos": "true"},
        "word": {"max_tokens": "many"},
        "part": {"max_tokens": 8.5},
        "field": {"temperature": "hot", "top_p": []},
        "streams": {"stream": True},
        "roles": {"messages": [{"content": "a"}]},
        "deep": {"response_format": {"type": "json_schema", "json_schema": 5}},
    }
    made = lines(len(odd))
    for line, (name, more) in zip(made, odd.items(), strict=True):
        line["custom_id"] = name
        line["body"] = {**line["body"], **more}
    source = tmp_path / "in.jsonl"
    source.write_bytes(b"\n" + jsonl(made))
    run = Run(tmp_path, "-i", str(source), "--dry-run", "--hardware", "h100-80g-sxm", "--json")
    assert run.end() == 0, run.said
    assert json.loads(run.out)["requests"] == 2
    assert "1 line cannot run" in run.said
    assert "5 lines are not planned" in run.said
    for said in (
        "line 4: max_tokens: Input should be a valid integer, unable to parse",
        "line 5: max_tokens: Input should be a valid integer, got a number with a fractional part",
        "line 6: temperature: Input should be a valid number",
        "line 7: A batch cannot stream",
        "line 8: messages.0",
        "line 9: response_format",
    ):
        assert said in run.said


def test_a_forced_tool_call_that_nothing_could_read_is_refused(tmp_path: Path) -> None:
    made = lines(4)
    tool = {"type": "function", "function": {"name": "f", "parameters": {"type": "object"}}}
    named = {"type": "function", "function": {"name": "f"}}
    for line, choice in zip(made, ("required", named, "auto", "none"), strict=True):
        line["body"] |= {"tools": [tool], "tool_choice": choice}
    source = tmp_path / "in.jsonl"
    source.write_bytes(jsonl(made))
    run = Run(tmp_path, "-i", str(source), "--strict")
    assert run.end() == 2
    assert "line 1: tool_choice forces a tool call" in run.said
    assert "line 2: tool_choice forces a tool call" in run.said
    assert "Start it with --tool-call-parser" in run.said
    assert "line 3" not in run.said
    run = Run(tmp_path, "-i", str(source), "--strict", "--tool-call-parser", "hermes")
    assert run.end() == 0, run.said


def test_answers_are_in_place_before_the_engine_has_stopped(tmp_path: Path) -> None:
    source = tmp_path / "in.jsonl"
    source.write_bytes(jsonl(lines(3)))
    stopped = tmp_path / "stopped"
    run = Run(tmp_path, "-i", str(source), options=("--stopped", str(stopped)))
    run.until_it_says("3 answered in")
    assert ids(tmp_path / "out.jsonl")
    assert not stopped.exists(), "the engine ends a second after it was told to"
    assert run.end() == 0
    assert stopped.exists()
    assert "0/0" not in run.said
