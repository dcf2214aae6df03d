"""The jobs that all engines run, as lines of a batch file.

Every line is a chat completion, because vLLM's `run-batch` takes no other, with temperature 0, and
it ignores the end token, so that all engines compute equally many tokens.
"""

from __future__ import annotations

import csv
import io
import json
import os
import random
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

from blendserve.runtime.default_model import MODEL_NAME

Line = dict[str, Any]
ROOT = Path(__file__).parents[2]
DATA = Path(os.environ.get("BLENDSERVE_DATA") or ROOT.parent / "shared" / "data")
SUBJECTS, QUESTIONS, ANSWER_TOKENS, OPEN_PROMPTS = 26, 8, 4, 192
WORDS = (
    *("river", "stone", "light", "paper", "green", "quick", "table", "summer", "house", "music"),
    *("window", "garden", "silver", "letter", "mountain", "yellow", "engine", "bread", "forest"),
)


class DataMissing(RuntimeError):
    """A job's data is not on this machine; the message names it."""


def demo() -> list[Line]:
    """The lines of `make demo`, in the file's order, which is random."""
    file = ROOT / "examples" / "demo_batch.jsonl"
    lines = [json.loads(text) for text in file.read_text().splitlines()]
    return [
        line_of(line["custom_id"], line["body"]["messages"], line["body"]["max_tokens"])
        for line in lines
    ]


def mmlu() -> list[Line]:
    """400 lines: real 5-shot questions of 26 subjects, and long generations, in random order."""
    archive_path = DATA / "mmlu" / "mmlu.zip"
    if not archive_path.is_file():
        raise DataMissing(
            f"the job 'mmlu' needs {archive_path}, which is not part of this repository: set "
            "BLENDSERVE_DATA to the folder that holds mmlu/mmlu.zip (hendrycks/test)"
        )
    rng = random.Random(0)
    prompts: list[tuple[str, int]] = []
    with zipfile.ZipFile(archive_path) as archive:

        def rows(part: str, subject: str) -> list[list[str]]:
            text = archive.read(f"data/{part}/{subject}_{part}.csv").decode()
            return list(csv.reader(io.StringIO(text)))

        before, behind = "data/test/", "_test.csv"
        subjects = sorted(
            name.removeprefix(before).removesuffix(behind)
            for name in archive.namelist()
            if name.startswith(before) and name.endswith(behind)
        )
        for subject in rng.sample(subjects, SUBJECTS):
            topic = subject.replace("_", " ")
            shots = f"The following are multiple choice questions (with answers) about {topic}.\n\n"
            shots += "".join(question(row, f" {row[5]}\n\n") for row in rows("dev", subject)[:5])
            chosen = rng.sample(rows("test", subject), QUESTIONS)
            prompts += [(shots + question(row), ANSWER_TOKENS) for row in chosen]
    for k in range(OPEN_PROMPTS):
        topic = subjects[k % len(subjects)].replace("_", " ")
        length = 24 * (1 + k % 5)  # 24 to 120, 72 on average
        prompts.append((f"Write chapter {k} of a long introduction to {topic}.", length))
    rng.shuffle(prompts)
    return [
        line_of(f"mmlu-{k}", [{"role": "user", "content": prompt}], tokens)
        for k, (prompt, tokens) in enumerate(prompts)
    ]


def question(row: list[str], answer: str = "") -> str:
    choices = "".join(f"\n{k}. {text}" for k, text in zip("ABCD", row[1:5], strict=True))
    return f"{row[0]}{choices}\nAnswer:{answer}"


def chat() -> list[Line]:
    """160 lines, synthetic: the turns of 40 conversations behind 4 system prompts, shuffled. Each
    turn's prompt holds those before it; words are random, lengths as people's chats have them."""
    rng = random.Random(3)

    def words(count: int) -> str:
        return " ".join(rng.choice(WORDS) for _ in range(count))

    def length(median: int, most: int) -> int:
        return max(4, min(most, int(rng.lognormvariate(0, 0.8) * median)))

    systems = [words(120) for _ in range(4)]
    lines = []
    for k in range(40):
        messages = [{"role": "system", "content": systems[k % len(systems)]}]
        for turn in range(4):
            messages = [*messages, {"role": "user", "content": words(length(40, 150))}]
            answer = length(50, 160)
            lines.append(line_of(f"chat-{k}-{turn}", messages, answer))
            messages = [*messages, {"role": "assistant", "content": words(answer)}]
    rng.shuffle(lines)
    return lines


JOBS: dict[str, Callable[[], list[Line]]] = {"demo": demo, "mmlu": mmlu, "chat": chat}


def warm_up() -> list[Line]:
    """What every engine runs once before its job, because its first steps take longer."""
    text = "warm up " * 300
    return [line_of(f"warm-{k}", [{"role": "user", "content": f"{k} {text}"}], 4) for k in range(2)]


def line_of(custom_id: str, messages: list[dict[str, str]], tokens: int) -> Line:
    body = {
        "model": MODEL_NAME,
        "messages": messages,
        "max_tokens": tokens,
        "temperature": 0,
        "ignore_eos": True,
    }
    return {
        "custom_id": custom_id,
        "method": "POST",
        "url": "/v1/chat/completions",
        "body": body,
    }


def presorted(lines: list[Line]) -> list[Line]:
    """Sorted by their text, so that lines with equal prefixes are neighbours."""

    def text(line: Line) -> list[str]:
        return [message["role"] + message["content"] for message in line["body"]["messages"]]

    return sorted(lines, key=text)
