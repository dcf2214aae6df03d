"""``blendserve serve``: SGLang's own server, with BlendServe switched on and batch defaults."""

from __future__ import annotations

import argparse
import logging
import os
import sys
from collections.abc import Sequence

from blendserve.cli.own_flags import SETTING_FLAGS, Parser, add_own_flags
from blendserve.cli.server_process import PARENT_VARIABLE, TOKEN_VARIABLE, follow_parent
from blendserve.cli.stock_flags import (
    ConfigFileError,
    config_flags,
    in_full,
    read,
    stock_flags,
    switches_set,
    without_config,
)
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
# With these, SGLang may have no mixed steps, and ends where it is told to make them.
_NO_MIXED_STEPS = (
    *("--speculative-algorithm", "--cuda-graph-backend-prefill", "--cuda-graph-config"),
    *("--enable-pdmux", "--dllm-algorithm", "--disable-mixed-chunk"),
)
# Without a size SGLang would take most of the machine's memory for KV, and minutes to clear it.
_CPU_FLAGS = (
    "--device", "cpu",
    "--max-total-tokens", "16384",
    "--mem-fraction-static", "0.4",
    "--chunked-prefill-size", "512",
    "--attention-backend", "blend",
    "--sleep-on-idle",
    # There is nothing to overlap where steps run in the scheduler itself: every token would only
    # be sent a step later.
    "--disable-overlap-schedule",
)  # fmt: skip


def prepare(argv: Sequence[str]) -> tuple[Settings, list[str]]:
    """Split the command line into BlendServe's settings and the flags for SGLang.

    The environment is changed to carry the settings to the processes that SGLang spawns, and the
    machine is prepared, so that SGLang can be imported afterwards.

    Raises:
        ConfigError, ModelPathError: a setting or a model folder that cannot be used.
        HardwareError: a device or file of figures that cannot be used, before weights are loaded.
    """
    ours = Parser(prog="blendserve serve", add_help=False, allow_abbrev=False)
    add_own_flags(ours)
    model = ours.add_argument_group("model")
    model.add_argument("--model-path", "--model", default=None)
    model.add_argument("--served-model-name", default=None)
    options, rest = ours.parse_known_args(list(argv))
    given = {name: getattr(options, name) for name in SETTING_FLAGS}
    overrides = {name: value for name, value in given.items() if value is not None}
    settings = load_settings(enabled=True, **overrides)
    os.environ.update(to_environment(settings))

    from blendserve.runtime.cpu_platform import best_dtype, needs_cpu_engine
    from blendserve.runtime.default_model import MODEL_NAME, resolve_model_path
    from blendserve.runtime.device import choose_hardware

    name = options.model_path or MODEL_NAME
    if needs_cpu_engine():
        flags = [*_DEFAULT_FLAGS, *_CPU_FLAGS, "--dtype", best_dtype()]
    else:
        flags = [*_DEFAULT_FLAGS, *gpu_flags(argv)]
    wants_help = "-h" in rest or "--help" in rest
    if not wants_help:
        choose_hardware(settings.hardware)
    flags += ["--model-path", name if wants_help else resolve_model_path(name)]
    flags += ["--served-model-name", options.served_model_name or name]
    return settings, [*flags, *rest]


def gpu_flags(argv: Sequence[str]) -> tuple[str, ...]:
    """Our defaults on a GPU beside these flags of the user."""
    given = {word.partition("=")[0] for word in argv}
    return () if given.intersection(_NO_MIXED_STEPS) else _GPU_FLAGS


def main(argv: Sequence[str]) -> int:
    """Serve until stopped: files and batches here, the model in a process of its own."""
    from blendserve.cli.front import serve_front

    nodes = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    nodes.add_argument("--node-rank", type=int, default=0)
    try:
        # Only the first of several nodes has an HTTP server to stand in front of.
        has_front = read(nodes, argv)[0].node_rank == 0
    except ConfigFileError as error:
        print(f"blendserve serve: {error}", file=sys.stderr)
        return 2
    if not has_front or "-h" in argv or "--help" in argv:
        return run_engine(argv)
    return serve_front(argv)


def run_engine(argv: Sequence[str]) -> int:
    """SGLang's server, in this process; `serve` and `run-batch` start it as a child."""
    token = os.environ.pop(TOKEN_VARIABLE, None)
    behind_front = token is not None and PARENT_VARIABLE in os.environ
    if behind_front:
        follow_parent()
    try:
        flags, parser = engine_flags(argv, behind_front=behind_front)
    except expected_errors() as error:
        print(f"blendserve serve: {error}", file=sys.stderr)
        return 2

    from sglang.launch_server import run_server
    from sglang.srt.plugins import load_plugins
    from sglang.srt.server_args import prepare_server_args
    from sglang.srt.utils import kill_process_tree

    load_plugins()
    # SGLang's parser would name an unknown flag without a hint, and only print its own usage.
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


def expected_errors() -> tuple[type[Exception], ...]:
    """What `engine_flags` raises; the message is for the user as it stands."""
    from blendserve.planner import HardwareError
    from blendserve.runtime.default_model import ModelPathError
    from blendserve.runtime.guard import UnsupportedSGLang

    return (ConfigError, ConfigFileError, ModelPathError, HardwareError, UnsupportedSGLang)


def engine_flags(
    argv: Sequence[str], behind_front: bool
) -> tuple[list[str], argparse.ArgumentParser]:
    """Flags for SGLang, and a parser that names a wrong one. Imports SGLang.

    Raises:
        ConfigFileError, UnsupportedSGLang; and what `prepare` raises.
    """
    from blendserve.cli.front import front_flags

    # What the front reads of a file of flags, it has told this process.
    read = front_flags() if behind_front else frozenset()
    parser = Parser(prog="blendserve serve", allow_abbrev=False)
    add_own_flags(parser)
    own = frozenset(parser._option_string_actions)
    stock, switches = stock_flags()
    words = [*config_flags(argv, lambda flag: flag not in read), *without_config(argv)]
    words = switches_set(in_full(words, stock, own), switches)
    _, flags = prepare(words)
    from sglang.srt.server_args import ServerArgs

    ServerArgs.add_cli_args(parser)
    return flags, parser


def _keep_out_of_logs(secret: str) -> None:
    """SGLang logs all its settings at the start, and keys are among them."""

    def hide(record: logging.LogRecord) -> bool:
        record.msg, record.args = record.getMessage().replace(secret, "***"), None
        return True

    logging.getLogger("sglang.srt.entrypoints.engine").addFilter(hide)


if __name__ == "__main__":
    sys.exit(run_engine(sys.argv[1:]))
