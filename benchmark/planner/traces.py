"""The public traces and MMLU as requests: prompts with their output lengths.

Real: lengths, questions, turns. Synthetic: token ids of the traces (random, of the right length)
and MMLU's answers (2 tokens: a letter and the end). A token of an MMLU prompt is four bytes of its
text, so that no tokenizer is needed. Needs the data folder (BLENDSERVE_DATA, or shared/data beside
the repository).
"""

from __future__ import annotations

import csv
import gzip
import io
import json
import os
import zipfile
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

ROOT = Path(__file__).parents[2]
DATA = Path(os.environ.get("BLENDSERVE_DATA") or ROOT.parent / "shared" / "data")

VOCABULARY = 49_152
SYSTEM_PROMPT_TOKENS = 40
MMLU_OUTPUT_TOKENS = 2
MAX_OUTPUT_TOKENS = 4_096
PER_TRACE = 10_000


@dataclass
class Requests:
    prompts: list[NDArray[np.int32]]
    output: list[int]

    def __add__(self, other: Requests) -> Requests:
        return Requests(self.prompts + other.prompts, self.output + other.output)


def lengths_csv(*parts: str) -> list[tuple[int, int]]:
    with open(DATA.joinpath(*parts), newline="") as file:
        rows = list(csv.DictReader(file))
    return [(int(row["ContextTokens"]), int(row["GeneratedTokens"])) for row in rows]


def burstgpt() -> list[tuple[int, int]]:
    found = json.loads((DATA / "burstgpt" / "burst_data_8000.json").read_text())
    rows = next(v for v in found.values() if isinstance(v, list))
    return [(int(row["input_length"]), int(row["output_length"])) for row in rows]


def single_turns(pairs: list[tuple[int, int]], seed: int) -> Requests:
    """Random tokens of the right length behind one system prompt."""
    rng = np.random.default_rng(seed)
    chosen = rng.permutation(len(pairs))[:PER_TRACE]
    system = rng.integers(0, VOCABULARY, SYSTEM_PROMPT_TOKENS).astype(np.int32)
    prompts, output = [], []
    for index in chosen:
        prompt_tokens, output_tokens = pairs[index]
        own = rng.integers(0, VOCABULARY, max(prompt_tokens, 1)).astype(np.int32)
        prompts.append(np.concatenate((system, own)))
        output.append(min(output_tokens, MAX_OUTPUT_TOKENS))
    return Requests(prompts, output)


def conversations(seed: int) -> Requests:
    """Every turn of ShareGPT conversations as a request: its history is the prompt before it."""
    rng = np.random.default_rng(seed)
    system = rng.integers(0, VOCABULARY, SYSTEM_PROMPT_TOKENS).astype(np.int32)
    prompts: list[NDArray[np.int32]] = []
    output: list[int] = []
    stream, last = np.empty(0, dtype=np.int32), ""
    with gzip.open(DATA / "sharegpt" / "sharegpt_v3_turn_lengths_smollm2.csv.gz", "rt") as file:
        for row in csv.DictReader(file):
            if row["conv"] != last:
                if len(prompts) >= PER_TRACE:
                    break
                stream, last = system, row["conv"]
            need = len(system) + int(row["history_tokens"]) + int(row["user_tokens"])
            if need > len(stream):
                more = rng.integers(0, VOCABULARY, need - len(stream)).astype(np.int32)
                stream = np.concatenate((stream, more))
            prompts.append(stream[:need])
            output.append(min(int(row["output_tokens"]), MAX_OUTPUT_TOKENS))
    return Requests(prompts, output)


def mmlu() -> Requests:
    """The test questions behind their subject's five examples, four bytes of text a token."""

    def question(row: list[str], answer: str = "") -> str:
        choices = "".join(f"\n{k}. {text}" for k, text in zip("ABCD", row[1:5], strict=True))
        return f"{row[0]}{choices}\nAnswer:{answer}"

    def tokens(text: str) -> NDArray[np.int32]:
        raw = text.encode()
        raw += b"\0" * (-len(raw) % 4)
        return (np.frombuffer(raw, dtype=">u4") % 0x7FFFFFFF).astype(np.int32)

    prompts = []
    with zipfile.ZipFile(DATA / "mmlu" / "mmlu.zip") as archive:
        for name in sorted(archive.namelist()):
            if not (name.startswith("data/test/") and name.endswith("_test.csv")):
                continue
            subject = name.removeprefix("data/test/").removesuffix("_test.csv")
            dev, test = (
                list(csv.reader(io.StringIO(archive.read(f"data/{k}/{subject}_{k}.csv").decode())))
                for k in ("dev", "test")
            )
            topic = subject.replace("_", " ")
            shots = f"The following are multiple choice questions (with answers) about {topic}.\n\n"
            shots += "".join(question(row, f" {row[5]}\n\n") for row in dev[:5])
            prefix = tokens(shots)
            prompts += [np.concatenate((prefix, tokens(question(row)))) for row in test]
    return Requests(prompts, [MMLU_OUTPUT_TOKENS] * len(prompts))


def traces() -> dict[str, Requests]:
    """Up to PER_TRACE requests of each trace, behind a system prompt of its own."""
    return {
        "sharegpt": single_turns(lengths_csv("nanoflow", "sharegpt.csv"), 1),
        "sharegpt-turns": conversations(2),
        "lmsys": single_turns(lengths_csv("nanoflow", "lmsys.csv"), 3),
        "azure-conv": single_turns(lengths_csv("azure2023", "AzureLLMInferenceTrace_conv.csv"), 4),
        "azure-code": single_turns(lengths_csv("azure2023", "AzureLLMInferenceTrace_code.csv"), 5),
        "burstgpt": single_turns(burstgpt(), 6),
    }
