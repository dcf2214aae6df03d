"""How well output lengths are estimated: the planner's model against the paper's scheme.

    python benchmark/planner/length_estimation.py

Jobs: every public trace by itself; each mixed with MMLU's 5-shot questions; "all" is every trace
and MMLU in one job. What of them is real and what synthetic: `traces.py`.

Error: mean over all inner nodes of the prefix tree, the root included, of the absolute error of
the total output of the requests below that were not sampled. Floors, which nothing that draws as
many samples can get below, but for luck:

- Large subtrees: the error of a sample. An oracle knows of every trace, up to one factor, how mean
  lengths depend on prompt length and continuation, and how far lengths deviate from that; it gives
  no sample to MMLU, and the traces as many as is best.
- All subtrees: the lengths' own spread. An oracle knows the mean length in each bin of prompt
  length and continuation, and after a third of the job when each running request ends.
"""

from __future__ import annotations

import argparse
import heapq
import json
import math
import os
import platform
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from traces import DATA, MAX_OUTPUT_TOKENS, ROOT, Requests, mmlu, traces

from blendserve.planner import (
    LengthModel,
    PrefixTree,
    choose_sample,
    choose_second_sample,
    estimate,
    first_part,
    sample_size,
)
from blendserve.planner.length_factors import continuation_tokens, length_bins

RESULTS = ROOT / "benchmark" / "results" / "length_estimation.json"

SAMPLE = 0.01
SLOTS = 256
LARGE = 100

Errors = tuple[float, float]
Ints = NDArray[np.int64]
Floats = NDArray[np.float64]


def jobs() -> Iterator[tuple[str, Requests, Ints]]:
    """Name, requests, and the number of the trace of each: 0 is MMLU."""
    exam, parts = mmlu(), traces()

    def joined(named: list[str], with_exam: bool) -> tuple[Requests, Ints]:
        chosen = [exam] * with_exam + [parts[name] for name in named]
        number = np.arange(len(chosen)) + (not with_exam)
        return sum(chosen[1:], chosen[0]), np.repeat(number, [len(c.output) for c in chosen])

    for name in parts:
        yield name, *joined([name], with_exam=False)
    for name in parts:
        yield f"{name}+mmlu", *joined([name], with_exam=True)
    yield "all", *joined(list(parts), with_exam=True)


class Measured:
    """One job with its true lengths; errors of estimates."""

    def __init__(self, requests: Requests, trace: Ints) -> None:
        self.tree = PrefixTree.build(requests.prompts)
        self.truth = np.array(requests.output)
        self.trace = trace
        self.n = len(self.truth)
        self.size = sample_size(self.n, SAMPLE, 0)
        self.limit = np.full(self.n, MAX_OUTPUT_TOKENS)
        self.exact = np.zeros(self.n, dtype=bool)
        self.large = self.tree.end - self.tree.first >= LARGE
        # Mean length of each request's bin.
        cell = np.empty(self.n, dtype=np.int64)
        by_prompt, by_continuation = length_bins(self.tree)
        cell[self.tree.requests] = 1000 * by_prompt + by_continuation
        _, cell = np.unique(trace * 1_000_000 + cell, return_inverse=True)
        self.bin_mean = (np.bincount(cell, weights=self.truth) / np.bincount(cell))[cell]
        self.prompt, self.continuation = np.empty((2, self.n), dtype=np.int64)
        self.prompt[self.tree.requests] = self.tree.length
        self.continuation[self.tree.requests] = continuation_tokens(self.tree)

    # -- samples

    def random_sample(self, seed: int) -> Ints:
        return np.random.default_rng(seed).permutation(self.n)[: self.size]

    def first_part(self, seed: int) -> Ints:
        return choose_sample(self.tree, first_part(self.size), seed)

    def two_parts(self, seed: int) -> Ints:
        first = self.first_part(seed)
        model = self.fitted(self.observed(first))
        sampled = ~self.held_out(first)
        second = choose_second_sample(
            self.tree, self.size, seed, sampled, model.deviation(), model.mean(), ~sampled
        )
        return np.concatenate((first, second))

    def held_out(self, sample: Ints) -> NDArray[np.bool_]:
        rest = np.ones(self.n, dtype=bool)
        rest[sample] = False
        return rest

    def observed(self, requests: Ints) -> dict[int, int]:
        return {int(r): int(self.truth[r]) for r in requests}

    # -- errors

    def error(self, estimated: Floats, held_out: NDArray[np.bool_]) -> Errors:
        """Mean over inner nodes of |estimated - true| total of the held-out requests below: over
        the nodes with LARGE requests or more, over all nodes."""
        off = np.where(held_out, estimated - self.truth, 0.0)[self.tree.requests]
        errors = np.abs(self.tree.subtree_sum(off))
        return float(errors[self.large].mean()), float(errors.mean())

    def fitted(
        self, finished: dict[int, int], running: dict[int, int] | None = None
    ) -> LengthModel:
        return LengthModel(self.tree, self.limit, self.exact).fit(finished, running)

    def paper(self, sample: Ints) -> Errors:
        estimated = estimate(self.tree, self.observed(sample), self.limit, self.exact)
        return self.error(estimated, self.held_out(sample))

    def model(self, sample: Ints) -> Errors:
        return self.error(self.fitted(self.observed(sample)).mean(), self.held_out(sample))

    def online(self, sample: Ints, seed: int) -> list[Errors]:
        """Errors after a third of the job: of the update with all that is known then, of the update
        without what the running requests show, and of the oracle.

        After the sample the rest runs in random order, SLOTS at a time, a token a step.
        """
        rest = np.random.default_rng(seed).permutation(np.flatnonzero(self.held_out(sample)))
        finished, running = self._after(sample, rest, self.n // 3)
        left = self.held_out(np.fromiter(finished, dtype=np.int64))
        oracle = self.bin_mean.copy()
        oracle[list(running)] = self.truth[list(running)]
        return [
            self.error(self.fitted(finished, running).mean(), left),
            self.error(self.fitted(finished).mean(), left),
            self.error(oracle, left),
        ]

    def _after(self, sample: Ints, rest: Ints, count: int) -> tuple[dict[int, int], dict[int, int]]:
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

    # -- floors

    def sampling_floor(self) -> float:
        """Mean over the large subtrees of the error of the best sample (see above): the root's and
        each trace's, normally distributed; the others' is taken as none."""
        sums = []  # N times the deviation that is not explained, of each trace.
        for trace in np.unique(self.trace[self.trace > 0]):
            members = np.flatnonzero(self.trace == trace)
            continued = self.continuation[members] > 0
            squares = 0.0
            for part, key in (
                (members[continued], self.continuation),
                (members[~continued], self.prompt),
            ):
                # Half the mean squared difference of neighbours.
                lengths = self.truth[part[np.argsort(key[part], kind="stable")]]
                if len(lengths) > 1:
                    squares += len(lengths) * float(np.mean(np.diff(lengths) ** 2)) / 2
            sums.append(math.sqrt(len(members) * squares))
        spread = np.array(sums)
        best = math.inf
        for power in np.linspace(0.6, 1.0, 9):
            samples = self.size * spread**power / (spread**power).sum()
            deviations = spread / np.sqrt(samples)
            root = math.sqrt(float((deviations**2).sum()))
            best = min(best, float(deviations.sum()) + root)
        return math.sqrt(2 / math.pi) * best / int(self.large.sum())

    def spread_floor(self, sample: Ints) -> float:
        return self.error(self.bin_mean, self.held_out(sample))[1]


def measure(job: Measured, seeds: int) -> dict[str, Any]:
    random = [job.random_sample(seed) for seed in range(seeds)]
    one_part = [choose_sample(job.tree, job.size, seed) for seed in range(seeds)]
    two_parts = [job.two_parts(seed) for seed in range(seeds)]
    errors = {
        "paper_random_sample": np.array([job.paper(sample) for sample in random]),
        "model_random_sample": np.array([job.model(sample) for sample in random]),
        "paper_two_part_sample": np.array([job.paper(sample) for sample in two_parts]),
        "model_one_part_sample": np.array([job.model(sample) for sample in one_part]),
        "model_two_part_sample": np.array([job.model(sample) for sample in two_parts]),
    }
    online = np.array([job.online(sample, seed) for seed, sample in enumerate(two_parts)])
    floors = (
        job.sampling_floor(),
        float(np.mean([job.spread_floor(sample) for sample in two_parts[:20]])),
    )
    found: dict[str, Any] = {
        "requests": job.n,
        "subtrees": {"large": int(job.large.sum()), "all": job.tree.num_nodes},
        "sampled": job.size,
    }
    for at, which in enumerate(("large", "all")):
        means = {name: float(values[:, at].mean()) for name, values in errors.items()}
        paper = means["paper_random_sample"]
        first = means["model_two_part_sample"]
        updated, blind, oracle = online[:, :, at].mean(axis=0)
        found[which] = {
            "error_tokens": {name: round(value, 2) for name, value in means.items()},
            "floor_tokens": round(floors[at], 2),
            "gain": round(1 - means["model_two_part_sample"] / paper, 4),
            "standard_error_of_gain": round(_gain_deviation(errors, at), 4),
            "gain_at_the_floor": round(1 - floors[at] / paper, 4),
            "after_a_third": {
                "first_error_tokens": round(first, 2),
                "updated_error_tokens": round(updated, 2),
                "updated_without_running_error_tokens": round(blind, 2),
                "oracle_error_tokens": round(oracle, 2),
                "ratio": round(updated / first, 4),
                "ratio_of_the_oracle": round(oracle / first, 4),
            },
            "samples": {
                name: values[:, at].round(1).tolist()
                for name, values in errors.items()
                if name in ("paper_random_sample", "model_two_part_sample")
            },
        }
    return found


def _gain_deviation(errors: dict[str, Floats], at: int) -> float:
    """Standard error of 1 - model / paper over the seeds, from the relative errors of both."""
    paper = errors["paper_random_sample"][:, at]
    model = errors["model_two_part_sample"][:, at]
    relative = [float(e.std(ddof=1) / e.mean()) ** 2 for e in (paper, model)]
    return float(model.mean() / paper.mean() * np.sqrt(sum(relative) / len(paper)))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seeds", type=int, default=400, help="samples drawn per job")
    parser.add_argument("--json", type=Path, default=RESULTS)
    options = parser.parse_args()
    if not DATA.is_dir():
        sys.exit("The data folder is absent; set BLENDSERVE_DATA to it.")
    results = {}
    header = f"{'model':>7} {'gain':>6} {'floor':>6} {'third':>6} {'floor':>6}"
    print(f"{'job':20} {'large: paper':>12} {header} {'all: paper':>12} {header}")
    for name, requests, trace in jobs():
        results[name] = found = measure(Measured(requests, trace), options.seeds)
        print(f"{name:20}", end="")
        for which in ("large", "all"):
            error, part = found[which]["error_tokens"], found[which]
            third = part["after_a_third"]
            print(
                f" {error['paper_random_sample']:12.0f} {error['model_two_part_sample']:7.0f} "
                f"{part['gain']:6.1%} {part['gain_at_the_floor']:6.1%} {third['ratio']:6.2f} "
                f"{third['ratio_of_the_oracle']:6.2f}",
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
