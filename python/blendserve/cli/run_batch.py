"""``blendserve run-batch``: a file of requests in, a file of answers out, no server to manage.

The batch service runs in this process, over a folder beside the output file; the engine is a child
process. All state is durable at any instant, so the same command started again goes on where the
last one ended, however that ended.
"""

from __future__ import annotations

import argparse
import asyncio
import os
import shutil
import signal
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from rich.console import Console

from blendserve.batch import BatchDirectoryError, BatchLimits, BatchObject
from blendserve.cli.batch_input import InputError, check, plain_file
from blendserve.cli.engine_process import EngineFailed
from blendserve.cli.follow import BatchDisplay, JsonStatus
from blendserve.cli.front import settings_of, split_flags
from blendserve.cli.offline_job import JobRefused, OfflineJob
from blendserve.cli.stock_flags import ConfigFileError, config_flags, front_in_full
from blendserve.config import ConfigError

# Limits protect a shared server; this one is the user's own.
LIMITS = BatchLimits(max_lines=10**9, max_file_bytes=10**13)


class RunBatchError(RuntimeError):
    """The run cannot start or go on; the message says what to do."""


def main(argv: Sequence[str]) -> int:
    """Exit status: 0 every line answered, 1 some lines failed or the run did, 2 wrong usage."""
    options, server_flags = _parse(argv)
    console = Console(stderr=True)
    try:
        settings = settings_of(split_flags(server_flags)[0])
        options.limits = replace(LIMITS, allow_remote_urls=settings.allow_remote_urls)
        _check_paths(options)
        with plain_file(options.input, options.output.parent) as source:
            endpoint = check(source, options.input, options.limits)
            if options.dry_run:
                return _dry_run(source, server_flags, options.json)
            _clear(options)
            return _run(options, server_flags, source, endpoint, console)
    except (
        *(RunBatchError, InputError, JobRefused, ConfigFileError),
        *(EngineFailed, BatchDirectoryError, ConfigError),
    ) as error:
        _say(console, f"blendserve run-batch: {error}")
        return 1
    except (KeyboardInterrupt, asyncio.CancelledError):
        console.print("Stopped. The same command goes on from here.")
        return 130


def _say(console: Console, text: str) -> None:
    # Not folded or coloured: paths in messages must stay whole, for eyes and for grep.
    console.print(text, highlight=False, markup=False, emoji=False, soft_wrap=True)


def _parse(argv: Sequence[str]) -> tuple[argparse.Namespace, list[str]]:
    parser = argparse.ArgumentParser(
        prog="blendserve run-batch",
        description="Run an OpenAI batch file offline.",
        epilog="Every flag of `blendserve serve`, so every SGLang flag, may follow.",
        allow_abbrev=False,
    )
    parser.add_argument(
        "-i", "--input", required=True, help="OpenAI batch file (JSONL, .gz, .zst, - for stdin)"
    )
    parser.add_argument("-o", "--output", type=Path, required=True, help="answers with status 200")
    parser.add_argument(
        "--errors", type=Path, help="lines without one (default: OUTPUT's name with .errors.jsonl)"
    )
    parser.add_argument(
        "--overwrite", action="store_true", help="drop an earlier output and its state, begin anew"
    )
    parser.add_argument("--ordered", action="store_true", help="sort the answers as the input is")
    parser.add_argument(
        "--dry-run", action="store_true", help="check the file, print plan and time, run nothing"
    )
    parser.add_argument("--json", action="store_true", help="status as JSON lines on stdout")
    options, rest = parser.parse_known_args(list(argv))
    if not options.output.name:
        parser.error(f"-o {options.output}: give the name of a file")
    if options.errors is None:
        options.errors = options.output.with_suffix(".errors.jsonl")
    options.state = options.output.with_name(options.output.name + ".blendserve")
    return options, rest


def _check_paths(options: argparse.Namespace) -> None:
    paths = [path.resolve() for path in (options.output, options.errors)]
    if options.input != "-":
        if not Path(options.input).is_file():
            raise RunBatchError(f"input {options.input} is not a file")
        paths.append(Path(options.input).resolve())
    if len(set(paths)) < len(paths):
        raise RunBatchError("input, output and errors must be three different files")
    state = options.state.resolve()
    if any(path == state or state in path.parents for path in paths):
        raise RunBatchError(f"{options.state} holds this command's state; keep files out of it")
    if options.state.exists() and not options.state.is_dir():
        raise RunBatchError(f"{options.state} is in the way; it must be a folder, or not exist")
    # With its state still there, an output is half of what this very command was putting in place.
    resumed = options.state.is_dir()
    for path in (options.output, options.errors):
        if path.is_dir():
            raise RunBatchError(f"{path} is a folder; give the name of a file in it")
        if not path.parent.is_dir():
            raise RunBatchError(f"the folder of {path} does not exist")
        if path.exists() and not (options.overwrite or options.dry_run or resumed):
            raise RunBatchError(
                f"{path} exists already. Give another name, or --overwrite to replace it."
            )


def _clear(options: argparse.Namespace) -> None:
    """Make room for the answers, once everything else has been found right."""
    if options.overwrite:
        options.output.unlink(missing_ok=True)
        options.errors.unlink(missing_ok=True)
        shutil.rmtree(options.state, ignore_errors=True)
    options.state.mkdir(exist_ok=True)


def _run(
    options: argparse.Namespace,
    server_flags: list[str],
    source: Path,
    endpoint: str,
    console: Console,
) -> int:
    log = options.state / "server.log"
    job = OfflineJob(
        options.state,
        options.output,
        options.errors,
        options.limits,
        server_flags,
        log=log,
        in_order=options.ordered,
    )
    try:
        batch_id = job.prepare(source, endpoint)
        _say(console, f"Starting the engine (its log: {log}) ...")
        _say(console, f"Answers so far: {' and '.join(map(str, job.live_paths))}")
        reporter = JsonStatus() if options.json else BatchDisplay(console)
        with reporter:
            batch = asyncio.run(_until_stopped(job, batch_id, reporter))
        job.place(batch)
    finally:
        job.close()
    shutil.rmtree(options.state)
    counts = batch.request_counts
    failed = f", {counts.failed} failed in {options.errors}" if counts.failed else ""
    _say(console, f"{batch.status}: {counts.completed} answered in {options.output}{failed}")
    if isinstance(reporter, JsonStatus):
        reporter.say({"state": "placed", **counts.model_dump(), "usage": batch.usage.model_dump()})
    return 1 if counts.failed or batch.status != "completed" else 0


async def _until_stopped(
    job: OfflineJob, batch_id: str, reporter: BatchDisplay | JsonStatus
) -> BatchObject:
    """SIGTERM stops as Ctrl-C does: at once, with everything that has arrived saved."""
    task = asyncio.current_task()
    assert task is not None
    asyncio.get_running_loop().add_signal_handler(signal.SIGTERM, task.cancel)
    return await job.run(batch_id, reporter)


def _dry_run(source: Path, server_flags: Sequence[str], as_json: bool) -> int:
    """The plan of the file for the model and the device that the flags name."""
    from blendserve.cli import plan
    from blendserve.runtime.default_model import MODEL_NAME, ModelPathError, resolve_model_path

    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    parser.add_argument("--model-path", "--model", default=MODEL_NAME)
    parser.add_argument("--hardware", default=os.environ.get("BLENDSERVE_HARDWARE", "auto"))
    parser.add_argument("--tp-size", "--tensor-parallel-size", "--tp", default="1")
    parser.add_argument("--dp-size", "--data-parallel-size", "--dp", default="1")
    parser.add_argument("--max-total-tokens")
    parser.add_argument("--sample-fraction")
    names = frozenset(parser._option_string_actions)
    flags = front_in_full(server_flags, names)
    known, _ = parser.parse_known_args([*config_flags(flags, names.__contains__), *flags])
    try:
        model = resolve_model_path(known.model_path)
    except ModelPathError as error:
        raise RunBatchError(str(error)) from error
    hardware = known.hardware if known.hardware != "auto" else _this_machine()
    argv = ["-i", str(source), "--model-spec", model, "--tokenizer", model]
    argv += ["--hardware", hardware, "--tp", known.tp_size, "--dp", known.dp_size]
    if known.max_total_tokens:
        argv += ["--kv-tokens", known.max_total_tokens]
    if known.sample_fraction:
        argv += ["--sample-fraction", known.sample_fraction]
    return plan.main([*argv, "--json"] if as_json else argv)


def _this_machine() -> str:
    from blendserve.runtime.device import choose_hardware

    try:
        return choose_hardware("auto").name
    except ValueError as error:
        raise RunBatchError(str(error)) from error
