"""Reads a job to simulate: token ids with output lengths, or a table of lengths."""

from __future__ import annotations

import csv
from pathlib import Path

import numpy as np

from blendserve.cli.job_file import Encoder, JobFileError, read_job_file
from blendserve.planner import FlatTokens
from blendserve.simulator.workloads import MAX_OUTPUT_TOKENS, VOCABULARY, Workload

# Column names of public traces for prompt and output tokens, in lower case.
_PROMPT_COLUMNS = ("prompt_tokens", "contexttokens", "input_length", "request tokens")
_OUTPUT_COLUMNS = ("output_tokens", "generatedtokens", "output_length", "response tokens")


def read_workload(path: Path, context_length: int) -> Workload:
    """The requests of a file: `.csv` with a column of prompt and one of output lengths (token ids
    are then random, so that nothing is shared), else lines {"id", "input_ids", "output_len",
    "max_tokens"?}; the limit is all that a policy knows of a length before it has sampled.

    Raises JobFileError that names the file, the line and the remedy.
    """
    if path.suffix.lower() == ".csv":
        return _from_table(path)
    job = read_job_file(path, context_length, _no_text)
    for name, line, length in zip(job.ids, job.lines, job.known_output_tokens, strict=True):
        if length < 0:
            raise JobFileError(
                f"{path}, line {line}: {name!r} has no output_len; a simulation needs the true "
                "length of every output"
            )
    if job.too_long:
        name, line = job.too_long[0]
        raise JobFileError(
            f"{path}, line {line}: {name!r} does not fit the model's context of {context_length} "
            "tokens; shorten or remove it"
        )
    limits = np.array(job.given_limits, dtype=np.int64)
    limits[limits < 0] = MAX_OUTPUT_TOKENS
    output = np.array(job.known_output_tokens)
    return _workload(path, FlatTokens.of(job.token_ids), output, limits)


def _no_text() -> Encoder:
    raise JobFileError(
        'a simulation needs token ids and true output lengths: lines {"id", "input_ids", '
        '"output_len"}, or a .csv of lengths'
    )


def _from_table(path: Path) -> Workload:
    try:
        with path.open(newline="", encoding="utf-8") as file:
            rows = list(csv.reader(file))
    except (OSError, UnicodeDecodeError) as error:
        raise JobFileError(f"{path}: cannot be read as a table ({error})") from error
    header = [name.strip().lower() for name in rows[0]] if rows else []
    columns = []
    for names in (_PROMPT_COLUMNS, _OUTPUT_COLUMNS):
        at = next((header.index(name) for name in names if name in header), None)
        if at is None:
            raise JobFileError(
                f"{path}, line 1: no column {names[0]!r} (nor {', '.join(names[1:])}); the first "
                "line must name the columns"
            )
        columns.append(at)
    lengths = []
    for number, row in enumerate(rows[1:], start=2):
        if not row:
            continue
        try:
            pair = [int(row[at]) for at in columns]
        except (ValueError, IndexError) as error:
            raise JobFileError(
                f"{path}, line {number}: {','.join(row)[:60]!r} has no two whole numbers of tokens"
            ) from error
        if min(pair) < 0:
            raise JobFileError(f"{path}, line {number}: a length is negative")
        lengths.append(pair)
    if not lengths:
        raise JobFileError(f"{path} has no requests below its first line")
    table = np.array(lengths, dtype=np.int64)
    offsets = np.concatenate(([0], np.cumsum(table[:, 0])))
    tokens = np.random.default_rng(0).integers(0, VOCABULARY, int(offsets[-1]), dtype=np.int32)
    return _workload(path, FlatTokens(tokens, offsets), table[:, 1])


def _workload(
    path: Path, prompts: FlatTokens, output: np.ndarray, limits: np.ndarray | None = None
) -> Workload:
    """limits: max_tokens of each; without them no limit tells a short request from a long one."""
    n = len(output)
    if limits is None:
        limits = np.full(n, MAX_OUTPUT_TOKENS)
    return Workload(
        name=path.name,
        prompts=prompts,
        # A request without output still ends with the step that prefills it.
        output_tokens=np.maximum(output, 1).astype(np.int64),
        max_output_tokens=np.maximum(output, limits).astype(np.int64),
        source=np.zeros(n, dtype=np.int64),
        sources=(path.name,),
    )
