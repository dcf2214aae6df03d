"""The rows of the campaign's step `costs`, as the file of kernel times that the engine reads."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from blendserve.planner.kernel_tables import AttentionKey, GemmTable, Grid, KernelTables

DTYPE = "bfloat16"


def tables(
    rows: Sequence[dict[str, Any]], heads: AttentionKey, chip: str, source: str
) -> KernelTables:
    """What was measured. What was not, the engine model fits to the chip's ceilings.

    rows: of kind gemm (n, k, tokens), decode and prefill (requests, tokens of each), in seconds of
        one launch. GEMMs: every n with every k and tokens.
    heads: those of the attention.
    """
    gemms = {(r["n"], r["k"], r["tokens"]): r["seconds"] for r in rows if r["kind"] == "gemm"}
    n, k, counts = (np.unique([at[axis] for at in gemms]) for axis in range(3))
    seconds = [[[gemms[at] for at in _points(a, b, counts)] for b in k] for a in n]
    none = np.zeros(0, dtype=np.int64)
    return KernelTables(
        chip=chip,
        source=source,
        gemm={DTYPE: GemmTable(n, k, counts, np.array(seconds))},
        decode={DTYPE: {heads: _grid(rows, "decode", 1)}},
        prefill={DTYPE: {heads: _grid(rows, "prefill", 2)}},
        expert_tokens=none,
        experts={},
        latent_decode={},
        latent_prefill={},
        message_bytes=none,
        all_reduce={},
    )


def _points(n: Any, k: Any, counts: Any) -> list[tuple[int, int, int]]:
    return [(int(n), int(k), int(count)) for count in counts]


def _grid(rows: Sequence[dict[str, Any]], kind: str, power: int) -> Grid:
    found = {(r["requests"], r["tokens"]): r["seconds"] for r in rows if r["kind"] == kind}
    requests, tokens = (np.unique([at[axis] for at in found]) for axis in range(2))
    seconds = [[found.get((int(r), int(t)), np.nan) for t in tokens] for r in requests]
    return Grid.filled(requests, tokens, np.array(seconds), power)
