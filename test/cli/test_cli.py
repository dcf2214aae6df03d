"""The ``blendserve`` command: what it says to wrong input, and what it starts with right input."""

from __future__ import annotations

import argparse
import contextlib
import importlib.metadata
import json
import os
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from unittest import mock

import pytest

from blendserve import __version__
from blendserve.cli import main, run_batch, serve
from blendserve.cli.server_process import ServerFailed
from blendserve.config import Settings, load_settings
from blendserve.runtime import cpu_platform, default_model

LINE = {
    "custom_id": "a",
    "method": "POST",
    "url": "/v1/completions",
    "body": {"model": "m", "prompt": "x"},
}


@pytest.fixture(autouse=True)
def clean_environment() -> Iterator[None]:
    """No settings of the caller's, none left behind, and no message broken into lines."""
    with mock.patch.dict(os.environ, {"COLUMNS": "1000"}):
        for name in [name for name in os.environ if name.startswith("BLENDSERVE_")]:
            del os.environ[name]
        yield


# -- the command itself


def test_version_is_printed(capsys):
    assert main(["--version"]) == 0
    assert capsys.readouterr().out == f"blendserve {__version__}\n"


def test_the_installed_command_is_this_one():
    (entry,) = importlib.metadata.entry_points(group="console_scripts", name="blendserve")
    assert entry.value == "blendserve.cli:main"


def test_the_package_runs_as_the_command_and_loads_no_engine_to_say_its_version():
    watch = "import runpy, sys; sys.argv[1:] = ['--version']\n"
    watch += "try: runpy.run_module('blendserve', run_name='__main__')\n"
    watch += "except SystemExit as end: print(end.code, 'torch' in sys.modules)"
    ended = subprocess.run(
        [sys.executable, "-c", watch], capture_output=True, text=True, timeout=60, check=True
    )
    assert ended.stdout == f"blendserve {__version__}\n0 False\n"


@pytest.mark.parametrize("flag", ["-h", "--help"])
def test_help_names_both_commands(capsys, flag):
    assert main([flag]) == 0
    usage = capsys.readouterr().out
    assert "serve " in usage
    assert "run-batch " in usage


def test_no_command_prints_the_usage_and_fails(capsys):
    assert main([]) == 2
    assert capsys.readouterr().out.startswith("usage: blendserve COMMAND")


@pytest.mark.parametrize(
    ("word", "hint"),
    [
        ("sevre", "Did you mean 'serve'?"),
        ("run_batch", "Did you mean 'run-batch'?"),
        ("benchmark", "Known: plan, run-batch, serve."),
        ("--verison", "Known: plan, run-batch, serve."),
    ],
)
def test_an_unknown_command_is_refused_with_the_nearest_one(capsys, word, hint):
    assert main([word, "--port", "1"]) == 2
    said = capsys.readouterr()
    assert said.err == f"blendserve: unknown command {word!r}. {hint}\n"
    assert said.out == ""


# -- serve


@pytest.fixture
def machine(monkeypatch: pytest.MonkeyPatch) -> Callable[[bool], None]:
    """Chooses between a machine with and one without a GPU; a model is never made."""
    monkeypatch.setattr(default_model, "resolve_model_path", lambda name: f"/cache/{name}")

    def choose(gpu: bool) -> None:
        monkeypatch.setattr(cpu_platform, "needs_cpu_engine", lambda: not gpu)

    choose(False)
    return choose


def value_of(flags: Sequence[str], flag: str) -> str:
    """What SGLang's parser makes of a flag: the last value wins."""
    parser = argparse.ArgumentParser(allow_abbrev=False)
    parser.add_argument(flag, dest="value")
    return str(parser.parse_known_args(list(flags))[0].value)


def parser_of_serve() -> argparse.ArgumentParser:
    parser = serve._Parser(prog="blendserve serve")
    serve.add_setting_flags(parser)
    return parser


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["--batch-dri", "jobs"], "unknown flag --batch-dri; did you mean --batch-dir?"),
        (["--batch-dri=jobs"], "unknown flag --batch-dri=jobs; did you mean --batch-dir?"),
        (["--zqx"], "unknown flag --zqx\n"),
    ],
)
def test_an_unknown_flag_is_refused_with_the_nearest_one(capsys, argv, message):
    with pytest.raises(SystemExit) as end:
        parser_of_serve().parse_args(["--hardware", "cpu", *argv])
    assert end.value.code == 2
    assert message in capsys.readouterr().err


def test_a_word_that_is_no_flag_is_named(capsys):
    with pytest.raises(SystemExit):
        parser_of_serve().parse_args(["jobs"])
    assert "unrecognized arguments: jobs" in capsys.readouterr().err


def test_a_flag_without_its_value_is_refused(capsys, machine):
    with pytest.raises(SystemExit) as end:
        main(["serve", "--batch-dir"])
    assert end.value.code == 2
    assert "--batch-dir: expected one argument" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["--sample-fraction", "7"], "sample_fraction = '7': "),
        (["--max-batch-lines", "many"], "max_batch_lines = 'many': "),
        (["--hardware", "h100"], "hardware = 'h100': "),
    ],
)
def test_a_bad_setting_ends_serve_with_its_name_and_value(capsys, machine, argv, message):
    assert main(["serve", *argv]) == 2
    said = capsys.readouterr().err
    assert said.startswith("blendserve serve: ")
    assert message in said


def test_an_unknown_variable_ends_serve_with_the_nearest_name(capsys, machine):
    os.environ["BLENDSERVE_HARDWEAR"] = "cpu"
    assert main(["serve"]) == 2
    assert "BLENDSERVE_HARDWEAR: no such setting. Did you mean 'hardware'?" in (
        capsys.readouterr().err
    )


def test_a_model_folder_without_a_model_ends_serve(capsys, tmp_path):
    assert main(["serve", "--model-path", str(tmp_path)]) == 2
    assert f"model folder {str(tmp_path)!r} has no config.json" in capsys.readouterr().err


def test_our_flags_become_settings_of_every_process_and_sglang_never_sees_them(machine):
    settings, flags = serve.prepare(
        ["--batch-dir", "jobs", "--tp-size", "2", "--sample-fraction=0.2", "--log-level", "error"]
    )
    assert settings == load_settings(enabled=True, batch_dir=Path("jobs"), sample_fraction=0.2)
    assert load_settings() == settings  # from the environment, as a spawned process does
    assert flags[-4:] == ["--tp-size", "2", "--log-level", "error"]
    assert not any(flag.startswith(("--batch-dir", "--sample-fraction")) for flag in flags)


def test_serving_is_what_switches_blendserve_on(machine):
    assert load_settings().enabled is False
    serve.prepare([])
    assert load_settings().enabled is True


@pytest.mark.parametrize("flag", ["--batch", "--hard", "--sample"])
def test_an_abbreviation_of_a_flag_of_ours_is_left_for_sglang_to_refuse(machine, flag):
    _, flags = serve.prepare([flag, "x"])
    assert flags[-2:] == [flag, "x"]
    assert load_settings() == Settings(enabled=True)


def test_every_flag_shows_its_settings_description_and_default():
    text = " ".join(parser_of_serve().format_help().split())
    for name in ("batch_dir", "hardware", "sample_fraction", "max_batch_lines", "max_file_bytes"):
        field = Settings.model_fields[name]
        assert f"{field.description} Default: {field.default}." in text


@pytest.mark.parametrize("flag", ["--model-path", "--model"])
def test_a_model_is_served_under_the_name_it_was_asked_for(machine, flag):
    _, flags = serve.prepare([flag, "my-model"])
    assert value_of(flags, "--model-path") == "/cache/my-model"
    assert value_of(flags, "--served-model-name") == "my-model"


def test_a_name_given_for_the_model_wins(machine):
    _, flags = serve.prepare(["--model-path", "my-model", "--served-model-name", "short"])
    assert value_of(flags, "--served-model-name") == "short"


def test_without_a_model_the_one_that_needs_no_download_is_served(machine):
    _, flags = serve.prepare([])
    assert value_of(flags, "--model-path") == f"/cache/{default_model.MODEL_NAME}"
    assert value_of(flags, "--served-model-name") == default_model.MODEL_NAME


def test_help_makes_no_model(machine, monkeypatch):
    monkeypatch.setattr(default_model, "resolve_model_path", lambda name: pytest.fail("made one"))
    _, flags = serve.prepare(["--help"])
    assert flags[-1] == "--help"


def test_prefill_and_decode_share_steps_on_a_gpu_only(machine):
    machine(True)
    assert "--enable-mixed-chunk" in serve.prepare([])[1]
    assert "--device" not in serve.prepare([])[1]
    machine(False)
    assert "--enable-mixed-chunk" not in serve.prepare([])[1]
    assert value_of(serve.prepare([])[1], "--device") == "cpu"


@pytest.mark.parametrize("flag", ["--schedule-policy", "--max-total-tokens", "--dtype"])
def test_the_users_flag_wins_over_our_default(machine, flag):
    _, flags = serve.prepare([flag, "of-the-user"])
    assert value_of(flags, flag) == "of-the-user"


# -- run-batch


@pytest.fixture
def engine(monkeypatch: pytest.MonkeyPatch) -> list[list[str]]:
    """Commands that would have started an engine; none of them does."""
    started: list[list[str]] = []

    @contextlib.contextmanager
    def refuse(command, port, log, environment=None):
        started.append(list(command))
        raise ServerFailed("the server ended with status 9:\nout of memory")
        yield

    monkeypatch.setattr(run_batch, "running_server", refuse)
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


@pytest.mark.parametrize("source", ["missing.jsonl", "."])
def test_an_input_that_is_no_file_is_refused(capsys, engine, files, source):
    assert run(files, source=source) == 1
    assert f"blendserve run-batch: input {files / source} is not a file" in capsys.readouterr().err
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
    assert run(files, flag, str(path)) == 1
    assert f"the folder of {path} does not exist" in capsys.readouterr().err
    assert engine == []
    assert contents(files) == before


@pytest.mark.parametrize("overwrite", [[], ["--overwrite"]])
@pytest.mark.parametrize("flag", ["-o", "--errors"])
def test_a_folder_is_refused_as_an_output(capsys, engine, files, flag, overwrite):
    (files / "results").mkdir()
    (files / "results" / "kept.txt").write_text("kept\n")
    before = contents(files)
    assert run(files, flag, str(files / "results"), *overwrite) == 1
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
    assert run(files, "--errors", str(files / errors), *overwrite, output=output) == 1
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
    assert main(["run-batch", "-i", "in.jsonl", "-o", "out.jsonl", *more]) == 1
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
    assert main(["run-batch", "-i", "in.jsonl", "-o", "out.jsonl", "--overwrite", *more]) == 1
    assert engine == []
    assert contents(files) == before


@pytest.mark.parametrize("columns", ["20", None])
def test_a_message_is_not_broken_into_lines(capsys, engine, files, columns):
    del os.environ["COLUMNS"]
    if columns is not None:
        os.environ["COLUMNS"] = columns
    source = "input of many words " * 5 + "[bold]" + "x" * 100
    assert run(files, source=source) == 1
    said = capsys.readouterr().err
    assert said == f"blendserve run-batch: input {files / source} is not a file\n"


def test_the_path_of_the_engines_log_is_not_broken_into_lines(capsys, engine, files):
    os.environ["COLUMNS"] = "20"
    run(files)
    log = files / "out.jsonl.blendserve" / "server.log"
    assert f"Starting the engine (its log: {log}) ...\n" in capsys.readouterr().err


@pytest.mark.parametrize("name", ["out.jsonl", "out.errors.jsonl"])
def test_an_earlier_result_is_not_overwritten_unasked(capsys, engine, files, name):
    (files / name).write_text("earlier\n")
    assert run(files) == 1
    said = capsys.readouterr().err
    assert f"{files / name} exists already. Give another name, or --overwrite" in said
    assert engine == []
    assert (files / name).read_text() == "earlier\n"


def test_an_earlier_file_of_errors_is_looked_for_where_it_was_asked_for(capsys, engine, files):
    (files / "bad.jsonl").write_text("earlier\n")
    assert run(files, "--errors", str(files / "bad.jsonl")) == 1
    assert f"{files / 'bad.jsonl'} exists already" in capsys.readouterr().err
    assert engine == []


@pytest.mark.parametrize(
    ("text", "number"),
    [
        ("not json\n", 1),
        ('\n  \n{"custom_id": "a"\n', 3),
        ("[1, 2]\n", 1),
        ('"url"\n', 1),
        ("7\n", 1),
        ("null\n", 1),
        ('{"custom_id": "a", "body": {}}\n', 1),
        ("\N{LATIN SMALL LETTER E WITH ACUTE}\n", 1),
    ],
)
def test_a_first_line_that_is_no_request_is_refused_with_its_number(
    capsys, engine, files, text, number
):
    (files / "in.jsonl").write_text(text, encoding="latin-1")
    assert run(files) == 1
    said = capsys.readouterr().err
    assert f"{files / 'in.jsonl'}, line {number} is not a batch request: it must be" in said
    assert engine == []


@pytest.mark.parametrize("text", ["", "\n", " \n\t\n\n"])
def test_a_file_without_requests_is_refused(capsys, engine, files, text):
    (files / "in.jsonl").write_text(text)
    assert run(files) == 1
    assert f"{files / 'in.jsonl'} has no requests" in capsys.readouterr().err
    assert engine == []


def test_good_input_starts_our_server_with_the_users_flags(capsys, engine, files):
    assert run(files, "--tp-size", "2", "--sample-fraction", "0.1") == 1
    (command,) = engine
    assert command[:4] == [sys.executable, "-m", "blendserve", "serve"]
    assert "--tp-size 2 --sample-fraction 0.1" in " ".join(command)
    assert value_of(command, "--host") == "127.0.0.1"
    # The state of the run stands beside its output.
    assert value_of(command, "--batch-dir") == str(files / "out.jsonl.blendserve" / "batches")


def test_the_users_host_and_port_do_not_lead_the_run_to_another_server(engine, files):
    run(files, "--host", "0.0.0.0", "--port", "80")
    assert value_of(engine[0], "--host") == "127.0.0.1"
    assert value_of(engine[0], "--port") != "80"


def test_a_server_that_does_not_start_ends_the_run_with_the_end_of_its_log(capsys, engine, files):
    assert run(files) == 1
    said = capsys.readouterr().err
    assert "blendserve run-batch: the server ended with status 9:\nout of memory" in said
    assert not (files / "out.jsonl").exists()


def test_a_second_run_goes_on_from_the_state_of_the_first(engine, files):
    run(files)
    kept = files / "out.jsonl.blendserve" / "batches.db"
    kept.write_text("state")
    run(files)
    assert kept.read_text() == "state"
    assert len(engine) == 2


def test_overwrite_begins_anew(engine, files):
    state = files / "out.jsonl.blendserve"
    state.mkdir()
    stale = [files / "out.jsonl", files / "out.errors.jsonl", state / "batches.db"]
    for path in stale:
        path.write_text("earlier\n")
    run(files, "--overwrite")
    assert [path.exists() for path in stale] == [False, False, False]
    assert len(engine) == 1


def test_an_interrupted_run_says_how_to_go_on(capsys, engine, files, monkeypatch):
    def interrupt(*args):
        raise KeyboardInterrupt

    monkeypatch.setattr(run_batch, "running_server", interrupt)
    assert run(files) == 130
    assert "The same command goes on from here" in capsys.readouterr().err
    assert (files / "out.jsonl.blendserve").is_dir()
