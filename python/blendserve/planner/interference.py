"""Prefill and decode side by side on one GPU: how fast each part runs, and which share it gets."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np

from .step_pace import StepPace

# (share R of the GPU given to decode attention, its speed P(R)); the GEMM beside it runs at 1 - R.
# Measured on A100, published with NanoFlow (arXiv 2408.12757).
INTERFERENCE: tuple[tuple[float, float], ...] = (
    (0.1, 0.25),
    (0.2, 0.4),
    (0.3, 0.5),
    (0.4, 0.6),
    (0.5, 0.7),
    (0.6, 0.8),
    (0.7, 0.85),
    (0.8, 0.9),
    (0.9, 0.95),
)


def separate_parts(
    pace: StepPace, density: float, context_tokens: int, decodes: int
) -> tuple[float, float]:
    """(prefill, decode) seconds that the two parts of a step of this density take, each alone.

    Decodes attend to context_tokens in all. Run by themselves they read the weights for themselves,
    and the compute of their own tokens is theirs; prefill is the rest of what the density asks for
    beside their attention: inf for density inf.
    """
    attention = context_tokens * pace.context_seconds
    own = decodes * pace.token_seconds
    prefill = math.inf if math.isinf(density) else max(density * attention - own, 0.0)
    return prefill, attention + max(own, pace.floor_seconds)


def best_split(
    prefill_seconds: float, decode_seconds: float, splits: Sequence[tuple[int, int]]
) -> int:
    """The split of a GPU's multiprocessors under which both parts have ended first.

    Args:
        prefill_seconds, decode_seconds: of each part with the GPU for itself; prefill may be inf.
        splits: (prefill, decode) multiprocessors, at least one pair.

    Returns:
        Index of the split with the smallest max(prefill / (1 - R), decode / P(R)), R being the
        decodes' part of the multiprocessors; of equal ones the first.
    """
    if math.isinf(prefill_seconds):
        prefill_seconds, decode_seconds = 1.0, 0.0
    counts = np.array(splits, dtype=np.float64)
    share = counts[:, 1] / counts.sum(axis=1)
    points, speeds = zip((0.0, 0.0), *INTERFERENCE, (1.0, 1.0), strict=True)
    speed = np.interp(share, points, speeds)
    return int(np.argmin(np.maximum(prefill_seconds / (1.0 - share), decode_seconds / speed)))
