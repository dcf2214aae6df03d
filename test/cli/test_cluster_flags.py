"""What of several engines can be wrong on a command line, and what the message says."""

from __future__ import annotations

import os
import subprocess
import sys
from unittest import mock

import pytest

from blendserve.cli import main
from blendserve.cli.cluster_flags import engine_urls, partition_flags, read_key
from blendserve.cli.front import engine_command, settings_of, split_flags
from blendserve.cli.ray_engines import gpus_of
from blendserve.config import ConfigError


@pytest.fixture(autouse=True)
def clean_environment():
    with mock.patch.dict(os.environ):
        for name in [name for name in os.environ if name.startswith("BLENDSERVE_")]:
            del os.environ[name]
        yield


@pytest.fixture
def key(tmp_path):
    path = tmp_path / "key"
    path.write_text("0123456789abcdef\n")
    return str(path)


def command(*argv):
    options, flags = split_flags(argv)
    return engine_command(options, flags, settings_of(options))


def test_urls_are_read_and_their_last_slash_left_out():
    assert engine_urls("http://a:1/, https://b.example:22 ,http://[::1]:3") == [
        "http://a:1",
        "https://b.example:22",
        "http://[::1]:3",
    ]


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("", "at least one"),
        ("a:31000", "is not like"),
        ("http://a", "is not like"),
        ("ftp://a:1", "is not like"),
        ("http://a:x", "is not like"),
        ("http://a:1/v1", "is not like"),
        ("http://me:secret@a:1", "is not like"),
        ("http://a:1,http://a:1/", "each engine once"),
    ],
)
def test_urls_that_cannot_be_meant(text, says):
    with pytest.raises(ConfigError, match=says):
        engine_urls(text)


def test_a_key_is_a_line_of_some_length(tmp_path, key):
    assert read_key(key) == "0123456789abcdef"
    with pytest.raises(ConfigError, match="give --cluster-key-file"):
        read_key("")
    with pytest.raises(ConfigError, match="cannot be read"):
        read_key(str(tmp_path / "none"))
    for text in ("short\n", "two words of some length\n"):
        (tmp_path / "bad").write_text(text)
        with pytest.raises(ConfigError, match="one line of at least 16"):
            read_key(str(tmp_path / "bad"))


def test_the_coordinator_is_started_in_an_engines_place(key):
    words = command("--engine-urls", "http://a:1,http://b:2", "--cluster-key-file", key)
    assert "blendserve.cli.coordinator" in words
    assert words[-2:] == ["--engine-urls", "http://a:1,http://b:2"]
    assert "blendserve.cli.serve" in command("--tp", "2")


@pytest.mark.parametrize(
    ("more", "says"),
    [
        (["--tp", "2"], "--tp is for the engines"),
        (["--min-engines", "3"], "from 1 to 2"),
        (["--min-engines", "0"], "from 1 to 2"),
        (["--engines", "2"], "give --ray, too"),
    ],
)
def test_flags_that_do_not_go_with_fixed_engines(key, more, says):
    with pytest.raises(ConfigError, match=says):
        command("--engine-urls", "http://a:1,http://b:2", "--cluster-key-file", key, *more)


def test_several_engines_need_a_key():
    with pytest.raises(ConfigError, match="--cluster-key-file"):
        command("--engine-urls", "http://a:1")


def test_min_engines_is_for_several():
    with pytest.raises(ConfigError, match="give --engine-urls or --ray"):
        command("--min-engines", "2")


def test_without_ray_the_extra_is_named(monkeypatch):
    monkeypatch.setattr("blendserve.cli.front.find_spec", lambda name: None)
    with pytest.raises(ConfigError, match=r"pip install 'blendserve\[ray\]'"):
        command("--ray")


def test_with_ray_the_engines_flags_go_on_to_each(monkeypatch):
    monkeypatch.setattr("blendserve.cli.front.find_spec", lambda name: True)
    words = command("--ray", "--engines", "3", "--tp", "4", "--model-path", "m")
    own, engines = partition_flags([*words[3:], "--port", "5"])
    assert engines == ["--tp", "4", "--model-path", "m"]
    assert own[-5:] == ["--ray", "--engines", "3", "--port", "5"]
    with pytest.raises(ConfigError, match="from 1 to 3"):
        command("--ray", "--engines", "3", "--min-engines", "4")
    with pytest.raises(ConfigError, match="not both"):
        command("--ray", "--engine-urls", "http://a:1")


@pytest.mark.parametrize(
    ("flags", "gpus"),
    [
        ([], 1),
        (["--tp", "4"], 4),
        (["--tp-size", "2", "--pp-size=2", "--dp", "2"], 8),
        (["--tp", "8", "--dp", "8", "--enable-dp-attention"], 8),
    ],
)
def test_how_many_gpus_an_engine_has(flags, gpus):
    assert gpus_of(flags) == gpus


def test_an_engine_over_several_nodes_is_refused_on_ray():
    with pytest.raises(ConfigError, match="must fit on one node"):
        gpus_of(["--nnodes", "2"])


@pytest.mark.parametrize(
    ("argv", "says"),
    [
        (["engine"], "give --cluster-key-file"),
        (["engine", "--cluster-key-file", "KEY"], "give --port"),
    ],
)
def test_an_engine_says_what_it_lacks(capsys, key, argv, says):
    assert main([key if word == "KEY" else word for word in argv]) == 2
    assert says in capsys.readouterr().err


def test_a_coordinator_needs_neither_sglang_nor_torch():
    code = (
        "import sys, blendserve.cli.coordinator, blendserve.cli.front, blendserve.cli.ray_engines\n"
        "sys.exit(str(sorted({'sglang', 'torch', 'ray'} & sys.modules.keys())))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    assert done.stderr.splitlines()[-1] == "[]"
