"""Measured kernel times of one chip, and how they are read between the measured points.

The files beside this one in `kernels/` are small extracts of NVIDIA's aiconfigurator-core (see the
README there); `kernel_import` reads the installed package for chips and shapes that they lack.
Times are stored as whole numbers, 256 to a factor of two: off by 0.14 % at most.
"""

from __future__ import annotations

import bisect
import re
import zipfile
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from importlib import resources
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float64]
Ints = NDArray[np.int64]

# GEMM kernels work on so many tokens at a time, so their seconds rise in steps.
TILE_TOKENS = 128
_STEPS_PER_OCTAVE = 256
_UNIT_SECONDS = 1e-7  # All kernels take longer.
FILE_ENDING = ".npz"
UNREADABLE = (OSError, ValueError, KeyError, zipfile.BadZipFile)

AttentionKey = tuple[int, int, int, int]  # query heads, KV heads, head_dim, window (0: none)
ExpertKey = tuple[int, int, int, int, int]  # hidden size, width, active, experts, ranks


@dataclass(frozen=True, eq=False)
class Grid:
    """Seconds over (requests, tokens each), linear between the points: in the requests, and in the
    work of each, its tokens to the `power`. Beyond the last points they grow in proportion.

    requests: (r,) ascending. tokens: (c,) ascending. seconds: (r, c).
    """

    requests: Ints
    tokens: Ints
    seconds: Floats
    power: int = 1

    @staticmethod
    def filled(requests: Ints, tokens: Ints, seconds: Floats, power: int) -> Grid:
        """Points that were not measured (nan) lie between the measured ones of their row, or go on
        from the last of them; rows without any are left out."""
        there = ~np.isnan(seconds).all(axis=1)
        requests, seconds = requests[there], seconds[there].copy()
        for row in seconds:
            measured = np.flatnonzero(~np.isnan(row))
            last = measured[-1]
            work = tokens.astype(np.float64) ** power
            row[:last] = np.interp(work[:last], work[measured], row[measured])
            row[last:] = row[last] * (tokens[last:] / tokens[last]) ** power
        return Grid(requests, tokens, seconds, power)

    def at(self, requests: int, work: float) -> float:
        """Seconds of so many requests, 1 or more, with so much work in all: the sum of the tokens
        of each to the grid's power. They are taken to be alike."""
        if work <= 0:
            return 0.0
        row = self._rows.get(requests)
        if row is None:
            row = self._rows[requests] = self.row(requests).tolist()
        points, each = self._points, work / requests
        if each >= points[-1]:
            return row[-1] * (each / points[-1])
        at = bisect.bisect_right(points, each)
        if at == 0:
            return row[0]
        low = points[at - 1]
        return row[at - 1] + (row[at] - row[at - 1]) * (each - low) / (points[at] - low)

    def at_each(self, requests: int, work: Floats) -> Floats:
        """The same for an array of work above 0."""
        row, points, each = self.row(requests), self._points, work / requests
        return np.asarray(np.interp(each, points, row) * np.maximum(each / points[-1], 1.0))

    @cached_property
    def _rows(self) -> dict[int, list[float]]:
        return {}

    @cached_property
    def _points(self) -> list[float]:
        """(c,) work of one request."""
        found: list[float] = (self.tokens.astype(np.float64) ** self.power).tolist()
        return found

    def scaled(self, factor: float) -> Grid:
        return Grid(self.requests, self.tokens, self.seconds * factor, self.power)

    def row(self, requests: float) -> Floats:
        """(c,) seconds of so many requests, at least one, at the tabulated tokens."""
        rows = self.requests
        if requests >= rows[-1]:
            return np.asarray(self.seconds[-1] * (requests / rows[-1]), dtype=np.float64)
        at = int(np.searchsorted(rows, requests, side="right"))
        low, high = rows[at - 1], rows[at]
        part = (requests - low) / (high - low)
        return np.asarray(self.seconds[at - 1] * (1 - part) + self.seconds[at] * part)

    @property
    def least_rate(self) -> float:
        """Least seconds per request and tokens^power, anywhere between the points too: along a row
        and along a column the quotient has its least value at a point."""
        work = self.requests[:, None] * self.tokens[None, :].astype(np.float64) ** self.power
        return float((self.seconds / work).min())


@dataclass(frozen=True, eq=False)
class GemmTable:
    """Seconds of y = x W with x of (m, k) and W of (k, n), (n, k, m) over ascending sizes."""

    n: Ints
    k: Ints
    m: Ints
    seconds: Floats

    def at(self, n: float, k: float) -> Floats:
        """(m,) seconds of one matrix; beyond the largest size in proportion, below the smallest
        as that."""
        rows, beyond_n = _between(self.n, n)
        columns, beyond_k = _between(self.k, k)
        found = sum(a * b * self.seconds[i, j] for i, a in rows for j, b in columns)
        return np.asarray(found * beyond_n * beyond_k, dtype=np.float64)


def _between(sizes: Ints, size: float) -> tuple[list[tuple[int, float]], float]:
    """Neighbours of a size with their weights, and the factor by which it is beyond the last."""
    if size >= sizes[-1]:
        return [(len(sizes) - 1, 1.0)], size / float(sizes[-1])
    if size <= sizes[0]:
        return [(0, 1.0)], 1.0
    at = int(np.searchsorted(sizes, size, side="right"))
    part = (size - sizes[at - 1]) / (sizes[at] - sizes[at - 1])
    return [(at - 1, 1.0 - float(part)), (at, float(part))], 1.0


def at_each_count(counts: Ints, seconds: Floats, most: int, tile: int = TILE_TOKENS) -> Floats:
    """(most + 1,) seconds of 0 to `most` tokens, from those of some counts.

    Between two counts seconds rise at multiples of the tile; within one tile evenly. Beyond the
    last count they grow in proportion. No tokens take no time.
    """
    tokens = np.arange(1, most + 1)
    high = np.minimum(np.searchsorted(counts, tokens), len(counts) - 1)
    low = np.maximum(high - 1, 0)
    a, b = counts[low], counts[high]
    tiles = -(-tokens // tile), -(-a // tile), -(-b // tile)
    apart = tiles[2] - tiles[1]
    by_tile = (tiles[0] - tiles[1]) / np.maximum(apart, 1)
    evenly = (tokens - a) / np.maximum(b - a, 1)
    part = np.clip(np.where(apart > 0, by_tile, evenly), 0.0, 1.0)
    found = seconds[low] * (1 - part) + seconds[high] * part
    exact = counts[high] == tokens
    found[exact] = seconds[high][exact]
    found *= np.maximum(tokens / counts[-1], 1.0)
    return np.concatenate(([0.0], found))


@dataclass(frozen=True, eq=False)
class KernelTables:
    """All measured kernels of one chip, in seconds of one launch.

    gemm: by weight dtype. decode, prefill: attention of one layer, by KV dtype and `AttentionKey`;
    decode over (requests, context of each), prefill over (prompts, tokens of each, causal).
    experts: one layer's, by weight dtype and `ExpertKey`, over `expert_tokens`. latent_decode,
    latent_prefill: MLA by KV dtype and query heads. all_reduce: by ranks, over `message_bytes`.
    """

    chip: str
    source: str
    gemm: Mapping[str, GemmTable]
    decode: Mapping[str, Mapping[AttentionKey, Grid]]
    prefill: Mapping[str, Mapping[AttentionKey, Grid]]
    expert_tokens: Ints
    experts: Mapping[str, Mapping[ExpertKey, Floats]]
    latent_decode: Mapping[str, Mapping[int, Grid]]
    latent_prefill: Mapping[str, Mapping[int, Grid]]
    message_bytes: Ints
    all_reduce: Mapping[int, Floats]

    def save(self, path: Path) -> None:
        """As a compressed file that `load` reads."""
        arrays: dict[str, NDArray[np.generic]] = {
            "about": np.array([self.chip, self.source]),
            "expert_tokens": self.expert_tokens,
            "message_bytes": self.message_bytes,
        }
        for dtype, table in self.gemm.items():
            arrays |= {"gemm n": table.n, "gemm k": table.k, "gemm m": table.m}
            arrays[f"gemm {dtype}"] = _coded(table.seconds)
        families = ("decode", "prefill", "latent_decode", "latent_prefill")
        for family in families:
            for dtype, grids in getattr(self, family).items():
                name = f"{family} {dtype}"
                requests = np.unique(np.concatenate([grid.requests for grid in grids.values()]))
                tokens = np.unique(np.concatenate([grid.tokens for grid in grids.values()]))
                values = np.full((len(grids), len(requests), len(tokens)), np.nan)
                for at, grid in enumerate(grids.values()):
                    rows = np.searchsorted(requests, grid.requests)
                    values[np.ix_([at], rows, np.searchsorted(tokens, grid.tokens))] = grid.seconds
                arrays[f"{name} keys"] = np.array(list(grids)).reshape(len(grids), -1)
                arrays[f"{name} requests"], arrays[f"{name} tokens"] = requests, tokens
                arrays[name] = _coded(values)
        for dtype, found in self.experts.items():
            arrays[f"experts {dtype} keys"] = np.array(list(found))
            arrays[f"experts {dtype}"] = _coded(np.array(list(found.values())))
        if self.all_reduce:
            arrays["all_reduce ranks"] = np.array(list(self.all_reduce))
            arrays["all_reduce"] = _coded(np.array(list(self.all_reduce.values())))
        np.savez_compressed(path, **arrays)  # type: ignore[arg-type]

    @staticmethod
    def load(path: Path) -> KernelTables:
        """Raises one of `UNREADABLE` for a file that `save` has not written."""
        with np.load(path, allow_pickle=False) as file:
            arrays = dict(file)
        chip, source = arrays["about"].tolist()

        def grids(family: str, power: int) -> dict[str, dict[AttentionKey, Grid]]:
            found: dict[str, dict[AttentionKey, Grid]] = {}
            for name in arrays:
                match = re.fullmatch(rf"{family} (\w+)", name)
                if match:
                    axes = arrays[f"{name} requests"], arrays[f"{name} tokens"]
                    found[match[1]] = {
                        tuple(key): Grid.filled(*axes, seconds, power)
                        for key, seconds in zip(
                            arrays[f"{name} keys"].tolist(), _decoded(arrays[name]), strict=True
                        )
                    }
            return found

        def single(family: str, power: int) -> dict[str, dict[int, Grid]]:
            return {
                dtype: {key[0]: grid for key, grid in found.items()}
                for dtype, found in grids(family, power).items()
            }

        experts = {
            match[1]: dict(
                zip(
                    map(tuple, arrays[f"{match[0]} keys"].tolist()),
                    _decoded(arrays[match[0]]),
                    strict=True,
                )
            )
            for name in arrays
            if (match := re.fullmatch(r"experts (\w+)", name))
        }
        gemm = {
            match[1]: GemmTable(
                arrays["gemm n"], arrays["gemm k"], arrays["gemm m"], _decoded(arrays[match[0]])
            )
            for name in arrays
            if (match := re.fullmatch(r"gemm (\w{2,})", name))
        }
        reduce = {}
        if "all_reduce" in arrays:
            ranks = arrays["all_reduce ranks"].tolist()
            reduce = dict(zip(ranks, _decoded(arrays["all_reduce"]), strict=True))
        return KernelTables(
            chip=chip,
            source=source,
            gemm=gemm,
            decode=grids("decode", 1),
            prefill=grids("prefill", 2),
            expert_tokens=arrays["expert_tokens"],
            experts=experts,
            latent_decode=single("latent_decode", 1),
            latent_prefill=single("latent_prefill", 2),
            message_bytes=arrays["message_bytes"],
            all_reduce=reduce,
        )


def kernel_tables(chip: str) -> KernelTables | None:
    """Those of a chip that come with the package, or of a file whose name ends in .npz; None where
    there are none."""
    if chip.endswith(FILE_ENDING):
        return KernelTables.load(Path(chip))
    file = resources.files("blendserve.planner") / "kernels" / f"{chip}{FILE_ENDING}"
    with resources.as_file(file) as path:
        return KernelTables.load(path) if path.is_file() else None


def _coded(seconds: Floats) -> NDArray[np.uint16]:
    """Whole numbers, 0 for nan, as differences along the last axis: they compress best."""
    codes = np.zeros(seconds.shape, dtype=np.uint16)
    there = ~np.isnan(seconds)
    codes[there] = np.rint(np.log2(seconds[there] / _UNIT_SECONDS) * _STEPS_PER_OCTAVE)
    return np.diff(codes, axis=-1, prepend=np.uint16(0))


def _decoded(differences: NDArray[np.uint16]) -> Floats:
    codes = np.cumsum(differences, axis=-1, dtype=np.uint16)
    seconds = np.exp2(codes / _STEPS_PER_OCTAVE) * _UNIT_SECONDS
    return np.where(codes > 0, seconds, np.nan)
