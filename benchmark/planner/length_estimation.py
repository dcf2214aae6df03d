"""How well output lengths are estimated: the planner's model against the paper's scheme.

    python benchmark/planner/length_estimation.py

Each job is a public trace behind a system prompt of its own, mixed with MMLU's 5-shot questions;
"all" is every trace and MMLU in one job. Real: lengths, questions, turns. Synthetic: token ids of
the traces (random), MMLU's answers (2 tokens: a letter and the end). A token of an MMLU prompt is
four bytes of its text, so that no tokenizer is needed.

Error: mean over all inner nodes of the prefix tree, the root included, of the absolute error of
the total output of the requests below that were not sampled. Needs the data folder
(BLENDSERVE_DATA, or shared/data beside the repository).
"""

from __future__ import annotations

import argparse
import csv
import gzip
import heapq
import io
import json
import os
import platform
import sys
import zipfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from blendserve.planner import LengthModel, PrefixTree, choose_sample, estimate

ROOT = Path(__file__).parents[2]
DATA = Path(os.environ.get("BLENDSERVE_DATA") or ROOT.parent / "shared" / "data")
RESULTS = ROOT / "benchmark" / "results" / "length_estimation.json"

VOCABULARY = 49_152
SYSTEM_PROMPT_TOKENS = 40
MMLU_OUTPUT_TOKENS = 2
MAX_OUTPUT_TOKENS = 4_096
PER_TRACE = 10_000
SAMPLE = 0.01
SLOTS = 256
LARGE = 100

Errors = tuple[float, float]


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


def jobs() -> Iterator[tuple[str, Requests]]:
    exam = mmlu()
    traces = {
        "sharegpt": single_turns(lengths_csv("nanoflow", "sharegpt.csv"), 1),
        "sharegpt-turns": conversations(2),
        "lmsys": single_turns(lengths_csv("nanoflow", "lmsys.csv"), 3),
        "azure-conv": single_turns(lengths_csv("azure2023", "AzureLLMInferenceTrace_conv.csv"), 4),
        "azure-code": single_turns(lengths_csv("azure2023", "AzureLLMInferenceTrace_code.csv"), 5),
        "burstgpt": single_turns(burstgpt(), 6),
    }
    for name, trace in traces.items():
        yield f"{name}+mmlu", trace + exam
    yield "all", sum(traces.values(), exam)


class Measured:
    """One job with its true lengths; errors of estimates."""

    def __init__(self, requests: Requests) -> None:
        self.tree = PrefixTree.build(requests.prompts)
        self.truth = np.array(requests.output)
        self.limit = np.full(len(self.truth), MAX_OUTPUT_TOKENS)
        self.exact = np.zeros(len(self.truth), dtype=bool)

    def error(self, estimated: NDArray[np.float64], held_out: NDArray[np.bool_]) -> Errors:
        """Mean over inner nodes of |estimated - true| total of the held-out requests below: over
        the nodes with LARGE requests or more, over all nodes."""
        off = np.where(held_out, estimated - self.truth, 0.0)[self.tree.requests]
        errors = np.abs(self.tree.subtree_sum(off))
        large = self.tree.end - self.tree.first >= LARGE
        return float(errors[large].mean()), float(errors.mean())

    def held_out(self, sample: NDArray[np.int64]) -> NDArray[np.bool_]:
        rest = np.ones(len(self.truth), dtype=bool)
        rest[sample] = False
        return rest

    def observed(self, requests: NDArray[np.int64]) -> dict[int, int]:
        return {int(r): int(self.truth[r]) for r in requests}

    def paper(self, sample: NDArray[np.int64]) -> Errors:
        estimated = estimate(self.tree, self.observed(sample), self.limit, self.exact)
        return self.error(estimated, self.held_out(sample))

    def model(self, sample: NDArray[np.int64]) -> Errors:
        learnt = LengthModel(self.tree, self.limit, self.exact).fit(self.observed(sample))
        return self.error(learnt.mean(), self.held_out(sample))

    def online(self, sample: NDArray[np.int64], seed: int) -> list[Errors]:
        """Errors of the first estimates; after a third of the job, of the update with all that is
        known then, and of the update without what the running requests show.

        After the sample the rest runs in random order, SLOTS at a time, a token a step.
        """
        rest = np.random.default_rng(seed).permutation(np.flatnonzero(self.held_out(sample)))
        finished, running = self._after(sample, rest, len(self.truth) // 3)
        left = self.held_out(np.fromiter(finished, dtype=np.int64))
        first = LengthModel(self.tree, self.limit, self.exact).fit(self.observed(sample)).mean()
        update = LengthModel(self.tree, self.limit, self.exact).fit(finished, running).mean()
        blind = LengthModel(self.tree, self.limit, self.exact).fit(finished).mean()
        return [
            self.error(first, self.held_out(sample)),
            self.error(update, left),
            self.error(blind, left),
        ]

    def _after(
        self, sample: NDArray[np.int64], rest: NDArray[np.int64], count: int
    ) -> tuple[dict[int, int], dict[int, int]]:
        """Output of the finished requests, and so far of the running ones, when `count` ended."""
        finished = self.observed(sample)
        slots: list[tuple[int, int, int]] = []  # End, start, request.
        now = 0
        for request in rest.tolist():
            if len(slots) == SLOTS:
                now, _, ended = heapq.heappop(slots)
                finished[ended] = int(self.truth[ended])
                if len(finished) >= count:
                    break
            heapq.heappush(slots, (now + int(self.truth[request]), now, request))
        return finished, {request: now - start for _, start, request in slots}


def measure(job: Measured, seeds: int) -> dict[str, Any]:
    def random_sample(seed: int) -> NDArray[np.int64]:
        n = len(job.truth)
        return np.random.default_rng(seed).permutation(n)[: -(-n // 100)]

    def chosen(seed: int) -> NDArray[np.int64]:
        return choose_sample(job.tree, SAMPLE, seed, 0)

    schemes: dict[str, Callable[[int], Errors]] = {
        "paper_random_sample": lambda seed: job.paper(random_sample(seed)),
        "model_random_sample": lambda seed: job.model(random_sample(seed)),
        "paper_chosen_sample": lambda seed: job.paper(chosen(seed)),
        "model_chosen_sample": lambda seed: job.model(chosen(seed)),
    }
    errors = {name: np.array([one(s) for s in range(seeds)]) for name, one in schemes.items()}
    online = np.array([job.online(chosen(s), s) for s in range(seeds)])
    found: dict[str, Any] = {
        "requests": len(job.truth),
        "subtrees": {
            "large": int((job.tree.end - job.tree.first >= LARGE).sum()),
            "all": job.tree.num_nodes,
        },
        "sampled": len(chosen(0)),
    }
    for at, which in enumerate(("large", "all")):
        means = {name: float(values[:, at].mean()) for name, values in errors.items()}
        paper = means["paper_random_sample"]
        first, updated, blind = online[:, :, at].mean(axis=0)
        found[which] = {
            "error_tokens": {name: round(value, 2) for name, value in means.items()},
            "gain": round(1 - means["model_chosen_sample"] / paper, 4),
            "gain_of_model_alone": round(1 - means["model_random_sample"] / paper, 4),
            "standard_error_of_gain": round(_gain_deviation(errors, at), 4),
            "after_a_third": {
                "first_error_tokens": round(first, 2),
                "updated_error_tokens": round(updated, 2),
                "updated_without_running_error_tokens": round(blind, 2),
                "ratio": round(updated / first, 4),
            },
            "samples": {name: values[:, at].round(1).tolist() for name, values in errors.items()},
        }
    return found


def _gain_deviation(errors: dict[str, NDArray[np.float64]], at: int) -> float:
    """Standard error of 1 - model / paper over the seeds, from the relative errors of both."""
    relative = [
        float(errors[name][:, at].std(ddof=1) / errors[name][:, at].mean()) ** 2
        for name in ("paper_random_sample", "model_chosen_sample")
    ]
    ratio = (
        errors["model_chosen_sample"][:, at].mean() / errors["paper_random_sample"][:, at].mean()
    )
    return float(ratio * np.sqrt(sum(relative) / len(errors["paper_random_sample"])))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seeds", type=int, default=100, help="samples drawn per job")
    parser.add_argument("--json", type=Path, default=RESULTS)
    options = parser.parse_args()
    if not DATA.is_dir():
        sys.exit("The data folder is absent; set BLENDSERVE_DATA to it.")
    results = {}
    print(f"{'job':20} {'large: paper':>12} {'model':>7} {'gain':>6} {'third':>6}", end="")
    print(f" {'all: paper':>12} {'model':>7} {'gain':>6} {'third':>6}")
    for name, requests in jobs():
        results[name] = found = measure(Measured(requests), options.seeds)
        print(f"{name:20}", end="")
        for which in ("large", "all"):
            error, part = found[which]["error_tokens"], found[which]
            print(
                f" {error['paper_random_sample']:12.0f} {error['model_chosen_sample']:7.0f} "
                f"{part['gain']:6.1%} {part['after_a_third']['ratio']:6.2f}",
                end="",
            )
        print(flush=True)
    document = {
        "command": f"python benchmark/planner/length_estimation.py --seeds {options.seeds}",
        "device": f"{platform.machine()}, {os.cpu_count()} cores",
        "versions": {"python": platform.python_version(), "numpy": np.__version__},
        "synthetic": [
            "token ids of the traces (random, of the right length)",
            "MMLU's output lengths (2 tokens) and its tokens (four bytes of the real text each)",
        ],
        "error": "mean over all inner nodes of the tree of the absolute error of the total output "
        "tokens of unsampled requests below; mean over the seeds",
        "sample_fraction": SAMPLE,
        "seeds": options.seeds,
        "jobs": results,
    }
    options.json.parent.mkdir(parents=True, exist_ok=True)
    options.json.write_text(json.dumps(document, indent=1) + "\n")


if __name__ == "__main__":
    main()
