"""``blendserve serve``: SGLang's own server, with BlendServe switched on and batch defaults."""

from __future__ import annotations

import argparse
import difflib
import logging
import os
import sys
from collections.abc import Sequence
from typing import NoReturn

from blendserve.cli.server_process import TOKEN_VARIABLE, follow_parent
from blendserve.config import ConfigError, Settings, load_settings, to_environment

# What a job wants of SGLang everywhere; a flag given by the user comes later and wins.
_DEFAULT_FLAGS = (
    "--enable-cache-report",
    *("--schedule-policy", "fcfs"),
    *("--radix-cache-backend", "blendserve"),
)
# Prefill and decode in one step overlap compute with memory traffic. A CPU has no idle units to
# gain: SGLang's attention computes a mixed step more slowly than the two apart, ours no faster.
_GPU_FLAGS = ("--enable-mixed-chunk",)
# Without a size SGLang would take most of the machine's memory for KV, and minutes to clear it.
_CPU_FLAGS = (
    "--device", "cpu",
    "--dtype", "float32",
    "--max-total-tokens", "16384",
    "--mem-fraction-static", "0.1",
    "--chunked-prefill-size", "512",
    "--attention-backend", "blend",
    "--sleep-on-idle",
    # There is nothing to overlap where steps run in the scheduler itself: every token would only
    # be sent a step later.
    "--disable-overlap-schedule",
)  # fmt: skip

# Settings that have a flag; the others are set through the environment or a config file.
_SETTING_FLAGS = (
    *("batch_dir", "hardware", "sample_fraction", "max_batch_lines", "max_file_bytes"),
    *(
        "max_running_batches",
        "max_open_batches",
        "api_keys_file",
        "engine_hang_seconds",
        "allow_remote_urls",
        "allowed_hosts",
    ),
)


class _Parser(argparse.ArgumentParser):
    """An unknown flag is an error that names the nearest valid one."""

    def error(self, message: str) -> NoReturn:
        marker = "unrecognized arguments: "
        if message.startswith(marker):
            unknown = next(
                (word for word in message[len(marker) :].split() if word.startswith("-")), None
            )
            if unknown:
                known = [flag for flag in self._option_string_actions if flag.startswith("--")]
                near = difflib.get_close_matches(unknown.split("=")[0], known, n=1)
                message = f"unknown flag {unknown}" + (f"; did you mean {near[0]}?" if near else "")
        super().error(message)


def add_setting_flags(parser: argparse.ArgumentParser) -> None:
    """Add BlendServe's own flags, with the settings' descriptions and defaults."""
    group = parser.add_argument_group("blendserve")
    for name in _SETTING_FLAGS:
        field = Settings.model_fields[name]
        group.add_argument(
            f"--{name.replace('_', '-')}",
            default=None,
            help=f"{field.description} Default: {field.default}.",
        )


def prepare(argv: Sequence[str]) -> tuple[Settings, list[str]]:
    """Split the command line into BlendServe's settings and the flags for SGLang.

    The environment is changed to carry the settings to the processes that SGLang spawns, and the
    machine is prepared, so that SGLang can be imported afterwards.

    Raises:
        ConfigError, ModelPathError: a setting or a model folder that cannot be used.
    """
    ours = _Parser(prog="blendserve serve", add_help=False, allow_abbrev=False)
    add_setting_flags(ours)
    model = ours.add_argument_group("model")
    model.add_argument("--model-path", "--model", default=None)
    model.add_argument("--served-model-name", default=None)
    options, rest = ours.parse_known_args(list(argv))
    given = {name: getattr(options, name) for name in _SETTING_FLAGS}
    overrides = {name: value for name, value in given.items() if value is not None}
    settings = load_settings(enabled=True, **overrides)
    os.environ.update(to_environment(settings))

    from blendserve.runtime.cpu_platform import needs_cpu_engine
    from blendserve.runtime.default_model import MODEL_NAME, resolve_model_path

    name = options.model_path or MODEL_NAME
    flags = [*_DEFAULT_FLAGS, *(_CPU_FLAGS if needs_cpu_engine() else _GPU_FLAGS)]
    wants_help = "-h" in rest or "--help" in rest
    flags += ["--model-path", name if wants_help else resolve_model_path(name)]
    flags += ["--served-model-name", options.served_model_name or name]
    return settings, [*flags, *rest]


def main(argv: Sequence[str]) -> int:
    """Serve until stopped: files and batches here, the model in a process of its own."""
    from blendserve.cli.front import serve_front

    nodes = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    nodes.add_argument("--node-rank", type=int, default=0)
    # Only the first of several nodes has an HTTP server to stand in front of.
    has_front = nodes.parse_known_args(list(argv))[0].node_rank == 0
    if not has_front or "-h" in argv or "--help" in argv:
        return run_engine(argv)
    return serve_front(argv)


def run_engine(argv: Sequence[str]) -> int:
    """SGLang's server, in this process; `serve` and `run-batch` start it as a child."""
    from blendserve.runtime.default_model import ModelPathError

    token = os.environ.pop(TOKEN_VARIABLE, None)
    if token is not None:
        follow_parent()
    try:
        _, flags = prepare(argv)
    except (ConfigError, ModelPathError) as error:
        print(f"blendserve serve: {error}", file=sys.stderr)
        return 2

    from sglang.launch_server import run_server
    from sglang.srt.plugins import load_plugins
    from sglang.srt.server_args import ServerArgs, prepare_server_args
    from sglang.srt.utils import kill_process_tree

    load_plugins()
    # SGLang's parser would name an unknown flag without a hint, and only print its own usage.
    parser = _Parser(prog="blendserve serve", allow_abbrev=False)
    add_setting_flags(parser)
    ServerArgs.add_cli_args(parser)
    if "--config" not in flags:
        parser.parse_args(flags)
    if token is not None:
        # Not on the command line, which every user of the machine may read.
        flags += ["--api-key", token]
        _keep_out_of_logs(token)
    try:
        run_server(prepare_server_args(flags))
    finally:
        kill_process_tree(os.getpid(), include_parent=False)
    return 0


def _keep_out_of_logs(secret: str) -> None:
    """SGLang logs all its settings at the start, and keys are among them."""

    def hide(record: logging.LogRecord) -> bool:
        record.msg, record.args = record.getMessage().replace(secret, "***"), None
        return True

    logging.getLogger("sglang.srt.entrypoints.engine").addFilter(hide)


if __name__ == "__main__":
    sys.exit(run_engine(sys.argv[1:]))
