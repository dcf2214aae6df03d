"""Lengths of requests, trace by trace: read from public traces, or drawn from stated distributions.

Every trace has a synthetic twin with about the same mean lengths, so that all workloads can be
built without any data. OpenVid, WildChat and the reasoning trace are always synthetic.
"""

from __future__ import annotations

import csv
import json
import os
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

Ints = NDArray[np.int64]

# A prompt and its output beyond this are left out of a real trace: they fit no common context.
LONGEST_REQUEST = 32_768
OPENVID_TOKENS_PER_FRAME = 256
OPENVID_MEAN_OUTPUT = 16_384
WILDCHAT_MEAN_OUTPUT = 256


def data_folder() -> Path:
    """Where the public traces lie: BLENDSERVE_DATA, else shared/data beside the project."""
    default = Path(__file__).parents[4] / "shared" / "data"
    return Path(os.environ.get("BLENDSERVE_DATA") or default)


@dataclass(frozen=True, eq=False)
class Lengths:
    """Prompt and output tokens of a trace's requests, (n,) each; source: file or distribution."""

    prompt: Ints
    output: Ints
    source: str

    @property
    def synthetic(self) -> bool:
        return self.source.startswith("synthetic")


def lognormal(
    rng: np.random.Generator, n: int, mean: float, sigma: float, low: int, high: int
) -> Ints:
    """Whole numbers, log-normal with this mean before they are clipped to low .. high."""
    drawn = rng.lognormal(np.log(mean) - sigma * sigma / 2, sigma, n)
    return np.clip(np.rint(drawn), low, high).astype(np.int64)


@dataclass(frozen=True)
class Twin:
    """A synthetic trace: log-normal prompts and outputs, (mean, sigma, low, high) each."""

    prompt: tuple[float, float, int, int]
    output: tuple[float, float, int, int]

    def draw(self, n: int, seed: int) -> Lengths:
        rng = np.random.default_rng(seed)
        prompt = lognormal(rng, n, *self.prompt)
        output = lognormal(rng, n, *self.output)
        text = ", ".join(
            f"{name} log-normal, mean {mean:g}, sigma {sigma:g}, clipped to {low}..{high}"
            for name, (mean, sigma, low, high) in (("prompt", self.prompt), ("output", self.output))
        )
        return Lengths(prompt, output, f"synthetic: {text}")


TWINS = {
    "burstgpt": Twin((363, 0.75, 9, 14_000), (57, 1.4, 1, 3_200)),
    "azure-conv": Twin((1_155, 0.95, 10, 14_000), (211, 0.85, 1, 1_000)),
    "azure-code": Twin((2_048, 1.1, 10, 7_437), (28, 0.85, 1, 1_900)),
    "sharegpt": Twin((299, 1.7, 4, 16_000), (324, 1.0, 1, 8_192)),
    "lmsys": Twin((92, 1.4, 2, 3_900), (207, 1.2, 1, 4_800)),
    "wildchat": Twin((300, 1.0, 8, 8_192), (WILDCHAT_MEAN_OUTPUT, 1.0, 1, 4_096)),
    "reasoning": Twin((200, 0.8, 20, 4_096), (6_000, 1.0, 200, 32_768)),
}


def openvid(n: int, seed: int) -> Lengths:
    """Video generation: 256 output tokens a frame, short descriptions as prompts.

    OpenVid itself is not to be had here; frames are log-normal with sigma 0.6, scaled to the mean
    output of 16K that the paper uses.
    """
    rng = np.random.default_rng(seed)
    frames = lognormal(rng, n, OPENVID_MEAN_OUTPUT / OPENVID_TOKENS_PER_FRAME, 0.6, 8, 384)
    prompt = rng.integers(24, 101, n)
    source = (
        "synthetic: frames log-normal, mean 64, sigma 0.6, clipped to 8..384, 256 output tokens "
        "each; prompt uniform in 24..100"
    )
    return Lengths(prompt, frames * OPENVID_TOKENS_PER_FRAME, source)


def _azure(kind: str) -> Callable[[Path], list[tuple[int, int]]]:
    return lambda data: _csv(data / "azure2023" / f"AzureLLMInferenceTrace_{kind}.csv")


def _csv(path: Path) -> list[tuple[int, int]]:
    with path.open(newline="") as file:
        rows = list(csv.DictReader(file))
    return [(int(row["ContextTokens"]), int(row["GeneratedTokens"])) for row in rows]


def _burstgpt(data: Path) -> list[tuple[int, int]]:
    found = json.loads((data / "burstgpt" / "burst_data_8000.json").read_text())
    rows: list[dict[str, Any]] = next(v for v in found.values() if isinstance(v, list))
    return [(int(row["input_length"]), int(row["output_length"])) for row in rows]


_READERS: dict[str, Callable[[Path], list[tuple[int, int]]]] = {
    "burstgpt": _burstgpt,
    "azure-conv": _azure("conv"),
    "azure-code": _azure("code"),
    "sharegpt": lambda data: _csv(data / "nanoflow" / "sharegpt.csv"),
    "lmsys": lambda data: _csv(data / "nanoflow" / "lmsys.csv"),
}

TRACES = (*TWINS, "openvid")


@cache
def _real(name: str, folder: Path) -> tuple[Ints, Ints] | None:
    reader = _READERS.get(name)
    if reader is None:
        return None
    try:
        pairs = np.array(reader(folder), dtype=np.int64)
    except FileNotFoundError:
        return None
    pairs = pairs[(pairs.min(axis=1) > 0) & (pairs.sum(axis=1) <= LONGEST_REQUEST)]
    return pairs[:, 0], pairs[:, 1]


def trace_lengths(name: str, n: int, seed: int, synthetic: bool = False) -> Lengths:
    """n requests of a trace: all of a real one as often as they are needed (a random part of it
    for the rest), or of its synthetic twin where there is no data or `synthetic` asks for it.

    Raises ValueError for an unknown trace.
    """
    if name not in TRACES:
        raise ValueError(f"unknown trace {name!r}: it must be one of {', '.join(TRACES)}")
    if name == "openvid":
        return openvid(n, seed)
    found = None if synthetic else _real(name, data_folder())
    if found is None:
        return TWINS[name].draw(n, seed)
    prompt, output = found
    rng = np.random.default_rng(seed)
    rounds = [rng.permutation(len(prompt)) for _ in range(-(-n // len(prompt)))]
    picks = np.concatenate([*rounds, np.empty(0, dtype=np.int64)])[:n]
    return Lengths(prompt[picks], output[picks], f"public trace of {len(prompt)} requests")
