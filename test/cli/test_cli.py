"""The ``blendserve`` command: what it says to wrong input, and what it starts with right input."""

from __future__ import annotations

import argparse
import importlib.metadata
import os
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from unittest import mock

import pytest
import torch

from blendserve import __version__
from blendserve.cli import front, main, own_flags, serve
from blendserve.config import Settings, load_settings
from blendserve.runtime import cpu_platform, default_model


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


COMMANDS = ("serve", "run-batch", "plan", "simulate", "trace", "doctor")


@pytest.mark.parametrize("flag", ["-h", "--help"])
def test_help_names_all_commands(capsys, flag):
    assert main([flag]) == 0
    usage = capsys.readouterr().out
    assert [name for name in COMMANDS if f"\n  {name} " not in usage] == []


WITHOUT_SGLANG = """
import sys
for name in ("sglang", "torch", "transformers"):
    sys.modules[name] = None
from blendserve.cli import main
for argv in (["serve"], ["run-batch", "-i", "x", "-o", "y"], ["doctor"], *(
    [command, "--help"] for command in sys.argv[1:]
)):
    try:
        status = main(argv)
    except SystemExit as end:
        status = end.code
    print("status of", *argv, status)
"""


def test_without_sglang_every_command_helps_and_says_what_is_missing():
    ended = subprocess.run(
        [sys.executable, "-c", WITHOUT_SGLANG, *COMMANDS],
        capture_output=True, text=True, timeout=120, check=True,
    )  # fmt: skip
    said = [line for line in ended.stdout.splitlines() if line.startswith("status of ")]
    failed = {"serve": 2, "run-batch -i x -o y": 2, "doctor": 1}
    helped = {f"{command} --help": 0 for command in COMMANDS}
    assert said == [f"status of {line} {status}" for line, status in (failed | helped).items()]
    for command in ("serve", "run-batch"):
        assert f"blendserve {command}: this needs SGLang (0.5.16 to 0.5.23)" in ended.stderr
    assert "sglang and torch cannot be found" in ended.stdout


def test_no_command_prints_the_usage_and_fails(capsys):
    assert main([]) == 2
    assert capsys.readouterr().out.startswith("usage: blendserve COMMAND")


KNOWN = "Known: batches, calibrate, doctor, engine, merge, plan, run-batch, serve, simulate, trace."


@pytest.mark.parametrize(
    ("word", "hint"),
    [
        ("sevre", "Did you mean 'serve'?"),
        ("run_batch", "Did you mean 'run-batch'?"),
        (
            "benchmark",
            KNOWN,
        ),
        (
            "--verison",
            KNOWN,
        ),
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
    parser = own_flags.Parser(prog="blendserve serve")
    own_flags.add_setting_flags(parser)
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
        (["--hardware", "h100-81g-sxm"], "hardware = 'h100-81g-sxm': "),
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
    assert serve.run_engine(["--model-path", str(tmp_path)]) == 2
    assert f"model folder {str(tmp_path)!r} has no config.json" in capsys.readouterr().err


def test_our_flags_become_settings_of_every_process_and_sglang_never_sees_them(machine):
    settings, flags = serve.prepare(
        ["--batch-dir", "jobs", "--tp-size", "2", "--sample-fraction=0.2", "--log-level", "error"]
    )
    assert settings == load_settings(enabled=True, batch_dir=Path("jobs"), sample_fraction=0.2)
    assert load_settings() == settings  # from the environment, as a spawned process does
    assert flags[-4:] == ["--tp-size", "2", "--log-level", "error"]
    assert not any(flag.startswith(("--batch-dir", "--sample-fraction")) for flag in flags)


@pytest.mark.parametrize(
    ("argv", "expected"),
    [([], "front"), (["--node-rank", "0"], "front"), (["--node-rank=1"], "engine")],
)
def test_only_the_first_node_has_a_front(monkeypatch, argv, expected):
    monkeypatch.setattr(front, "serve_front", lambda argv: "front")
    monkeypatch.setattr(serve, "run_engine", lambda argv: "engine")
    assert serve.main(argv) == expected


def test_the_fronts_flags_never_reach_the_engine():
    options, rest = front.split_flags(
        ["--port", "80", "--api-key", "secret", "--batch-dir", "jobs", "--tp-size", "2"]
    )
    assert (options.port, options.api_key, options.batch_dir) == (80, "secret", "jobs")
    assert rest == ["--tp-size", "2"]


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


@pytest.mark.parametrize(
    ("avx512_bf16", "amx", "dtype"),
    [
        (False, False, "float32"),
        (True, False, "bfloat16"),
        (False, True, "bfloat16"),
        (True, True, "bfloat16"),
    ],
)
def test_a_cpu_computes_in_the_type_that_it_has_units_for(
    machine, monkeypatch, avx512_bf16, amx, dtype
):
    monkeypatch.setattr(torch.cpu, "_is_avx512_bf16_supported", lambda: avx512_bf16)
    monkeypatch.setattr(torch.cpu, "_is_amx_tile_supported", lambda: amx)
    assert value_of(serve.prepare([])[1], "--dtype") == dtype
    machine(True)
    assert "--dtype" not in serve.prepare([])[1]


@pytest.mark.parametrize("flag", ["--schedule-policy", "--max-total-tokens", "--dtype"])
def test_the_users_flag_wins_over_our_default(machine, flag):
    _, flags = serve.prepare([flag, "of-the-user"])
    assert value_of(flags, flag) == "of-the-user"
