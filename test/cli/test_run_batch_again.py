"""run-batch a second time: over a running job, over old results, and for what failed."""

from __future__ import annotations

import json
import os
import signal
from pathlib import Path
from typing import Any

import pytest
from run_process import Run, ids, ids_of_whole_lines, jsonl, lines

from blendserve.cli.server_process import free_port


def answers(path: Path) -> dict[str, str]:
    """What the fake engine has answered, by custom_id; one twice fails the test."""
    found = [json.loads(line) for line in path.read_bytes().splitlines()]
    by_id = {line["custom_id"]: line["response"]["body"] for line in found}
    assert len(by_id) == len(found)
    return {name: body["choices"][0]["message"]["content"][::-1] for name, body in by_id.items()}


def write(path: Path, entries: list[dict[str, Any]]) -> Path:
    path.write_bytes(jsonl(entries))
    return path


def test_a_second_run_does_not_touch_a_running_one(tmp_path: Path) -> None:
    source, other = write(tmp_path / "in", lines(20)), write(tmp_path / "in2", lines(5))
    first = Run(tmp_path, "-i", str(source), options=("--delay", "600"))
    first.until_it_says("Starting the engine")
    for flags in ([], ["--overwrite"]):
        second = Run(tmp_path, "-i", str(other), *flags)
        assert second.end() == 3
        assert f"another run-batch (process {first.process.pid}) works in" in second.said
    first.process.terminate()
    assert first.end() == 130, first.said
    again = Run(tmp_path, "-i", str(source))
    assert again.end() == 0, again.said
    assert sorted(ids(tmp_path / "out.jsonl")) == sorted(f"r{i}" for i in range(20))


def test_old_results_stay_until_new_ones_are_there(tmp_path: Path) -> None:
    source = write(tmp_path / "in", lines(80))
    old = {"out.jsonl": "old\n", "out.errors.jsonl": "old errors\n"}
    for name, text in old.items():
        (tmp_path / name).write_text(text)
    run = Run(tmp_path, "-i", str(source), "--overwrite", options=("--delay", "0.05"))
    run.until_answers(tmp_path / "out.jsonl.partial", 8)
    run.process.send_signal(signal.SIGINT)
    assert run.end() == 130
    assert "The same command without --overwrite goes on from here" in run.said
    assert {name: (tmp_path / name).read_text() for name in old} == old
    finished = set(ids_of_whole_lines(tmp_path / "out.jsonl.partial"))
    log = tmp_path / "computed"
    run = Run(tmp_path, "-i", str(source), options=("--log", str(log)))
    assert run.end() == 0, run.said
    assert finished
    assert finished.isdisjoint(log.read_text().split())
    assert sorted(ids(tmp_path / "out.jsonl")) == sorted(f"r{i}" for i in range(80))
    # The old errors went when the new answers, which have none, took the old ones' place.
    assert sorted(path.name for path in tmp_path.iterdir()) == ["computed", "in", "out.jsonl"]


def test_overwriting_a_stopped_run_begins_anew(tmp_path: Path) -> None:
    source, other = write(tmp_path / "in", lines(60)), write(tmp_path / "in2", lines(3))
    run = Run(tmp_path, "-i", str(source), options=("--delay", "0.05"))
    run.until_answers(tmp_path / "out.jsonl.partial", 4)
    run.process.kill()
    run.end()
    run = Run(tmp_path, "-i", str(other), "--overwrite")
    assert run.end() == 0, run.said
    assert sorted(ids(tmp_path / "out.jsonl")) == ["r0", "r1", "r2"]
    assert not (tmp_path / "out.jsonl.blendserve").exists()


FAILING = {2: "fail", 5: "timeout", 7: "fail"}


@pytest.mark.parametrize("flags", [[], ["--ordered"]])
def test_what_failed_runs_again_and_joins_the_answers(tmp_path: Path, flags: list[str]) -> None:
    # Not readable by orjson alone, and refused: neither must stand in the way of the others.
    odd = json.dumps({**lines(1)[0], "custom_id": "odd", "body": {"n": float("nan")}}) + "\n"
    source = tmp_path / "in"
    source.write_bytes(jsonl(lines(10, FAILING)) + odd.encode())
    run = Run(tmp_path, "-i", str(source), *flags)
    assert run.end() == 1
    first = answers(tmp_path / "out.jsonl")
    assert sorted(ids(tmp_path / "out.errors.jsonl")) == ["odd", "r2", "r5", "r7"]
    # The same ids, and two of the prompts mended.
    mended = jsonl(lines(10, {2: "fail", 5: "say five", 7: "say seven"}))
    source.write_bytes(mended + odd.encode())
    log = tmp_path / "computed"
    run = Run(tmp_path, "-i", str(source), "--retry-failed", *flags, options=("--log", str(log)))
    assert run.end() == 1, run.said
    assert "4 of 11 lines have no answer, and run again" in run.said
    assert "9 answered in" in run.said
    assert sorted(log.read_text().split()) == ["r2", "r5", "r7"]
    merged = answers(tmp_path / "out.jsonl")
    assert merged == {**first, "r5": "say five", "r7": "say seven"}
    assert sorted(ids(tmp_path / "out.errors.jsonl")) == ["odd", "r2"]
    if flags:
        order = [f"r{i}" for i in range(10) if i != 2]
        assert ids(tmp_path / "out.jsonl") == order
    source.write_bytes(jsonl(lines(10, {2: "say two"})))
    run = Run(tmp_path, "-i", str(source), "--retry-failed", *flags)
    assert run.end() == 0, run.said
    assert answers(tmp_path / "out.jsonl") == {**merged, "r2": "say two"}
    assert not (tmp_path / "out.errors.jsonl").exists()
    run = Run(tmp_path, "-i", str(source), "--retry-failed", *flags)
    assert run.end() == 0
    assert "Every line has its answer" in run.said
    assert "Starting the engine" not in run.said
    assert not (tmp_path / "out.jsonl.blendserve").exists()


def test_a_retry_that_is_killed_goes_on(tmp_path: Path) -> None:
    failing = dict.fromkeys(range(30), "fail")
    source = write(tmp_path / "in", lines(40, failing))
    assert Run(tmp_path, "-i", str(source)).end() == 1
    before = (tmp_path / "out.jsonl").read_bytes()
    write(source, lines(40))
    live = tmp_path / "out.jsonl.partial"
    run = Run(tmp_path, "-i", str(source), "--retry-failed", options=("--delay", "0.05"))
    run.until_answers(live, 4)
    run.process.kill()
    run.end()
    assert (tmp_path / "out.jsonl").read_bytes() == before
    finished = set(ids_of_whole_lines(live))
    plain = Run(tmp_path, "-i", str(source))
    assert plain.end() == 2
    assert "the same command with --retry-failed goes on with it" in plain.said
    log = tmp_path / "computed"
    run = Run(tmp_path, "-i", str(source), "--retry-failed", options=("--log", str(log)))
    assert run.end() == 0, run.said
    assert finished.isdisjoint(log.read_text().split())
    assert sorted(answers(tmp_path / "out.jsonl")) == sorted(f"r{i}" for i in range(40))


def test_a_retry_over_something_else_is_refused(tmp_path: Path) -> None:
    source = write(tmp_path / "in", lines(4, {1: "fail"}))
    run = Run(tmp_path, "-i", str(source), "--retry-failed")
    assert run.end() == 2
    assert "nothing has failed yet" in run.said
    assert Run(tmp_path, "-i", str(source)).end() == 1
    before = (tmp_path / "out.jsonl").read_bytes()
    write(source, lines(3))
    run = Run(tmp_path, "-i", str(source), "--retry-failed")
    assert run.end() == 2
    assert "answers 'r3', which the input does not have" in run.said
    (tmp_path / "out.jsonl").write_bytes(before[:-20])
    run = Run(tmp_path, "-i", str(source), "--retry-failed")
    assert run.end() == 2
    assert "is no answer of an earlier run" in run.said
    (tmp_path / "out.jsonl").write_bytes(before)
    write(source, lines(4))
    assert Run(tmp_path, "-i", str(source), "--retry-failed").end() == 0


def test_where_lines_failed_the_cause_is_told_and_the_log_is_kept(tmp_path: Path) -> None:
    source = write(tmp_path / "in", lines(6, {1: "fail", 3: "fail", 4: "timeout"}))
    options = ("--print", "the engine's last words")
    run = Run(tmp_path, "-i", str(source), "--json", options=options)
    assert run.end() == 1
    log = tmp_path / "out.jsonl.server.log"
    assert log.read_text() == "the engine's last words\n"
    assert f"The engine's log: {log}" in run.said
    assert "  2 x 400, e.g. r1: no" in run.said.replace("e.g. r3", "e.g. r1")
    assert "  1 x request_timeout, e.g. r4: No answer within 10 s." in run.said
    assert json.loads(run.out.splitlines()[-1])["server_log"] == str(log)


def test_loopback_goes_through_no_proxy(tmp_path: Path) -> None:
    source = write(tmp_path / "in", lines(3))
    dead = f"http://127.0.0.1:{free_port()}"
    proxies = {
        name: dead
        for small in ("http_proxy", "https_proxy", "all_proxy")
        for name in (small, small.upper())
    }
    run = Run(
        tmp_path,
        *("-i", str(source)),
        options=("--warm-up",),
        environment={**proxies, "NO_PROXY": "", "no_proxy": "example.org"},
    )
    assert run.end() == 0, run.said


def test_no_name_is_left_of_an_unpacked_input_when_the_run_is_killed(tmp_path: Path) -> None:
    run = Run(tmp_path, "-i", "-", options=("--delay", "30"))
    assert run.process.stdin is not None
    run.process.stdin.write(jsonl(lines(3)))
    run.process.stdin.close()
    run.process.stdin = None
    run.until_it_says("Starting the engine")
    os.kill(run.process.pid, signal.SIGKILL)
    run.end()
    left = {path.name for path in tmp_path.iterdir()}
    assert left <= {"out.jsonl.blendserve", "out.jsonl.partial", "out.errors.jsonl.partial"}
