"""``blendserve run-batch``: what it refuses, and that a refusal costs nothing."""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import NoReturn
from unittest import mock

import pytest

from blendserve.cli import main
from blendserve.cli.engine_process import EngineFailed
from blendserve.cli.offline_job import OfflineJob

LINE = {
    "custom_id": "a",
    "method": "POST",
    "url": "/v1/completions",
    "body": {"prompt": "x"},
}


@pytest.fixture(autouse=True)
def clean_environment() -> Iterator[None]:
    """No settings of the caller's, none left behind, and no message broken into lines."""
    with mock.patch.dict(os.environ, {"COLUMNS": "1000"}):
        for name in [name for name in os.environ if name.startswith("BLENDSERVE_")]:
            del os.environ[name]
        yield


@pytest.fixture
def engine(monkeypatch: pytest.MonkeyPatch) -> list[list[str]]:
    """Commands that would have started an engine; none of them does."""
    started: list[list[str]] = []

    async def refuse(job: OfflineJob, batch_id: str, reporter: object, **more: object) -> NoReturn:
        started.append(job.engine.command)
        raise EngineFailed("the engine ended with status 9:\nout of memory", 9)

    monkeypatch.setattr(OfflineJob, "run", refuse)
    return started


@pytest.fixture
def files(tmp_path: Path) -> Path:
    (tmp_path / "in.jsonl").write_text(json.dumps(LINE) + "\n")
    return tmp_path


def run(folder: Path, *more: str, source: str = "in.jsonl", output: str = "out.jsonl") -> int:
    return main(["run-batch", "-i", str(folder / source), "-o", str(folder / output), *more])


@pytest.mark.parametrize(
    ("argv", "missing"), [([], "-i/--input, -o/--output"), (["-i", "in.jsonl"], "-o/--output")]
)
def test_input_and_output_are_required(capsys, engine, argv, missing):
    with pytest.raises(SystemExit) as end:
        main(["run-batch", *argv])
    assert end.value.code == 2
    assert f"the following arguments are required: {missing}" in capsys.readouterr().err
    assert engine == []


def test_an_input_that_is_no_file_is_refused(capsys, engine, files):
    source = files / "missing.jsonl"
    assert run(files, source="missing.jsonl") == 2
    assert f"blendserve run-batch: input {source} is not a file" in capsys.readouterr().err
    assert engine == []


def test_results_in_an_input_folder_are_refused(capsys, engine, files):
    assert run(files, source=".") == 2
    assert f"results in the input folder {files} would be input the next time" in (
        capsys.readouterr().err
    )
    assert engine == []


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        (["--errors", "e.parquet"], "errors are JSON lines; give a .jsonl name"),
        (["--shard", "0/2", "-o", "out.parquet"], "--shard works on JSON lines"),
        (["--retry-failed", "-o", "out.parquet"], "--retry-failed works on JSON lines"),
    ],
)
def test_parquet_is_refused_where_lines_are_needed(capsys, engine, files, monkeypatch, flags, said):
    monkeypatch.chdir(files)
    assert run(files, *flags) == 2
    assert said in capsys.readouterr().err
    assert engine == []


@pytest.mark.parametrize("source", ["in.jsonl", "t.parquet"])
def test_parquet_without_its_library_is_refused_with_the_way_to_it(
    capsys, engine, files, monkeypatch, source
):
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    (files / "t.parquet").write_bytes(b"PAR1")
    output = "out.parquet" if source == "in.jsonl" else "out.jsonl"
    assert run(files, source=source, output=output) == 2
    assert "needs pyarrow: pip install 'blendserve[data]'" in capsys.readouterr().err
    assert engine == []


def contents(folder: Path) -> dict[str, str | None]:
    """All that lies in a folder, and what the files among it say."""
    return {
        str(path.relative_to(folder)): path.read_text() if path.is_file() else None
        for path in folder.rglob("*")
    }


@pytest.mark.parametrize("flag", ["-o", "--errors"])
def test_a_folder_that_does_not_exist_is_refused(capsys, engine, files, flag):
    before = contents(files)
    path = files / "results" / "out.jsonl"
    assert run(files, flag, str(path)) == 2
    assert f"the folder of {path} does not exist" in capsys.readouterr().err
    assert engine == []
    assert contents(files) == before


@pytest.mark.parametrize("overwrite", [[], ["--overwrite"]])
@pytest.mark.parametrize("flag", ["-o", "--errors"])
def test_a_folder_is_refused_as_an_output(capsys, engine, files, flag, overwrite):
    (files / "results").mkdir()
    (files / "results" / "kept.txt").write_text("kept\n")
    before = contents(files)
    assert run(files, flag, str(files / "results"), *overwrite) == 2
    said = capsys.readouterr().err
    assert f"{files / 'results'} is a folder; give the name of a file in it" in said
    assert engine == []
    assert contents(files) == before


@pytest.mark.parametrize("output", [".", "/", "./"])
def test_an_output_without_a_name_is_wrong_usage(capsys, engine, files, monkeypatch, output):
    monkeypatch.chdir(files)
    with pytest.raises(SystemExit) as end:
        main(["run-batch", "-i", "in.jsonl", "-o", output, "--overwrite"])
    assert end.value.code == 2
    assert f"-o {Path(output)}: give the name of a file" in capsys.readouterr().err
    assert engine == []
    assert contents(files) == {"in.jsonl": json.dumps(LINE) + "\n"}


@pytest.mark.parametrize("overwrite", [[], ["--overwrite"]])
@pytest.mark.parametrize(
    ("output", "errors"),
    [
        ("in.jsonl", "errors.jsonl"),
        ("out.jsonl", "in.jsonl"),
        ("out.jsonl", "out.jsonl"),
        ("sub/../in.jsonl", "errors.jsonl"),
        ("out.jsonl", "link.jsonl"),  # to the input
        ("loop/in.jsonl", "errors.jsonl"),  # through a link to the folder
        ("sub/out.jsonl", "sub/../sub/out.jsonl"),
    ],
)
def test_input_output_and_errors_must_be_three_files(
    capsys, engine, files, output, errors, overwrite
):
    (files / "sub").mkdir()
    (files / "link.jsonl").symlink_to("in.jsonl")
    (files / "loop").symlink_to(".")
    before = contents(files)
    assert run(files, "--errors", str(files / errors), *overwrite, output=output) == 2
    said = capsys.readouterr().err
    assert "input, output and errors must be three different files" in said
    assert engine == []
    assert contents(files) == before


REFUSED = pytest.mark.parametrize(
    ("text", "more"),
    [
        ("nonsense\n", []),
        ("\n", []),
        (json.dumps(LINE), ["-i", "missing.jsonl"]),
        (json.dumps(LINE), ["-o", "missing/out.jsonl"]),
        (json.dumps(LINE), ["--errors", "missing/out.errors.jsonl"]),
        (json.dumps(LINE), ["--errors", "out.jsonl"]),
    ],
)


@REFUSED
def test_a_refusal_leaves_nothing_behind(engine, files, monkeypatch, text, more):
    monkeypatch.chdir(files)
    (files / "in.jsonl").write_text(text)
    assert main(["run-batch", "-i", "in.jsonl", "-o", "out.jsonl", *more]) == 2
    assert engine == []
    assert contents(files) == {"in.jsonl": text}


@REFUSED
def test_a_refusal_drops_nothing_of_an_earlier_run(engine, files, monkeypatch, text, more):
    monkeypatch.chdir(files)
    (files / "in.jsonl").write_text(text)
    (files / "out.jsonl.blendserve").mkdir()
    for name in ("out.jsonl", "out.errors.jsonl", "out.jsonl.blendserve/batches.db"):
        (files / name).write_text("earlier\n")
    before = contents(files)
    assert main(["run-batch", "-i", "in.jsonl", "-o", "out.jsonl", "--overwrite", *more]) == 2
    assert engine == []
    assert contents(files) == before


@pytest.mark.parametrize("columns", ["20", None])
def test_a_message_is_not_broken_into_lines(capsys, engine, files, columns):
    del os.environ["COLUMNS"]
    if columns is not None:
        os.environ["COLUMNS"] = columns
    source = "input of many words " * 5 + "[bold]" + "x" * 100
    assert run(files, source=source) == 2
    said = capsys.readouterr().err
    assert said == f"blendserve run-batch: no file matches {files / source}\n"


def test_the_path_of_the_engines_log_is_not_broken_into_lines(capsys, engine, files):
    os.environ["COLUMNS"] = "20"
    run(files)
    log = files / "out.jsonl.blendserve" / "server.log"
    assert f"Starting the engine (its log: {log}) ...\n" in capsys.readouterr().err


@pytest.mark.parametrize("name", ["out.jsonl", "out.errors.jsonl"])
def test_an_earlier_result_is_not_overwritten_unasked(capsys, engine, files, name):
    (files / name).write_text("earlier\n")
    assert run(files) == 2
    said = capsys.readouterr().err
    assert f"{files / name} exists already. Give another name, --retry-failed" in said
    assert engine == []
    assert (files / name).read_text() == "earlier\n"


def test_an_earlier_file_of_errors_is_looked_for_where_it_was_asked_for(capsys, engine, files):
    (files / "bad.jsonl").write_text("earlier\n")
    assert run(files, "--errors", str(files / "bad.jsonl")) == 2
    assert f"{files / 'bad.jsonl'} exists already" in capsys.readouterr().err
    assert engine == []


@pytest.mark.parametrize(
    ("data", "said"),
    [
        (b"not json\n", "line 1: The line is not valid JSON: Expecting value (column 1)."),
        (b'\n  \n{"custom_id": "a"\n', "line 3: The line is not valid JSON: "),
        (b"[1, 2]\n", "line 1: The line is JSON, but not an object."),
        (b"7\n", "line 1: The line is JSON, but not an object."),
        (b'{"custom_id": "a", "body": {}}\n', "line 1: method is missing."),
        (
            "\N{LATIN SMALL LETTER E WITH ACUTE}\n".encode("latin-1"),
            "line 1: The line is not UTF-8",
        ),
        (json.dumps(LINE).encode("utf-16"), "The file is UTF-16; save it as UTF-8."),
        (b"[" * 5_000, "line 1: The line is not valid JSON: its brackets do not match."),
    ],
)
def test_a_first_line_that_is_no_request_is_refused_with_its_number(
    capsys, engine, files, data, said
):
    (files / "in.jsonl").write_bytes(data)
    assert run(files) == 2
    assert f"{files / 'in.jsonl'} cannot be run:\n  {said}" in capsys.readouterr().err
    assert engine == []


def test_a_first_line_nested_too_deep_is_its_own_matter(capsys, engine, files):
    deep = {**LINE, "custom_id": "deep"}
    text = json.dumps(deep).replace('"x"', "[" * 990 + "]" * 990)
    (files / "in.jsonl").write_text(f"{text}\n{json.dumps(LINE)}\n")
    assert run(files) == 3
    assert "line 1: Lists and objects are nested more than 200 levels" in capsys.readouterr().err
    assert len(engine) == 1


@pytest.mark.parametrize("text", ["", "\n", " \n\t\n\n"])
def test_a_file_without_requests_is_refused(capsys, engine, files, text):
    (files / "in.jsonl").write_text(text)
    assert run(files) == 2
    assert "The file holds no requests" in capsys.readouterr().err
    assert engine == []


def test_good_input_starts_our_server_with_the_users_flags(capsys, engine, files):
    assert run(files, "--tp-size", "2", "--sample-fraction", "0.1") == 3
    (command,) = engine
    assert command[:3] == [sys.executable, "-m", "blendserve.cli.serve"]
    assert "--tp-size 2" in " ".join(command)
    # The state of the run stands beside its output.
    assert (files / "out.jsonl.blendserve" / "batches" / "blendserve.db").is_file()


def test_the_users_host_and_port_do_not_lead_the_run_to_another_server(engine, files):
    run(files, "--host", "0.0.0.0", "--port", "80")
    assert engine[0][-2:] == ["--host", "127.0.0.1"]
    assert not {"0.0.0.0", "--port"} & set(engine[0])


def test_a_server_that_does_not_start_ends_the_run_with_the_end_of_its_log(capsys, engine, files):
    assert run(files) == 3
    said = capsys.readouterr().err
    assert "blendserve run-batch: the engine ended with status 9:\nout of memory" in said
    assert not (files / "out.jsonl").exists()


def test_a_second_run_goes_on_from_the_state_of_the_first(engine, files):
    run(files)
    kept = files / "out.jsonl.blendserve" / "batches.db"
    kept.write_text("state")
    run(files)
    assert kept.read_text() == "state"
    assert len(engine) == 2


def test_overwrite_begins_anew_and_replaces_results_at_the_end_only(engine, files):
    state = files / "out.jsonl.blendserve"
    state.mkdir()
    earlier = [files / "out.jsonl", files / "out.errors.jsonl"]
    for path in (*earlier, state / "batches.db"):
        path.write_text("earlier\n")
    assert run(files, "--overwrite") == 3
    assert [path.read_text() for path in earlier] == ["earlier\n", "earlier\n"]
    assert not (state / "batches.db").exists()
    assert (state / "replaced-0" / "batches.db").read_text() == "earlier\n"
    assert len(engine) == 1


@pytest.mark.parametrize("flag", ["-o", "--errors"])
@pytest.mark.parametrize("overwrite", [[], ["--overwrite"], ["--retry-failed"]])
def test_what_is_no_regular_file_is_refused_as_an_output(capsys, engine, files, flag, overwrite):
    pipe = files / "pipe"
    os.mkfifo(pipe)
    before = contents(files)
    assert run(files, flag, str(pipe), *overwrite) == 2
    assert f"{pipe} is a device, pipe or socket" in capsys.readouterr().err
    assert main(["run-batch", "-i", str(files / "in.jsonl"), "-o", "/dev/null", *overwrite]) == 2
    assert Path("/dev/null").is_char_device()
    assert engine == []
    assert contents(files) == before


FOREIGN = {**LINE, "body": {"model": "gpt-4o", "prompt": "x"}}


def test_a_foreign_model_is_named_before_one_is_loaded(capsys, engine, files):
    (files / "in.jsonl").write_text(json.dumps(FOREIGN) + "\n")
    assert run(files) == 2
    said = capsys.readouterr().err
    assert "line 1: The model 'gpt-4o' is not served here; this server has smollm2-135m." in said
    assert "--served-model-name NAME" in said
    assert run(files, "--model-path", "/models/x") == 2
    assert "this server has /models/x." in capsys.readouterr().err
    assert engine == []


@pytest.mark.parametrize(
    "flags",
    [["--served-model-name", "gpt-4o"], ["--model=gpt-4o"], ["--config", "server.yaml"]],
)
def test_a_model_that_may_be_served_is_left_to_the_engine(engine, files, flags):
    (files / "in.jsonl").write_text(json.dumps(FOREIGN) + "\n")
    if "--config" in flags:
        flags = ["--config", str(files / "server.yaml")]
        (files / "server.yaml").write_text("served-model-name: gpt-4o\n")
    assert run(files, *flags) == 3
    assert len(engine) == 1


def odd_file(files: Path) -> None:
    odd = [
        {**LINE, "custom_id": f"o{i}", "body": {"prompt": "x", "n": 0, "rid": "r"}}
        for i in range(60)
    ]
    text = "".join(json.dumps(line) + "\n" for line in [LINE, *odd])
    (files / "in.jsonl").write_text(text)


def test_lines_that_will_be_errors_are_told_before_a_model_loads(capsys, engine, files):
    odd_file(files)
    assert run(files) == 3
    said = capsys.readouterr().err
    assert "60 lines cannot run and are answered as an error" in said
    assert "line 2: n must be a whole number from 1. (invalid_value)" in said
    assert "line 2: `rid` is for the server to set; leave it out. (unsupported_parameter)" in said
    assert "and 110 more" in said


def test_strict_refuses_a_file_with_all_its_faults(capsys, engine, files):
    odd_file(files)
    before = contents(files)
    assert run(files, "--strict") == 2
    said = capsys.readouterr().err
    for number in range(2, 62):
        assert said.count(f"  line {number}: ") == 2
    assert engine == []
    assert contents(files) == before


def test_a_good_file_may_be_checked_strictly(engine, files):
    assert run(files, "--strict") == 3
    assert len(engine) == 1


def test_flags_that_the_engine_does_not_know_are_wrong_usage(capsys, files, monkeypatch):
    async def refuse(*_: object, **more: object) -> NoReturn:
        raise EngineFailed("the engine ended with status 2: unknown flag", 2)

    monkeypatch.setattr(OfflineJob, "run", refuse)
    assert run(files) == 2
    assert "unknown flag" in capsys.readouterr().err


@pytest.mark.parametrize("error", [OSError(28, "No space left on device"), RuntimeError("ours")])
def test_what_stops_a_run_is_told_and_is_not_taken_for_failed_lines(
    capsys, files, monkeypatch, error
):
    async def fail(*_: object, **more: object) -> NoReturn:
        raise error

    monkeypatch.setattr(OfflineJob, "run", fail)
    assert run(files) == 3
    assert str(error) in capsys.readouterr().err
    assert (files / "out.jsonl.blendserve").is_dir()


def test_an_interrupted_run_says_how_to_go_on(capsys, engine, files, monkeypatch):
    async def interrupt(*args, **more):
        raise KeyboardInterrupt

    monkeypatch.setattr(OfflineJob, "run", interrupt)
    assert run(files) == 130
    assert "Stopped. The same command goes on from here" in capsys.readouterr().err
    assert run(files, "--overwrite") == 130
    said = capsys.readouterr().err
    assert "Stopped. The same command without --overwrite goes on from here" in said
    assert (files / "out.jsonl.blendserve").is_dir()
