"""MMLU as standard 5-shot prompts: the job with the most prefix sharing of the paper."""

from __future__ import annotations

import csv
import importlib.util
import io
import zipfile
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from .traces import data_folder

Tokens = NDArray[np.int32]
Ints = NDArray[np.int64]

OUTPUT_TOKENS = 2  # The letter and the end.
_SUBJECTS = 57
_QUESTIONS = 14_042
_VOCABULARY = 49_152


@dataclass(frozen=True, eq=False)
class Exam:
    """prefixes: the few-shot part of each subject. questions: own tokens of each question, all
    end to end, with offsets; subject: (q,) of each question. source: where they are from."""

    prefixes: list[Tokens]
    questions: Tokens
    offsets: Ints
    subject: Ints
    source: str

    @property
    def question_lengths(self) -> Ints:
        return np.diff(self.offsets)

    @property
    def prefix_lengths(self) -> Ints:
        return np.array([len(prefix) for prefix in self.prefixes], dtype=np.int64)


def exam(synthetic: bool = False) -> Exam:
    """The real questions with a real tokenizer where both are there, else a synthetic twin."""
    found = None if synthetic else _real(data_folder())
    return _twin() if found is None else found


@cache
def _twin() -> Exam:
    """57 subjects with prefixes of 300 to 1,000 tokens behind a common first line, and questions
    of 40 to 160 tokens: sharing and mean length are those of MMLU."""
    rng = np.random.default_rng(57)
    first_line = rng.integers(0, _VOCABULARY, 10)
    prefixes = []
    for length in np.linspace(300, 960, _SUBJECTS).astype(np.int64):
        prefix = rng.integers(0, _VOCABULARY, length)
        prefix[: len(first_line)] = first_line
        prefixes.append(prefix.astype(np.int32))
    lengths = rng.integers(40, 161, _QUESTIONS)
    return Exam(
        prefixes=prefixes,
        questions=rng.integers(0, _VOCABULARY, int(lengths.sum())).astype(np.int32),
        offsets=np.concatenate(([0], np.cumsum(lengths))),
        subject=np.sort(rng.integers(0, _SUBJECTS, _QUESTIONS)),
        source="synthetic: 57 prefixes of 300..960 random tokens, questions uniform in 40..160",
    )


@cache
def _real(folder: Path) -> Exam | None:
    archive_path = folder / "mmlu" / "mmlu.zip"
    tokenizer_path = folder / "smollm2_tokenizer" / "tokenizer.json"
    if not archive_path.is_file():
        return None
    encode: Callable[[list[str]], list[Tokens]]
    if not tokenizer_path.is_file() or importlib.util.find_spec("tokenizers") is None:
        encode, how = _encode_bytes, "four bytes a token"
    else:
        encode, how = _tokenizer(tokenizer_path), "SmolLM2 tokenizer"
    prefixes: list[Tokens] = []
    questions: list[Tokens] = []
    subject: list[int] = []
    with zipfile.ZipFile(archive_path) as archive:
        for name in sorted(archive.namelist()):
            if not (name.startswith("data/test/") and name.endswith("_test.csv")):
                continue
            topic = name.removeprefix("data/test/").removesuffix("_test.csv")
            dev, test = (
                list(csv.reader(io.StringIO(archive.read(f"data/{k}/{topic}_{k}.csv").decode())))
                for k in ("dev", "test")
            )
            shots = (
                "The following are multiple choice questions (with answers) about "
                f"{topic.replace('_', ' ')}.\n\n"
            )
            shots += "".join(_question(row, f" {row[5]}\n\n") for row in dev[:5])
            # Tokens do not cross the blank line, so the examples are tokenised once per subject.
            prefixes += encode([shots])
            found = encode([_question(row) for row in test])
            subject += [len(prefixes) - 1] * len(found)
            questions += found
    lengths = [len(question) for question in questions]
    return Exam(
        prefixes=prefixes,
        questions=np.concatenate(questions),
        offsets=np.concatenate(([0], np.cumsum(lengths))).astype(np.int64),
        subject=np.array(subject, dtype=np.int64),
        source=f"MMLU's {len(questions)} test questions, {how}",
    )


def _question(row: list[str], answer: str = "") -> str:
    choices = "".join(f"\n{letter}. {text}" for letter, text in zip("ABCD", row[1:5], strict=True))
    return f"{row[0]}{choices}\nAnswer:{answer}"


def _tokenizer(path: Path) -> Callable[[list[str]], list[Tokens]]:
    from tokenizers import Tokenizer

    tokenizer = Tokenizer.from_file(str(path))
    return lambda texts: [
        np.array(found.ids, dtype=np.int32) for found in tokenizer.encode_batch_fast(texts)
    ]


def _encode_bytes(texts: list[str]) -> list[Tokens]:
    found = []
    for text in texts:
        raw = text.encode()
        raw += b"\0" * (-len(raw) % 4)
        found.append((np.frombuffer(raw, dtype=">u4") % 0x7FFFFFFF).astype(np.int32))
    return found
