"""``blendserve run-batch``: a file of requests in, a file of answers out, no server to manage.

The batch service runs in this process, over a folder beside the output file; the engine is a child
process. All state is durable at any instant, so the same command started again goes on where the
last one ended, however that ended.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import signal
import tempfile
import traceback
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path

from rich.console import Console

from blendserve.batch import BatchDirectoryError, BatchLimits, BatchObject
from blendserve.cli.arguments import price
from blendserve.cli.arrow import need_arrow
from blendserve.cli.batch_input import InputError
from blendserve.cli.carried import Carried, read_columns
from blendserve.cli.display import BatchDisplay, JsonStatus
from blendserve.cli.earlier_run import EarlierRun
from blendserve.cli.engine_process import EngineFailed
from blendserve.cli.front import settings_of, split_flags
from blendserve.cli.input_check import CheckedInput, check, fault_lines, parses_calls, served_models
from blendserve.cli.input_flags import add_input_flags
from blendserve.cli.job_input import job_input
from blendserve.cli.offline_job import JobRefused, OfflineJob
from blendserve.cli.outcome import causes, keep_log
from blendserve.cli.parquet_output import is_parquet
from blendserve.cli.row_mapping import read_mapping
from blendserve.cli.run_state import RunState, StateBusy
from blendserve.cli.shard import read_shard, shard_file
from blendserve.cli.sources import Source, expand
from blendserve.cli.stock_flags import ConfigFileError
from blendserve.config import ConfigError

# Limits protect a shared server; this one is the user's own.
LIMITS = BatchLimits(max_lines=10**9, max_file_bytes=10**13, mixed_endpoints=True)

# Exit statuses, for whoever decides what to do next (docs/batch.md).
ALL_ANSWERED = 0
SOME_FAILED = 1
REFUSED = 2
INTERRUPTED = 3
STOPPED = 130

_MAX_TOLD_REFUSALS = 10


class RunBatchError(RuntimeError):
    """The run cannot start; the message says what to do."""


def main(argv: Sequence[str]) -> int:
    """Exit status: see above."""
    options, server_flags = _parse(argv)
    console = Console(stderr=True)
    try:
        return _checked_run(options, server_flags, console)
    except (RunBatchError, InputError, JobRefused, ConfigError, ConfigFileError) as error:
        _say(console, f"blendserve run-batch: {error}")
        return REFUSED
    except EngineFailed as error:
        _say(console, f"blendserve run-batch: {error}")
        # What a command ends with that does not understand its flags.
        return REFUSED if error.status == REFUSED else INTERRUPTED
    except (StateBusy, BatchDirectoryError) as error:
        _say(console, f"blendserve run-batch: {error}")
        return INTERRUPTED
    except OSError as error:
        _say(
            console, f"blendserve run-batch: {error}. The same command goes on once that is mended."
        )
        return INTERRUPTED
    except (KeyboardInterrupt, asyncio.CancelledError):
        without = " without --overwrite" if options.begun_anew else ""
        console.print(f"Stopped. The same command{without} goes on from here.")
        return STOPPED
    except Exception:
        # A fault of ours. Python's own status for it would say that some lines have failed.
        _say(console, traceback.format_exc())
        return INTERRUPTED


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
        *("-i", "--input"),
        required=True,
        nargs="+",
        action="extend",
        help="files, globs, folders, pipes, - for stdin: batch lines, or rows of a table",
    )
    parser.add_argument("-o", "--output", type=Path, required=True, help="answers with status 200")
    parser.add_argument(
        "--errors", type=Path, help="lines without one (default: OUTPUT's name with .errors.jsonl)"
    )
    begin = parser.add_mutually_exclusive_group()
    begin.add_argument(
        "--overwrite", action="store_true", help="begin anew; replace an earlier output at the end"
    )
    begin.add_argument(
        "--retry-failed",
        action="store_true",
        help="run the lines again that OUTPUT of an earlier run has no answer to, and add them",
    )
    parser.add_argument("--ordered", action="store_true", help="sort the answers as the input is")
    parser.add_argument(
        "--strict", action="store_true", help="refuse a file with any line that cannot be answered"
    )
    parser.add_argument(
        "--dry-run", action="store_true", help="check the file, print plan and time, run nothing"
    )
    parser.add_argument(
        "--price-per-hour", type=price, metavar="P", help="of one device, for --dry-run"
    )
    parser.add_argument(
        "--shard",
        metavar="I/N",
        help="run part I of N, from 0; auto: as this task of a Slurm array or indexed job says",
    )
    parser.add_argument(
        "--state", type=Path, help="folder for the run's state, on a local disk (default: by -o)"
    )
    add_input_flags(parser)
    parser.add_argument("--json", action="store_true", help="status as JSON lines on stdout")
    options, rest = parser.parse_known_args(list(argv))
    if not options.output.name:
        parser.error(f"-o {options.output}: give the name of a file")
    if options.errors is None:
        options.errors = options.output.with_suffix(".errors.jsonl")
    try:
        options.mapping, options.carry = read_mapping(options), read_columns(options.carry)
        options.part = None if options.shard is None else read_shard(options.shard)
    except InputError as error:
        parser.error(str(error))
    if options.part is not None:
        options.output = options.part.place(options.output)
        options.errors = options.part.place(options.errors)
    name = options.output.name + ".blendserve"
    options.state = (
        options.output.with_name(name) if options.state is None else options.state / name
    )
    options.begun_anew = False
    return options, rest


def _checked_run(options: argparse.Namespace, server_flags: list[str], console: Console) -> int:
    settings = settings_of(split_flags(server_flags)[0])
    limits = replace(
        LIMITS,
        allow_remote_urls=settings.allow_remote_urls,
        media_root=settings.media_root,
    )
    sources = expand(options.input, options.format)
    _check_paths(options, sources)
    with job_input(
        sources, options.mapping, options.carry, _spool_folder(options), limits.max_line_bytes
    ) as given:
        source = given.path
        checked = check(
            source,
            given.name,
            limits,
            models=served_models(server_flags),
            strict=options.strict,
            where=given.places,
            parses_calls=parses_calls(server_flags),
        )
        _tell_refusals(checked, console, all_of_them=options.dry_run)
        if options.dry_run:
            from blendserve.cli.dry_run import dry_run

            say = partial(_say, console)
            if options.price_per_hour is not None:
                server_flags = [*server_flags, "--price-per-hour", str(options.price_per_hour)]
            return dry_run(source, checked, server_flags, options.json, limits.max_line_bytes, say)
        with contextlib.ExitStack() as stack:
            if options.part is not None:
                cut = shard_file(
                    source, options.part, _spool_folder(options), limits.max_line_bytes
                )
                source, count = stack.enter_context(cut)
                _say(console, f"Part {options.part}: {count} of {checked.total} lines.")
                if not count:
                    options.output.touch()
                    return ALL_ANSWERED
                checked = check(source, given.name, limits)
            state = stack.enter_context(RunState(options.state))
            if options.overwrite:
                state.set_aside()
                options.begun_anew = True
            return _run(
                options, server_flags, source, checked, limits, state, console, given.carried
            )


def _check_parquet(options: argparse.Namespace) -> None:
    if is_parquet(options.errors):
        raise RunBatchError(f"--errors {options.errors}: errors are JSON lines; give a .jsonl name")
    if not is_parquet(options.output):
        return
    for flag, given in (("--retry-failed", options.retry_failed), ("--shard", options.part)):
        if given:
            raise RunBatchError(f"{flag} works on JSON lines: give an -o that ends with .jsonl")
    need_arrow(f"writing {options.output}")


def _check_paths(options: argparse.Namespace, sources: Sequence[Source]) -> None:
    _check_parquet(options)
    results = [path.resolve() for path in (options.output, options.errors)]
    for folder in (Path(given).resolve() for given in options.input if Path(given).is_dir()):
        if any(folder in path.parents for path in results):
            raise RunBatchError(
                f"results in the input folder {folder} would be input the next time; give an -o "
                "outside of it"
            )
    inputs = {Path(source.name).resolve() for source in sources if source.name != "-"}
    paths = [*results, *inputs]
    if len(set(paths)) < len(paths):
        raise RunBatchError("input, output and errors must be three different files")
    state = options.state.resolve()
    if any(path == state or state in path.parents for path in paths):
        raise RunBatchError(f"{options.state} holds this command's state; keep files out of it")
    if options.state.exists() and not options.state.is_dir():
        raise RunBatchError(f"{options.state} is in the way; it must be a folder, or not exist")
    if options.dry_run:
        return
    if not options.state.parent.is_dir() and options.state.parent != options.output.parent:
        raise RunBatchError(f"the folder {options.state.parent} for the state does not exist")
    # With its state still there, an output is half of what this very command was putting in place.
    may_exist = options.overwrite or options.retry_failed or options.state.is_dir()
    for path in (options.output, options.errors):
        if path.is_dir():
            raise RunBatchError(f"{path} is a folder; give the name of a file in it")
        if not path.parent.is_dir():
            raise RunBatchError(f"the folder of {path} does not exist")
        if path.exists() and not path.is_file():
            raise RunBatchError(
                f"{path} is a device, pipe or socket. Answers appear whole, at the end, so give "
                "the name of a file."
            )
        if path.exists() and not may_exist:
            raise RunBatchError(
                f"{path} exists already. Give another name, --retry-failed to run again what has "
                "no answer in it, or --overwrite to replace it."
            )


def _spool_folder(options: argparse.Namespace) -> Path:
    """Where there is room for the input: on the disk that is to hold the answers."""
    folder: Path = options.output.parent
    is_place = folder.is_dir() and (options.output.is_file() or not options.output.exists())
    # Only a dry run comes here with an -o like /dev/null.
    return folder if is_place else Path(tempfile.gettempdir())


def _tell_refusals(checked: CheckedInput, console: Console, *, all_of_them: bool) -> None:
    if not checked.refused:
        return
    number = len(checked.refused)
    lines = "1 line cannot run and is" if number == 1 else f"{number} lines cannot run and are"
    _say(console, f"{lines} answered as an error (--strict refuses such a file):")
    most = len(checked.refusals) if all_of_them else _MAX_TOLD_REFUSALS
    for line in fault_lines(checked.refusals, most, checked.where):
        _say(console, line)


def _run(
    options: argparse.Namespace,
    server_flags: list[str],
    source: Path,
    checked: CheckedInput,
    limits: BatchLimits,
    state: RunState,
    console: Console,
    carried: Carried | None,
) -> int:
    log = options.state / "server.log"
    earlier = None
    if options.retry_failed:
        earlier = EarlierRun(options.output, options.errors, source, limits.max_line_bytes)
    job = OfflineJob(
        options.state,
        options.output,
        options.errors,
        limits,
        server_flags,
        log=log,
        in_order=options.ordered,
        earlier=earlier,
        carried=carried,
    )
    reporter = JsonStatus() if options.json else BatchDisplay(console)
    total = checked.total

    def placed(batch: BatchObject, answers: int) -> None:
        counts = batch.request_counts
        failed = f", {counts.failed} failed in {options.errors}" if counts.failed else ""
        _say(console, f"{batch.status}: {answers} answered in {options.output}{failed}")

    with contextlib.closing(job):
        batch_id = job.resume(source)
        if batch_id is None and earlier is not None:
            with earlier.unanswered(_spool_folder(options)) as (rest, count):
                if count:
                    _say(
                        console, f"{count} of {checked.total} lines have no answer, and run again."
                    )
                    batch_id, total = job.begin(rest, source, checked.endpoint), count
        elif batch_id is None:
            batch_id = job.begin(source, source, checked.endpoint)
        if batch_id is not None:
            _say(console, f"Starting the engine (its log: {log}) ...")
            _say(console, f"Answers so far: {' and '.join(map(str, job.live_paths))}")
            with reporter:
                batch = asyncio.run(_until_stopped(job, batch_id, reporter, total, placed))
    if batch_id is None:
        state.remove()
        _say(console, f"Every line has its answer in {options.output}; there is nothing to do.")
        return ALL_ANSWERED
    counts = batch.request_counts
    kept = keep_log(log, options.output) if counts.failed else None
    state.remove()
    if counts.failed:
        for line in causes(options.errors):
            _say(console, line)
    if kept is not None:
        _say(console, f"The engine's log: {kept}")
    if isinstance(reporter, JsonStatus):
        event = {"state": "placed", **counts.model_dump(), "usage": batch.usage.model_dump()}
        reporter.say({**event, "server_log": kept and str(kept)})
    return SOME_FAILED if counts.failed else ALL_ANSWERED


async def _until_stopped(
    job: OfflineJob,
    batch_id: str,
    reporter: BatchDisplay | JsonStatus,
    total: int,
    placed: Callable[[BatchObject, int], None],
) -> BatchObject:
    """SIGTERM stops as Ctrl-C does: at once, with everything that has arrived saved."""
    task = asyncio.current_task()
    assert task is not None
    asyncio.get_running_loop().add_signal_handler(signal.SIGTERM, task.cancel)
    return await job.run(batch_id, reporter, total=total, on_placed=placed)
