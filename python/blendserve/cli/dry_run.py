"""``run-batch --dry-run``: the plan of the file for the model and the device of the flags."""

from __future__ import annotations

import argparse
import os
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path

import orjson

from blendserve.batch import BatchFault
from blendserve.batch.line_parser import read_entry
from blendserve.batch.lines import iter_lines
from blendserve.cli import plan
from blendserve.cli.batch_input import InputError, path_of, spool
from blendserve.cli.input_check import CheckedInput, fault_lines
from blendserve.cli.stock_flags import read


def dry_run(
    source: Path,
    checked: CheckedInput,
    server_flags: Sequence[str],
    as_json: bool,
    max_line_bytes: int,
    say: Callable[[str], None],
) -> int:
    """Prints the plan of the lines that can run; 0, or 2 if there is none: `plan` says why.

    Args:
        say: called with what is wrong with lines that the engine would refuse.

    Raises:
        InputError: the model or the device cannot be used.
    """
    from blendserve.runtime.default_model import MODEL_NAME, ModelPathError, resolve_model_path

    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    parser.add_argument("--model-path", "--model", default=MODEL_NAME)
    parser.add_argument("--hardware", default=os.environ.get("BLENDSERVE_HARDWARE", "auto"))
    parser.add_argument("--tp-size", "--tensor-parallel-size", "--tp", default="1")
    parser.add_argument("--dp-size", "--data-parallel-size", "--dp", default="1")
    parser.add_argument("--max-total-tokens")
    parser.add_argument("--sample-fraction")
    parser.add_argument("--price-per-hour")
    known, _ = read(parser, server_flags)
    if len(checked.refused) == checked.total:
        raise InputError("no line of the file can run")
    try:
        model = resolve_model_path(known.model_path)
    except ModelPathError as error:
        raise InputError(str(error)) from error
    hardware = known.hardware if known.hardware != "auto" else _this_machine()
    argv = ["--model-spec", model, "--tokenizer", model]
    argv += ["--hardware", hardware, "--tp", known.tp_size, "--dp", known.dp_size]
    if known.max_total_tokens:
        argv += ["--kv-tokens", known.max_total_tokens]
    if known.sample_fraction:
        argv += ["--sample-fraction", known.sample_fraction]
    if known.price_per_hour:
        argv += ["--price-per-hour", known.price_per_hour]
    if as_json:
        argv.append("--json")
    refused = frozenset(checked.refused)
    faults: list[BatchFault] = []

    def leave_out(number: int, why: str) -> None:
        faults.append(BatchFault(code="bad_request", message=why, line=number))

    with spool(Path(tempfile.gettempdir())) as good:
        next_number = 1
        with source.open("rb") as stream:
            for index, line in enumerate(iter_lines(stream, max_line_bytes)):
                # Left-out lines stay as blank ones, for the others to keep their numbers.
                good.write(b"\n" * (line.number - next_number))
                next_number = line.number + 1
                data = None if index in refused else line.data
                good.write((data and _as_read(data, line.number, leave_out)) or b"")
                good.write(b"\n")
        good.flush()
        failed = plan.main(["-i", str(path_of(good)), *argv], leave_out)
    if faults:
        number = len(faults)
        lines = "1 line is" if number == 1 else f"{number} lines are"
        say(f"{lines} not planned, and the engine would refuse:")
        faults.sort(key=lambda fault: fault.line or 0)
        for text in fault_lines(faults, where=checked.where):
            say(text)
    return 2 if failed else 0


def _as_read(data: bytes, number: int, leave_out: Callable[[int, str], None]) -> bytes | None:
    """The line with its body as the engine would read it; None if it would not."""
    from blendserve.runtime.request_bodies import as_read

    entry = read_entry(data).fields
    try:
        return orjson.dumps({**entry, "body": as_read(entry["url"], entry["body"])})
    except (ValueError, TypeError) as error:
        leave_out(number, str(error))
        return None


def _this_machine() -> str:
    from blendserve.runtime.device import choose_hardware

    try:
        return choose_hardware("auto").name
    except ValueError as error:
        raise InputError(str(error)) from error
