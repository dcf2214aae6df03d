"""The ``blendserve`` command."""

from __future__ import annotations

import importlib.util
import sys
from collections.abc import Callable, Iterable, Sequence

from blendserve import __version__

# Commands that run an engine, and what only an installation of SGLang brings.
_WITH_ENGINE = frozenset({"calibrate", "engine", "serve", "run-batch"})
# With these the engines are on other machines.
_ENGINES_ELSEWHERE = frozenset({"--engine-urls", "--ray"})
_ENGINE_PACKAGES = frozenset({"sglang", "torch", "transformers", "safetensors", "gguf"})

_USAGE = """\
usage: blendserve COMMAND [options]

commands:
  serve       start an SGLang server that schedules blended and speaks OpenAI's Batch API
  engine      start one of several engines, for `serve --engine-urls`
  run-batch   run a file of requests offline, and write the answers to a file
  batches     list, follow and fetch the batches of a server
  merge       put the results of `run-batch --shard` together, once they are complete
  plan        say what a file of requests will cost and how it will be ordered, without a GPU
  simulate    run a job on a modelled engine, under one scheduling policy after the other
  trace       sum up, and draw, what the steps of a server did
  calibrate   measure this machine and a model on it, for --hardware of the others
  doctor      say what this machine is, what `serve` would use on it, and what is missing

Every SGLang flag works under its own name with `serve` and `run-batch`.
`blendserve COMMAND --help` lists all.
"""


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command; the return value is the exit status."""
    args = list(sys.argv[1:] if argv is None else argv)
    if not args or args[0] in ("-h", "--help"):
        print(_USAGE, end="")
        return 0 if args else 2
    if args[0] == "--version":
        print(f"blendserve {__version__}")
        return 0
    commands: dict[str, Callable[[list[str]], int]] = {
        "serve": _serve,
        "engine": _engine,
        "run-batch": _run_batch,
        "batches": _batches,
        "merge": _merge,
        "plan": _plan,
        "simulate": _simulate,
        "trace": _trace,
        "calibrate": _calibrate,
        "doctor": _doctor,
    }
    command = commands.get(args[0])
    if command is None:
        print(
            f"blendserve: unknown command {args[0]!r}. {_nearest(args[0], commands)}",
            file=sys.stderr,
        )
        return 2
    wants_help = "-h" in args or "--help" in args
    try:
        elsewhere = _ENGINES_ELSEWHERE.intersection(word.partition("=")[0] for word in args)
        if args[0] in _WITH_ENGINE and not wants_help and not elsewhere:
            _must_have_sglang()
        return command(args[1:])
    except ModuleNotFoundError as error:
        if (error.name or "").partition(".")[0] not in _ENGINE_PACKAGES:
            raise
        print(f"blendserve {args[0]}: {_without(error.name)}", file=sys.stderr)
        return 0 if wants_help else 2


def _must_have_sglang() -> None:
    """Say so before anything is started."""
    if importlib.util.find_spec("sglang") is None:
        raise ModuleNotFoundError(name="sglang")


def _without(package: str | None) -> str:
    from blendserve.runtime.guard import NEWEST_SGLANG, OLDEST_SGLANG

    return (
        f"this needs SGLang ({OLDEST_SGLANG} to {NEWEST_SGLANG}), and {package} is not installed: "
        "`pip install 'blendserve[gpu]'` brings it, and `make setup` the build for CPUs. "
        "`blendserve plan` and `simulate` work without."
    )


def _nearest(word: str, commands: Iterable[str]) -> str:
    import difflib

    near = difflib.get_close_matches(word, commands, n=1)
    return f"Did you mean {near[0]!r}?" if near else f"Known: {', '.join(sorted(commands))}."


# Imported late: each command loads only what it needs, and SGLang takes seconds.
def _serve(argv: list[str]) -> int:
    from blendserve.cli.serve import main as serve

    return serve(argv)


def _engine(argv: list[str]) -> int:
    from blendserve.cli.engine import main as engine

    return engine(argv)


def _run_batch(argv: list[str]) -> int:
    from blendserve.cli.run_batch import main as run_batch

    return run_batch(argv)


def _batches(argv: list[str]) -> int:
    from blendserve.cli.batches import main as batches

    return batches(argv)


def _merge(argv: list[str]) -> int:
    from blendserve.cli.merge import main as merge

    return merge(argv)


def _plan(argv: list[str]) -> int:
    from blendserve.cli.plan import main as plan

    return plan(argv)


def _simulate(argv: list[str]) -> int:
    from blendserve.cli.simulate import main as simulate

    return simulate(argv)


def _trace(argv: list[str]) -> int:
    from blendserve.cli.trace import main as trace

    return trace(argv)


def _calibrate(argv: list[str]) -> int:
    from blendserve.cli.calibrate import main as calibrate

    return calibrate(argv)


def _doctor(argv: list[str]) -> int:
    from blendserve.cli.doctor import main as doctor

    return doctor(argv)
