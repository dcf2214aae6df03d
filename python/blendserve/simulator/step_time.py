"""How the operators of a step overlap."""

from __future__ import annotations

import itertools
from dataclasses import dataclass
from enum import StrEnum

import numpy as np
from numpy.typing import ArrayLike, NDArray

from blendserve.planner import INTERFERENCE

Floats = NDArray[np.float64]


class Overlap(StrEnum):
    """sequential: one operator after the other (vLLM, SGLang). ideal: the longer side hides the
    other. interference: both slow each other down as measured (NanoFlow)."""

    SEQUENTIAL = "sequential"
    IDEAL = "ideal"
    INTERFERENCE = "interference"


@dataclass(frozen=True)
class OverlapModel:
    """Seconds of a step whose compute-bound operators take c alone, whose memory-bound ones m, and
    that moves t seconds' worth of bytes through the one memory: the largest of t and of u c + v m
    over the pairs (u, v) of `planes`.

    Speeds (x, y) of GEMM and attention side by side form a concave curve; between measured points
    the two alternate, which gives the straight line. A step takes the least T with (c / T, m / T)
    under the curve, and each straight piece y = a - b x is one plane: T >= (m + b c) / a. The
    largest of planes through the origin is convex and scales with its arguments, so a sum over
    steps is at least the value of the sums: that makes `bounds` certified.
    """

    planes: tuple[tuple[float, float], ...]

    @staticmethod
    def of(overlap: Overlap, curve: tuple[tuple[float, float], ...] = INTERFERENCE) -> OverlapModel:
        """curve: (R, P(R)) pairs for `interference`, R and P within 0 and 1, in any order.

        Raises ValueError for a curve outside that, or whose speeds are below taking turns.
        """
        if overlap is Overlap.SEQUENTIAL:
            return OverlapModel(((1.0, 1.0),))
        if overlap is Overlap.IDEAL:
            return OverlapModel(((1.0, 0.0), (0.0, 1.0)))
        if not all(0 < r < 1 and 0 < p <= 1 for r, p in curve):
            raise ValueError("an interference curve has shares and speeds between 0 and 1")
        points = sorted([(0.0, 1.0), (1.0, 0.0), *((1.0 - r, p) for r, p in curve)])
        hull: list[tuple[float, float]] = []
        for point in points:  # Upper hull, from x = 0 (attention alone) to x = 1 (GEMM alone).
            while len(hull) > 1 and _turns_left(hull[-2], hull[-1], point):
                hull.pop()
            hull.append(point)
        planes = []
        for (x0, y0), (x1, y1) in itertools.pairwise(hull):
            slope = (y0 - y1) / (x1 - x0)
            height = y0 + slope * x0
            planes.append((slope / height, 1.0 / height))
        return OverlapModel((*planes, (1.0, 0.0), (0.0, 1.0)))

    def seconds(self, compute: float, memory: float, traffic: float = 0.0) -> float:
        found = traffic
        for u, v in self.planes:
            value = u * compute + v * memory
            if value > found:
                found = value
        return found

    def seconds_each(
        self, compute: ArrayLike, memory: ArrayLike, traffic: ArrayLike = 0.0
    ) -> Floats:
        """The same for arrays of one shape."""
        c, m = np.asarray(compute, dtype=np.float64), np.asarray(memory, dtype=np.float64)
        out = np.zeros(np.broadcast(c, m, traffic).shape) + np.asarray(traffic, dtype=np.float64)
        for u, v in self.planes:
            np.maximum(out, u * c + v * m, out=out)
        return out


def _turns_left(a: tuple[float, float], b: tuple[float, float], c: tuple[float, float]) -> bool:
    """Whether b lies on or under the line from a to c."""
    return (b[0] - a[0]) * (c[1] - a[1]) >= (c[0] - a[0]) * (b[1] - a[1]) - 1e-12
