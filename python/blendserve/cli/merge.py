"""``blendserve merge``: the results of all parts of ``run-batch --shard`` together, or a refusal.

A merged file has an answer or an error to every line of the input, and none twice.
"""

from __future__ import annotations

import argparse
import os
import re
import secrets
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path

import orjson

from blendserve.batch.directory import fsync_folder
from blendserve.batch.line_parser import UnreadableLine, read_entry
from blendserve.batch.lines import iter_lines
from blendserve.cli.batch_input import InputError, plain_file
from blendserve.cli.carried import read_columns
from blendserve.cli.input_flags import add_input_flags
from blendserve.cli.job_input import job_input
from blendserve.cli.row_mapping import read_mapping
from blendserve.cli.run_batch import ALL_ANSWERED, INTERRUPTED, LIMITS, REFUSED, SOME_FAILED
from blendserve.cli.shard import Shard
from blendserve.cli.sources import expand

_SHARD_NAME = re.compile(r"\.shard-(\d+)-of-(\d+)")
_MAX_NAMED = 5
_MAX_SHOWN = 80


class Incomplete(RuntimeError):
    """Lines have no result yet; the message names some."""


def main(argv: Sequence[str]) -> int:
    """Exit status: as of run-batch; 3 while parts are missing."""
    options = _parse(argv)
    try:
        sources = expand(options.input, options.format)
        folder, most = options.output.parent, LIMITS.max_line_bytes
        with job_input(sources, options.mapping, options.carry, folder, most) as given:
            failed = merge(str(given.path), options.output, options.errors, options.overwrite)
    except InputError as error:
        print(f"blendserve merge: {error}", file=sys.stderr)
        return REFUSED
    except (Incomplete, OSError) as error:
        print(f"blendserve merge: {error}", file=sys.stderr)
        return INTERRUPTED
    return SOME_FAILED if failed else ALL_ANSWERED


def _parse(argv: Sequence[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="blendserve merge",
        description="Put the results of `run-batch --shard` together, once they are complete.",
        allow_abbrev=False,
    )
    parser.add_argument(
        *("-i", "--input"),
        required=True,
        nargs="+",
        action="extend",
        help="the whole input of all parts",
    )
    add_input_flags(parser)
    parser.add_argument(
        "-o", "--output", type=Path, required=True, help="the -o of all parts; the parts lie there"
    )
    parser.add_argument(
        "--errors", type=Path, help="the --errors of all parts (default: as in run-batch)"
    )
    parser.add_argument("--overwrite", action="store_true", help="replace an earlier result")
    options = parser.parse_args(list(argv))
    try:
        options.mapping, options.carry = read_mapping(options), read_columns(options.carry)
    except InputError as error:
        parser.error(str(error))
    if options.errors is None:
        options.errors = options.output.with_suffix(".errors.jsonl")
    return options


def merge(source: str, output: Path, errors: Path, overwrite: bool = False) -> int:
    """Write both files, each whole and durable; the number of errors. Parts stay as they are.

    Raises:
        InputError: a line is answered twice, or is not one of the input's; or other wrong usage.
        Incomplete: some lines have no result.
    """
    for path in (output, errors):
        if path.exists() and not overwrite:
            raise InputError(f"{path} exists already; give --overwrite to replace it")
    count = _count_of(output, errors)
    parts = {kind: _parts(path, count) for kind, path in (("out", output), ("err", errors))}
    with plain_file(source, output.parent) as plain:
        wanted = _ids(plain)
    seen: dict[str, Path] = {}
    for path in (path for paths in parts.values() for path in paths if path.exists()):
        for name, _ in _results(path):
            if name in seen:
                raise InputError(
                    f"{name[:_MAX_SHOWN]!r} has a result in {seen[name]} and in {path}: these are "
                    "not the parts of one run. Nothing is written"
                )
            if name not in wanted:
                raise InputError(
                    f"{path} has a result of {name[:_MAX_SHOWN]!r}, which the input does not have"
                )
            seen[name] = path
    if missing := wanted - seen.keys():
        raise Incomplete(_missing(missing, parts["out"], parts["err"]))
    failed = _write(parts["err"], errors)
    _write(parts["out"], output)
    return failed


def _count_of(output: Path, errors: Path) -> int:
    counts = {
        int(match[2])
        for path in (output, errors)
        for found in path.parent.glob(f"{_escaped(path.stem)}.shard-*-of-*{path.suffix}")
        if (match := _SHARD_NAME.search(found.name.removeprefix(path.stem)))
        and Shard(int(match[1]), int(match[2])).place(path) == found
    }
    if not counts:
        raise InputError(f"there are no parts like {Shard(0, 2).place(output)}")
    if len(counts) > 1:
        several = " and ".join(map(str, sorted(counts)))
        raise InputError(f"beside {output} lie parts of {several}; remove those of the other run")
    return counts.pop()


def _escaped(stem: str) -> str:
    return re.sub(r"([*?\[])", r"[\1]", stem)


def _parts(path: Path, count: int) -> list[Path]:
    return [Shard(index, count).place(path) for index in range(count)]


def _ids(path: Path) -> set[str]:
    ids: set[str] = set()
    with path.open("rb") as stream:
        for line in iter_lines(stream, LIMITS.max_line_bytes):
            try:
                name = None if line.data is None else read_entry(line.data).fields["custom_id"]
            except (UnreadableLine, KeyError):
                name = None
            if not isinstance(name, str):
                raise InputError(f"line {line.number} of the input has no custom_id")
            ids.add(name)
    return ids


def _results(path: Path) -> Iterator[tuple[str, bytes]]:
    with path.open("rb") as lines:
        for number, line in enumerate(lines, start=1):
            try:
                name = orjson.loads(line)["custom_id"]
                if not isinstance(name, str) or not line.endswith(b"\n"):
                    raise ValueError
            except (ValueError, KeyError, TypeError) as error:
                raise InputError(f"{path}, line {number} is no result of a run") from error
            yield name, line


def _missing(missing: set[str], outputs: Sequence[Path], errors: Sequence[Path]) -> str:
    named = ", ".join(repr(name[:_MAX_SHOWN]) for name in sorted(missing)[:_MAX_NAMED])
    absent = [
        str(index)
        for index, paths in enumerate(zip(outputs, errors, strict=True))
        if not any(path.exists() for path in paths)
    ]
    parts = f" Of {len(outputs)} parts, {', '.join(absent)} have not ended." if absent else ""
    return f"{len(missing)} lines have no result yet, as {named}.{parts} Nothing is written."


def _write(parts: Sequence[Path], target: Path) -> int:
    """The parts' lines in one file; their number. No file for none."""
    draft = target.with_name(f".{target.name}.{secrets.token_hex(4)}")
    lines = 0
    try:
        with draft.open("wb") as file:
            for path in parts:
                if path.exists():
                    for _, line in _results(path):
                        file.write(line)
                        lines += 1
            file.flush()
            os.fsync(file.fileno())
        if lines:
            os.replace(draft, target)
        else:
            target.unlink(missing_ok=True)
        fsync_folder(target.parent)
    finally:
        draft.unlink(missing_ok=True)
    return lines


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
