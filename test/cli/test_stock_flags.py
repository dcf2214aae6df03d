"""Flags as SGLang's users write them: shortened, and in the file of --config."""

from __future__ import annotations

from pathlib import Path

import pytest

from blendserve.cli import front, serve, stock_flags
from blendserve.cli.run_batch import main as run_batch
from blendserve.cli.stock_flags import (
    ConfigFileError,
    config_flags,
    front_in_full,
    in_full,
    switches_set,
    without_config,
)

FLAGS = [
    ("--host",), ("--port",), ("--nccl-port",), ("--model-path", "--model"),
    ("--tensor-parallel-size", "--tp-size"), ("--data-parallel-size", "--dp-size"),
    ("--ep-size",), ("--dtype",), ("--max-running-requests",), ("--enable-metrics",),
    ("--enable-lora",), ("--page-size",),
]  # fmt: skip


@pytest.mark.parametrize(
    ("written", "full"),
    [
        ("--tp 8", "--tp-size 8"),
        ("--tp=8", "--tp-size=8"),
        ("--dp 2", "--dp-size 2"),
        ("--tensor 8", "--tensor-parallel-size 8"),
        ("--model x", "--model x"),  # a spelling of its own
        ("--max-running 3", "--max-running-requests 3"),  # though ours has --max-running-batches
        ("--po 1", "--port 1"),
        ("--p 1", "--p 1"),  # --port or --page-size
        ("--enable 1", "--enable 1"),
        ("--nothing --batch x", "--nothing --batch x"),
        ("-h -- --", "-h -- --"),
    ],
)
def test_an_unambiguous_beginning_is_written_out(written: str, full: str) -> None:
    own = ["--max-running-batches", "--batch-dir"]
    assert in_full(written.split(), FLAGS, own) == full.split()


def test_sglangs_own_parser_reads_the_same_flags() -> None:
    """On the installed SGLang, the beginnings that its documents use."""
    flags, switches = stock_flags.stock_flags()
    assert in_full(["--tp", "8", "--dp", "2", "--mem-frac", "0.8"], flags) == [
        *("--tp-size", "8", "--dp-size", "2", "--mem-fraction-static", "0.8"),
    ]
    assert "--enable-metrics" in switches
    assert "--tp-size" not in switches


def test_the_front_asks_sglang_only_for_words_that_begin_like_its_flags(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    asked = []

    def answer(command: list[str], **_: object) -> object:
        asked.append(command)
        done = stock_flags.subprocess.CompletedProcess(command, 0)
        done.stdout = "a warning\n" + stock_flags.json.dumps(FLAGS) + "\n"
        return done

    monkeypatch.setattr(stock_flags.subprocess, "run", answer)
    names = front.front_flags()
    plain = ["--tp", "8", "--port", "1", "--trust", "--host=x"]
    assert front_in_full(plain, names) == plain
    assert asked == []
    assert front_in_full(["--po", "1", "--tp", "8"], names) == ["--port", "1", "--tp-size", "8"]
    assert len(asked) == 1


@pytest.fixture
def config(tmp_path: Path) -> Path:
    path = tmp_path / "serve.yaml"
    path.write_text(
        "tp-size: 2\nhost: 0.0.0.0\nport: 80\nbatch-dir: jobs\nenable-metrics: true\n"
        "enable-lora: false\nlora-paths: [a, b]\ncuda-graph-bs: []\n"
        "json-model-override-args: {rope: 1}\nnode-rank: 1\n"
    )
    return path


def test_a_file_of_flags_is_read_by_front_and_engine(config: Path) -> None:
    options, rest = front.split_flags(["--config", str(config), "--port", "81"])
    assert (options.host, options.port, options.batch_dir) == ("0.0.0.0", 81, "jobs")
    # The engine reads the rest itself: nothing of the file shows on its command line.
    assert rest == ["--config", str(config)]
    engines = config_flags(rest, lambda flag: flag not in front.front_flags())
    assert switches_set(engines, ["--enable-metrics", "--enable-lora"]) == [
        *("--tp-size", "2", "--enable-metrics", "--lora-paths", "a", "b"),
        *("--json-model-override-args", '{"rope": 1}', "--node-rank", "1"),
    ]
    assert without_config([*rest, "--tp", "4", f"--config={config}"]) == ["--tp", "4"]


def test_a_node_that_its_file_makes_a_later_one_has_no_front(
    config: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(serve, "run_engine", lambda argv: "engine")
    assert serve.main(["--config", str(config)]) == "engine"


@pytest.mark.parametrize(
    ("name", "text", "said"),
    [
        ("none.yaml", None, "No such file"),
        ("flags.json", "{}", "takes a .yaml"),
        ("bad.yml", "a: [", "not YAML"),
        ("list.yml", "- a", "must hold flags"),
    ],
)
def test_a_file_that_holds_no_flags_is_refused_by_name(
    name: str,
    text: str | None,
    said: str,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    path = tmp_path / name
    if text is not None:
        path.write_text(text)
    with pytest.raises(ConfigFileError, match=said):
        config_flags(["--config", str(path)], lambda _: True)
    assert serve.main(["--config", str(path)]) == 2
    assert run_batch(["-i", "x", "-o", "y", "--config", str(path)]) == 2
    assert capsys.readouterr().err.count(str(path)) == 2


@pytest.mark.parametrize(
    ("given", "mixed"),
    [
        ("", True),
        ("--tp-size 8 --attention-backend fa3", True),
        ("--speculative-algorithm EAGLE", False),
        ("--cuda-graph-backend-prefill=full", False),
        ("--enable-pdmux", False),
        ("--disable-mixed-chunk", False),
    ],
)
def test_steps_are_mixed_on_a_gpu_but_beside_flags_that_sglang_may_not_mix_under(
    given: str, mixed: bool
) -> None:
    """SGLang's --enable-mixed-chunk cannot be taken away again."""
    assert ("--enable-mixed-chunk" in serve.gpu_flags(given.split())) is mixed


def test_two_files_and_none_are_refused() -> None:
    for argv in (["--config", "a", "--config=b"], ["--config"]):
        with pytest.raises(ConfigFileError, match="--config"):
            config_flags(argv, lambda _: True)
