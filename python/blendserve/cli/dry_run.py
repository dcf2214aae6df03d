"""``run-batch --dry-run``: the plan of the file for the model and the device of the flags."""

from __future__ import annotations

import argparse
import os
import tempfile
from collections.abc import Sequence
from pathlib import Path

from blendserve.batch.lines import iter_lines
from blendserve.cli import plan
from blendserve.cli.batch_input import InputError, path_of, spool
from blendserve.cli.input_check import CheckedInput
from blendserve.cli.stock_flags import read


def dry_run(
    source: Path,
    checked: CheckedInput,
    server_flags: Sequence[str],
    as_json: bool,
    max_line_bytes: int,
) -> int:
    """Prints the plan of the lines that can run; 0, or 2 if there is none: `plan` says why.

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
    if as_json:
        argv.append("--json")
    if not checked.refused:
        return 2 if plan.main(["-i", str(source), *argv]) else 0
    refused = frozenset(checked.refused)
    with spool(Path(tempfile.gettempdir())) as good:
        with source.open("rb") as stream:
            for index, line in enumerate(iter_lines(stream, max_line_bytes)):
                if index not in refused and line.data is not None:
                    good.write(line.data + b"\n")
        good.flush()
        return 2 if plan.main(["-i", str(path_of(good)), *argv]) else 0


def _this_machine() -> str:
    from blendserve.runtime.device import choose_hardware

    try:
        return choose_hardware("auto").name
    except ValueError as error:
        raise InputError(str(error)) from error
