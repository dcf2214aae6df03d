"""What ``-i`` names: files, pipes, globs and folders, in the order in which they are read."""

from __future__ import annotations

import glob
import os
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from blendserve.cli.batch_input import InputError, is_readable
from blendserve.cli.unpack import SUFFIXES

Format = Literal["jsonl", "csv", "tsv", "parquet", "txt", "dataset"]
FORMATS: tuple[Format, ...] = ("jsonl", "csv", "tsv", "parquet", "txt")

_FORMAT_OF: dict[str, Format] = {
    ".jsonl": "jsonl",
    ".ndjson": "jsonl",
    ".json": "jsonl",
    ".csv": "csv",
    ".tsv": "tsv",
    ".txt": "txt",
    ".parquet": "parquet",
    ".pq": "parquet",
}
_URL = re.compile(r"[a-zA-Z][a-zA-Z0-9+.-]+://")
# As those who write folders of parts mark what is none.
_HIDDEN = (".", "_")


@dataclass(frozen=True)
class Source:
    """One file, pipe or data set. name: its path; `-` is stdin."""

    name: str
    format: Format

    @property
    def label(self) -> str:
        """As messages name it."""
        return "stdin" if self.name == "-" else self.name


def expand(given: Sequence[str], form: Format | None = None) -> list[Source]:
    """The sources that are meant, parts of a folder or a glob by name.

    form: what all are; None: as their names say, and JSON lines without a name that says it.

    Raises:
        InputError: one is missing, no input, or named twice.
    """
    found = [source for one in given for source in _expand(one, form)]
    names = [source.name for source in found]
    for name in names:
        if names.count(name) > 1:
            raise InputError(f"input {name} is given twice; name each once")
    return found


def _expand(given: str, form: Format | None) -> Iterator[Source]:
    if _URL.match(given):
        fetch = f"aws s3 cp {given} -" if given.startswith("s3:") else f"curl -fsSL {given}"
        raise InputError(
            f"input {given} is on another machine. Pipe it: {fetch} | blendserve run-batch -i - ..."
        )
    if is_readable(given):
        yield Source(given, form or format_of(given) or "jsonl")
    elif Path(given).is_dir():
        yield from _folder(Path(given), form)
    elif glob.has_magic(given):
        matches = sorted(glob.glob(given, recursive=True))
        if not matches:
            raise InputError(f"no file matches {given}")
        for match in matches:
            yield from _expand(match, form)
    else:
        raise InputError(f"input {given} is not a file")


def format_of(name: str) -> Format | None:
    """What a file's name says that it holds, packed or not."""
    for suffix in SUFFIXES:
        name = name.removesuffix(suffix)
    return _FORMAT_OF.get(Path(name).suffix.lower())


def _folder(folder: Path, form: Format | None) -> Iterator[Source]:
    if (folder / "dataset_dict.json").is_file():
        parts = ", ".join(sorted(path.parent.name for path in folder.glob("*/state.json")))
        raise InputError(
            f"{folder} is a data set of several splits ({parts}); give one, as {folder}/NAME"
        )
    if (folder / "state.json").is_file():
        yield Source(str(folder), "dataset")
        return
    entries = sorted(entry.name for entry in os.scandir(folder))
    entries = [name for name in entries if not name.startswith(_HIDDEN)]
    others = [name for name in entries if not (folder / name).is_file() or not format_of(name)]
    if others:
        raise InputError(
            f"the folder {folder} holds {', '.join(others[:3])}, which is no input. Name what is "
            f"meant, as '{folder}/*.jsonl'"
        )
    if not entries:
        raise InputError(f"the folder {folder} holds no input")
    for name in entries:
        yield Source(str(folder / name), form or format_of(name) or "jsonl")
