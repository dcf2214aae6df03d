"""The input of ``run-batch``, checked before a model loads."""

from __future__ import annotations

import argparse
import re
from array import array
from collections.abc import AsyncIterator, Callable, Collection, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from blendserve.batch import BatchFault, BatchLimits, BatchLine, LineFault, LineResult, LineSource
from blendserve.batch.endpoints import ENDPOINTS, did_you_mean
from blendserve.batch.line_parser import UnreadableLine, read_entry
from blendserve.batch.lines import iter_lines
from blendserve.batch.refusals import RefusedLine
from blendserve.batch.tool_calls import NEEDS_PARSER, forces_call
from blendserve.batch.validation import validate_file
from blendserve.cli.batch_input import InputError
from blendserve.cli.stock_flags import read

_MAX_LISTED_FAULTS = 50
_NO_REQUEST = ("missing_required_parameter", "custom_id")
_ANY_ENDPOINT = "/v1/chat/completions"


Where = Callable[[int], str]


@dataclass
class CheckedInput:
    """What a good file holds.

    refused: indexes of the lines that will be answered as errors, counted from 0 without blank
    ones; refusals: what is wrong with the first of them. where: names the place of a line.
    """

    endpoint: str
    total: int = 0
    refused: array[int] = field(default_factory=lambda: array("Q"))
    refusals: list[BatchFault] = field(default_factory=list)
    where: Where | None = None


def check(
    path: Path,
    name: str,
    limits: BatchLimits,
    *,
    models: Collection[str] = (),
    strict: bool = False,
    parses_calls: bool = True,
    where: Where | None = None,
) -> CheckedInput:
    """Reads the whole file.

    Args:
        models: names that the engine will answer to; empty: not known yet.
        parses_calls: the engine will be able to read calls of tools.
        strict: takes a line with a bad body for a fault of the file.
        where: the place of a line by its number, where the file is made of several.

    Raises:
        InputError: lists the bad lines of a file that cannot be run.
    """
    checked = CheckedInput(_endpoint(path, name, limits, where), where=where)

    def refuse(line: RefusedLine) -> None:
        checked.refused.append(line.index)
        for fault in line.faults:
            if len(checked.refusals) < limits.max_listed_faults:
                named = BatchFault(
                    code=fault.code, message=fault.message, param=fault.param, line=line.number
                )
                checked.refusals.append(named)

    engine = _FutureEngine(models, parses_calls)
    verdict = validate_file(path, checked.endpoint, engine, limits, lambda: False, refuse)
    checked.total = verdict.total
    faults = verdict.faults
    if strict:
        faults = sorted([*faults, *checked.refusals], key=lambda fault: fault.line or 0)
    if faults:
        most = limits.max_listed_faults if strict else None
        listed = fault_lines(faults, most, where)
        listed += _remedies(faults)
        raise InputError("\n".join([f"{name} cannot be run:", *listed]))
    return checked


def served_models(flags: Sequence[str]) -> frozenset[str]:
    """The names that an engine with these flags of `serve` answers to; empty: unknown."""
    from blendserve.runtime.default_model import MODEL_NAME

    # The names are in the file, or other machines' engines have them.
    elsewhere = {"--config", "--engine-urls"}
    if any(flag.partition("=")[0] in elsewhere for flag in flags):
        return frozenset()
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    parser.add_argument("--model-path", "--model", default=MODEL_NAME)
    parser.add_argument("--served-model-name")
    known, _ = read(parser, flags)
    return frozenset({known.model_path, known.served_model_name or known.model_path})


def parses_calls(flags: Sequence[str]) -> bool:
    """Whether an engine with these flags of `serve` can read calls of tools; true if unknown."""
    if any(flag.partition("=")[0] in ("--engine-urls", "--ray") for flag in flags):
        return True
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    parser.add_argument("--tool-call-parser")
    known, _ = read(parser, flags)
    return known.tool_call_parser is not None


def fault_lines(
    faults: Sequence[BatchFault], most: int | None = None, where: Where | None = None
) -> list[str]:
    """Faults as lines of text, and how many more there are than `most`."""
    most = _MAX_LISTED_FAULTS if most is None else most
    place = where if where is not None else "line {}".format
    listed = []
    for fault in faults[:most]:
        message = fault.message
        if fault.code == "duplicate_custom_id":
            # It names the other line as the whole counts it.
            message = re.sub(r"line (\d+)", lambda found: place(int(found[1])), message)
        at = f"{place(fault.line)}: " if fault.line else ""
        listed.append(f"  {at}{message} ({fault.code})")
    if len(faults) > most:
        listed.append(f"  and {len(faults) - most} more")
    return listed


def _remedies(faults: Sequence[BatchFault]) -> list[str]:
    if any((fault.code, fault.param) == _NO_REQUEST for fault in faults):
        return [
            "A line of a batch file has custom_id, method, url and body. Of rows, --prompt-column "
            "or --template says what the prompt is."
        ]
    if (faults[0].code, faults[0].line) == ("invalid_json_line", 1):
        return ["Input of another kind than batch lines needs --format csv, tsv, parquet or txt."]
    if all(fault.code != "model_not_found" for fault in faults):
        return []
    return ["--served-model-name NAME gives the model that you load the name that the file has."]


def _endpoint(path: Path, name: str, limits: BatchLimits, where: Where | None) -> str:
    """The url of the first line that has one; the check finds what is wrong with the others."""
    with path.open("rb") as stream:
        for line in iter_lines(stream, limits.max_line_bytes):
            try:
                url = None if line.data is None else read_entry(line.data).fields.get("url")
            except UnreadableLine:
                continue
            if not isinstance(url, str):
                continue
            if url not in ENDPOINTS:
                place = where(line.number) if where is not None else f"line {line.number}"
                raise InputError(
                    f"{name}, {place}: there is no endpoint {url[:80]!r}; "
                    f"use one of {', '.join(sorted(ENDPOINTS))}.{did_you_mean(url)}"
                )
            return url
    return _ANY_ENDPOINT


class _FutureEngine:
    """Stands for an engine that is not there yet: it takes every endpoint."""

    endpoints = ENDPOINTS
    fingerprint = ""

    def __init__(self, models: Collection[str], parses_calls: bool) -> None:
        self.models = frozenset(models)
        self._parses_calls = parses_calls

    def check(self, line: BatchLine) -> LineFault | None:
        if self._parses_calls or not forces_call(line.body):
            return None
        return LineFault("tool_call_parser_missing", NEEDS_PARSER, "body.tool_choice")

    def run(
        self,
        job_id: str,
        lines: LineSource,
        pending: Sequence[int],
        on_start: Callable[[int], None],
        deadline: float | None = None,
    ) -> AsyncIterator[LineResult]:
        raise NotImplementedError("it is there to check against")
