"""``run-batch --shard``: one part of a file, of as many as there are tasks, with no coordinator.

Every task finds the same parts from the file alone, without a tokenizer: prompts that begin alike
are kept together, and all parts are alike in work.
"""

from __future__ import annotations

import contextlib
import os
import re
from array import array
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import orjson

from blendserve.batch.line_parser import read_entry
from blendserve.batch.lines import iter_lines
from blendserve.cli.batch_input import InputError, path_of, spool
from blendserve.planner.flat_tokens import FlatTokens
from blendserve.planner.shards import shards

# Four bytes of a prompt are about a token.
_TOKEN_BYTES = 4
# How long answers get is not known: half their limit, and not more than this.
_NO_LIMIT_TOKENS = 512
_MAX_OUTPUT_TOKENS = 1_024
_PROMPTS = ("messages", "prompt", "input", "items", "documents")
# What they answer is not generated.
_NO_ANSWER_TOKENS = ("/v1/classify", "/v1/embeddings", "/v1/rerank", "/v1/score")
_FORM = re.compile(r"(auto|\d+)(?:/(\d+))?")


@dataclass(frozen=True)
class Shard:
    """Part `index` of `count`, from 0."""

    index: int
    count: int

    def __str__(self) -> str:
        return f"{self.index}/{self.count}"

    def place(self, path: Path) -> Path:
        """Where this part of a file lies."""
        return path.with_name(f"{path.stem}.shard-{self.index}-of-{self.count}{path.suffix}")


def read_shard(text: str, environment: Mapping[str, str] = os.environ) -> Shard:
    """`3/8`; `auto`: what a Slurm array's task or an indexed job's pod is. Raises InputError."""
    match = _FORM.fullmatch(text)
    if match is None or (match[1] != "auto" and match[2] is None):
        raise InputError(f"--shard {text}: give INDEX/COUNT, as 0/8, or auto")
    if match[1] == "auto":
        index, count = _from_environment(environment)
        count = int(match[2]) if match[2] is not None else count
    else:
        index, count = int(match[1]), int(match[2])
    if count is None:
        raise InputError(
            "--shard auto: JOB_COMPLETION_INDEX is set, and JOB_COMPLETIONS is not. Set it to the "
            "job's `completions`, or give --shard auto/COUNT"
        )
    if not 0 <= index < count:
        raise InputError(f"--shard {text}: part {index} of {count} is none; they count from 0")
    return Shard(index, count)


def _from_environment(environment: Mapping[str, str]) -> tuple[int, int | None]:
    def number(name: str, default: int | None = None) -> int | None:
        value = environment.get(name)
        if value is None:
            return default
        if not value.isascii() or not value.isdigit():
            raise InputError(f"--shard auto: {name} is {value!r}, which is no number")
        return int(value)

    task = number("SLURM_ARRAY_TASK_ID")
    if task is not None:
        first, step = number("SLURM_ARRAY_TASK_MIN", 0) or 0, number("SLURM_ARRAY_TASK_STEP", 1)
        return (task - first) // (step or 1), number("SLURM_ARRAY_TASK_COUNT")
    index = number("JOB_COMPLETION_INDEX")
    if index is None:
        raise InputError(
            "--shard auto: this is neither a task of a Slurm array (SLURM_ARRAY_TASK_ID) nor a pod "
            "of an indexed job (JOB_COMPLETION_INDEX). Give --shard INDEX/COUNT"
        )
    return index, number("JOB_COMPLETIONS")


@contextlib.contextmanager
def shard_file(
    source: Path, shard: Shard, folder: Path, max_line_bytes: int
) -> Iterator[tuple[Path, int]]:
    """A temporary file in `folder` with the lines of one part, as they stand; and their number.

    source: a file that has been checked. Memory: the prompts once, and 60 bytes a line.
    """
    owner = _owners(source, shard.count, max_line_bytes)
    with spool(folder) as file:
        count = 0
        with source.open("rb") as stream:
            for index, line in enumerate(iter_lines(stream, max_line_bytes)):
                if owner[index] == shard.index and line.data is not None:
                    file.write(line.data + b"\n")
                    count += 1
        file.flush()
        yield path_of(file), count


def _owners(source: Path, count: int, max_line_bytes: int) -> list[int]:
    tokens = array("i")
    lengths, outputs = array("q"), array("q")
    with source.open("rb") as stream:
        for line in iter_lines(stream, max_line_bytes):
            prompt, output = _work(line.data)
            tokens.frombytes(prompt)
            lengths.append(len(prompt) // _TOKEN_BYTES)
            outputs.append(output)
    offsets = np.concatenate(([0], np.cumsum(np.array(lengths, dtype=np.int64))))
    flat = FlatTokens(np.frombuffer(tokens, dtype=np.int32), offsets)
    found: list[int] = shards(flat, np.array(outputs, dtype=np.int64), count).tolist()
    return found


def _work(data: bytes | None) -> tuple[bytes, int]:
    """A line's prompt as whole tokens of bytes, and what it may answer."""
    fields = {} if data is None else read_entry(data).fields
    body = fields.get("body")
    if not isinstance(body, dict):
        return b"", 0
    prompt = _prompt(body)
    padded = prompt + b"\0" * (-len(prompt) % _TOKEN_BYTES)
    # Token ids are not negative.
    values = np.frombuffer(padded, dtype="<i4") & 0x7FFFFFFF
    tokens = values.astype("=i4").tobytes()
    if fields.get("url") in _NO_ANSWER_TOKENS:
        return tokens, 1
    limit = next(
        (
            value
            for name in ("max_completion_tokens", "max_tokens", "max_output_tokens")
            if type(value := body.get(name)) is int and value >= 0
        ),
        _NO_LIMIT_TOKENS,
    )
    return tokens, min(limit // 2 + 1, _MAX_OUTPUT_TOKENS)


def _prompt(body: dict[str, Any]) -> bytes:
    given = next((body[key] for key in _PROMPTS if key in body), None)
    # What a chat template puts first comes first.
    named = [body[key] for key in ("tools", "instructions", "query") if body.get(key)]
    try:
        return orjson.dumps([*named, given])
    except (TypeError, ValueError):
        # It will be answered with an error.
        return b""
