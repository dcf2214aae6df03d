"""How long OpenMP's threads should spin: one engine alone, and two on the same cores.

    python benchmark/runtime/openmp_spin.py --json benchmark/results/openmp-spin.json

Synthetic: the products of a decode step of 22 requests with SmolLM2-135M's shapes, in bfloat16, in
processes of two threads; a little Python between two of them, as an engine has it. The settings
take turns; medians of steps per second. On a quiet machine with two cores.
"""

from __future__ import annotations

import argparse
import os
import statistics
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import torch

sys.path.insert(0, str(Path(__file__).parents[1]))

from record import save

SETTINGS: dict[str, dict[str, str]] = {
    "OpenMP's default": {},
    "GOMP_SPINCOUNT=1000": {"GOMP_SPINCOUNT": "1000"},
    "GOMP_SPINCOUNT=10000": {"GOMP_SPINCOUNT": "10000"},
    "OMP_WAIT_POLICY=passive": {"OMP_WAIT_POLICY": "passive"},
}
SHAPES = ((960, 576), (576, 576), (3072, 576), (576, 1536))
REQUESTS, LAYERS = 22, 30


def work() -> None:
    """In a process of its own: for each number of seconds read, print the steps per second."""
    torch.set_num_threads(2)
    pack = torch.ops.mkldnn._reorder_linear_weight
    product = torch.ops.mkldnn._linear_pointwise
    dtype = torch.bfloat16
    weights = [pack(torch.randn(shape).to(dtype)) for shape in SHAPES]
    inputs = [torch.randn(REQUESTS, shape[1]).to(dtype) for shape in SHAPES]

    def step() -> None:
        for _ in range(LAYERS):
            for x, weight in zip(inputs, weights, strict=True):
                product(x, weight, None, "none", [], "")
                sum(range(300))

    step()
    print("ready", flush=True)
    for line in sys.stdin:
        steps, start = 0, time.perf_counter()
        while time.perf_counter() < start + float(line):
            step()
            steps += 1
        print(steps / (time.perf_counter() - start), flush=True)


class Workers:
    """Two processes with one setting."""

    def __init__(self, setting: dict[str, str]) -> None:
        variables = ("OMP_WAIT_POLICY", "GOMP_SPINCOUNT")
        own = {name: value for name, value in os.environ.items() if name not in variables}
        command = [sys.executable, __file__, "--worker"]
        self._processes: list[subprocess.Popen[str]] = [
            subprocess.Popen(
                command,
                env={**own, **setting, "OMP_NUM_THREADS": "2"},
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                text=True,
            )
            for _ in range(2)
        ]
        for process in self._processes:
            self._read(process)

    def run(self, count: int, seconds: float) -> float:
        """Steps per second of so many of them together."""
        chosen = self._processes[:count]
        for process in chosen:
            assert process.stdin is not None
            process.stdin.write(f"{seconds}\n")
            process.stdin.flush()
        return sum(float(self._read(process)) for process in chosen)

    def close(self) -> None:
        for process in self._processes:
            process.communicate()

    @staticmethod
    def _read(process: subprocess.Popen[str]) -> str:
        assert process.stdout is not None
        return process.stdout.readline()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--worker", action="store_true", help=argparse.SUPPRESS)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--seconds", type=float, default=1.5)
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    if options.worker:
        work()
        return
    workers = {name: Workers(setting) for name, setting in SETTINGS.items()}
    samples: dict[str, dict[str, list[float]]] = {
        name: {"one": [], "two, in sum": []} for name in SETTINGS
    }
    for _ in range(options.rounds):
        for name, pair in workers.items():
            samples[name]["one"].append(pair.run(1, options.seconds))
            samples[name]["two, in sum"].append(pair.run(2, options.seconds))
    for pair in workers.values():
        pair.close()
    results: dict[str, Any] = {}
    for name, sides in samples.items():
        results[name] = {side: round(statistics.median(taken), 2) for side, taken in sides.items()}
        print(
            f"{name:26}",
            *(f"{side}: {speed:8.2f} steps/s" for side, speed in results[name].items()),
        )
    if options.json:
        record = {
            "steps_per_second": results,
        }
        save(options.json, record)


if __name__ == "__main__":
    main()
