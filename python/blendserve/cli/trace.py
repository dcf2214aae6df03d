"""``blendserve trace``: what a server's steps did, from the file BLENDSERVE_TRACE_FILE named."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

import msgspec
import numpy as np
from numpy.typing import NDArray

from blendserve.runtime.trace import TraceStep

_POINTS = 400
"""Most points of a curve; each is the mean of as many steps as that takes."""


class TraceError(ValueError):
    """A trace that cannot be read."""


def main(argv: Sequence[str]) -> int:
    """Sum a trace up, and draw it if asked."""
    parser = argparse.ArgumentParser(prog="blendserve trace", description=__doc__)
    parser.add_argument("file", type=Path, help="a trace: one JSON line per scheduler step")
    parser.add_argument(
        "--plot",
        type=Path,
        metavar="OUT.png",
        help="draw compute and memory seconds of the steps, and the memory of the two sides",
    )
    options = parser.parse_args(list(argv))
    try:
        steps = read_trace(options.file)
        print(summary(steps))
        if options.plot is not None:
            draw(options.plot, steps)
    except (TraceError, OSError) as error:
        print(f"blendserve trace: {error}", file=sys.stderr)
        return 2
    return 0


def read_trace(path: Path) -> list[TraceStep]:
    """Raises TraceError for a file without steps, or with a line that is none; the last line of a
    server that was killed may be cut off, and is left out then."""
    lines = path.read_bytes().splitlines()
    steps = []
    for number, line in enumerate(lines, start=1):
        try:
            steps.append(msgspec.json.decode(line, type=TraceStep))
        except msgspec.DecodeError as error:
            if number == len(lines) and steps:
                break
            raise TraceError(f"{path}, line {number}: {error}") from error
    if not steps:
        raise TraceError(f"{path} has no steps: was the server told BLENDSERVE_TRACE_FILE?")
    return steps


def summary(steps: Sequence[TraceStep]) -> str:
    compute = np.array([step.compute_seconds for step in steps])
    memory = np.array([step.memory_seconds for step in steps])
    longer = np.maximum(compute, memory).sum()
    both = compute.sum() + memory.sum()
    balanced = max(compute.sum(), memory.sum())
    prefill = sum(step.prefill_tokens for step in steps)
    decode = sum(step.decode_requests for step in steps)
    return "\n".join(
        (
            f"{len(steps):,} steps in {steps[-1].seconds - steps[0].seconds:,.1f} s: "
            f"{prefill:,} prompt tokens, {decode:,} output tokens",
            "by the cost model, in seconds:",
            f"  compute {compute.sum():,.1f}, memory {memory.sum():,.1f}",
            f"  one after the other {both:,.1f}; overlapped within each step {longer:,.1f}; "
            f"if all steps were alike {balanced:,.1f}",
        )
    )


def draw(path: Path, steps: Sequence[TraceStep]) -> None:
    """Write a PNG like the paper's Figure 10. Raises TraceError where matplotlib is missing."""
    try:
        import matplotlib
    except ImportError as error:
        raise TraceError("--plot needs the package matplotlib; install it with pip") from error
    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, (balance, memory) = pyplot.subplots(
        2, 1, figsize=(12, 7), sharex=True, layout="constrained"
    )
    at = _curve(np.array([step.step for step in steps]))
    for name, colour in (("compute", "tab:red"), ("memory", "tab:blue")):
        seconds = np.array([getattr(step, f"{name}_seconds") for step in steps])
        balance.plot(at, 1e3 * _curve(seconds), color=colour, label=name)
    balance.set_ylabel("milliseconds of a step\n(cost model)")
    balance.legend()
    sides = [
        _curve(np.array([getattr(step, f"{side}_tokens") for step in steps]))
        for side in ("left", "right")
    ]
    memory.stackplot(at, *sides, labels=("left", "right"), colors=("tab:red", "tab:blue"))
    memory.set_ylabel("KV tokens booked by a side")
    memory.set_xlabel("scheduler step")
    memory.legend()
    figure.savefig(path, dpi=120)
    pyplot.close(figure)


def _curve(values: NDArray[np.float64]) -> NDArray[np.float64]:
    parts = np.array_split(values, min(len(values), _POINTS))
    return np.array([part.mean() for part in parts])
