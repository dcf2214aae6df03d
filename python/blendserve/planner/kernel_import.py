"""Kernel times from NVIDIA's aiconfigurator-core, if that package is installed.

It is an optional extra (`pip install 'blendserve[measured]'`, 80 MB, Apache-2.0). Its parquet files
hold the times of single kernels as SGLang runs them; the newest collection of a chip is taken.
"""

from __future__ import annotations

from importlib import metadata, resources
from pathlib import Path
from typing import Any

import numpy as np

from .kernel_tables import ExpertKey, Floats, GemmTable, Grid, Ints, KernelTables

PACKAGE = "aiconfigurator-core"
# Names of dtypes in the tables, and ours.
_WEIGHT_DTYPES = {"bfloat16": "bfloat16", "fp8": "fp8", "fp8_block": "fp8_block"}
_EXPERT_DTYPES = {**_WEIGHT_DTYPES, "w4a16_mxfp4": "mxfp4"}
# How requests choose experts: real models' choices are uneven.
_ROUTING = "power_law_1.01"
_MOST_RANKS = 8
_GRAPH = "sglang_graph"


def installed_tables(chip: str) -> KernelTables | None:
    """The tables of a chip by the package's name of it, such as "h100_sxm"; None where the package
    is not installed or has no GEMMs of SGLang for the chip."""
    try:
        version = metadata.version(PACKAGE)
    except metadata.PackageNotFoundError:
        return None
    with resources.as_file(resources.files("aiconfigurator_core")) as package:
        return read_tables(package / "systems" / "data" / chip, chip, version)


def read_tables(folder: Path, chip: str, version: str) -> KernelTables | None:
    """The same from the unpacked folder of one chip."""
    gemm, gemm_version = _newest(folder, "gemm", "gemm_perf")
    decode, _ = _newest(folder, "attention", "generation_attention_perf")
    prefill, _ = _newest(folder, "attention", "context_attention_perf")
    if gemm is None or decode is None or prefill is None:
        return None
    experts, _ = _newest(folder, "moe", "moe_perf")
    latent_decode, _ = _newest(folder, "mla", "generation_mla_perf")
    latent_prefill, _ = _newest(folder, "mla", "context_mla_perf")
    reduce, _ = _newest(folder, "comm", "custom_allreduce_perf")
    tokens, expert_times = _experts(experts)
    message_bytes, reduce_times = _all_reduce(reduce)
    return KernelTables(
        chip=chip,
        source=f"{PACKAGE} {version}, {chip}, SGLang {gemm_version}",
        gemm=_gemm(gemm),
        decode=_attention(decode, "step", 1),
        prefill=_attention(prefill, "isl", 2),
        expert_tokens=tokens,
        experts=expert_times,
        latent_decode=_latent(latent_decode, "step", 1),
        latent_prefill=_latent(latent_prefill, "isl", 2),
        message_bytes=message_bytes,
        all_reduce=reduce_times,
    )


def _newest(folder: Path, family: str, table: str) -> tuple[Any, str]:
    """(rows of the newest collection that has the table, None if none; its SGLang version)."""
    import pandas

    found = sorted(
        (folder / family / "sglang").glob(f"*/{table}.parquet"),
        key=lambda path: [int(part) for part in path.parent.name.split(".") if part.isdigit()],
    )
    if not found:
        return None, ""
    return pandas.read_parquet(found[-1]), found[-1].parent.name


def _gemm(rows: Any) -> dict[str, GemmTable]:
    found = {}
    for dtype, part in rows.groupby("gemm_dtype"):
        if dtype in _WEIGHT_DTYPES:
            times = part.groupby(["n", "k", "m"]).latency.median().unstack("m")
            n, k = (np.array(level, dtype=np.int64) for level in times.index.levels)
            full = times.reindex([(a, b) for a in n for b in k])
            seconds = full.to_numpy().reshape(len(n), len(k), -1) / 1e3
            for at in range(1, len(n)):  # The largest pairs were not measured: in proportion.
                grown = seconds[at - 1] * (n[at] / n[at - 1])
                seconds[at] = np.where(np.isnan(seconds[at]), grown, seconds[at])
            m = np.array(times.columns, dtype=np.int64)
            found[_WEIGHT_DTYPES[dtype]] = GemmTable(n, k, m, seconds)
    return found


def _attention(rows: Any, tokens: str, power: int) -> dict[str, dict[Any, Grid]]:
    if "window_size" not in rows:
        rows = rows.assign(window_size=0)
    names = ["num_heads", "num_key_value_heads", "head_dim", "window_size"]
    # The fastest backend of those that were measured.
    rows = rows.groupby(["kv_cache_dtype", *names, "batch_size", tokens]).latency.min()
    found: dict[str, dict[Any, Grid]] = {}
    for (dtype, *key), part in rows.groupby(level=["kv_cache_dtype", *names]):
        grid = _grid(part.droplevel(["kv_cache_dtype", *names]), tokens, power)
        found.setdefault(dtype, {})[tuple(int(size) for size in key)] = grid
    return found


def _latent(rows: Any, tokens: str, power: int) -> dict[str, dict[int, Grid]]:
    found: dict[str, dict[int, Grid]] = {}
    if rows is None:
        return found
    names = ["kv_cache_dtype", "num_heads"]
    times = rows.groupby([*names, "batch_size", tokens]).latency.min()
    for (dtype, heads), part in times.groupby(level=names):
        grid = _grid(part.droplevel(names), tokens, power)
        found.setdefault(dtype, {})[int(heads)] = grid
    return found


def _grid(times: Any, tokens: str, power: int) -> Grid:
    table = times.unstack(tokens)
    seconds = table.to_numpy() / 1e3
    requests, counts = (np.array(axis, dtype=np.int64) for axis in (table.index, table.columns))
    return Grid.filled(requests, counts, seconds, power)


def _experts(rows: Any) -> tuple[Ints, dict[str, dict[ExpertKey, Floats]]]:
    found: dict[str, dict[ExpertKey, Floats]] = {}
    if rows is None:
        return np.zeros(0, dtype=np.int64), found
    rows = rows[
        (rows.moe_ep_size == 1)
        & (rows.moe_tp_size <= _MOST_RANKS)
        & (rows.distribution == _ROUTING)
        & rows.moe_dtype.isin(_EXPERT_DTYPES)
    ]
    names = ["hidden_size", "inter_size", "topk", "num_experts", "moe_tp_size"]
    times = rows.groupby(["moe_dtype", *names, "num_tokens"]).latency.min().unstack("num_tokens")
    tokens = np.array(times.columns, dtype=np.int64)
    for (dtype, *key), part in times.iterrows():
        seconds = part.to_numpy() / 1e3
        if not np.isnan(seconds).any():
            sizes = tuple(int(size) for size in key)
            found.setdefault(_EXPERT_DTYPES[dtype], {})[sizes] = seconds  # type: ignore[index]
    return tokens, found


def _all_reduce(rows: Any) -> tuple[Ints, dict[int, Floats]]:
    if rows is None:
        return np.zeros(0, dtype=np.int64), {}
    rows = rows[rows.num_gpus <= _MOST_RANKS]
    graph = rows[rows.backend == _GRAPH] if "backend" in rows else rows
    rows = graph if len(graph) else rows
    times = rows.groupby(["num_gpus", "message_size"]).latency.median().unstack("message_size")
    times = times.dropna(axis=1)
    # The tables count elements of two bytes: as bytes, they would be half of what NVLink carries.
    message_bytes = 2 * np.array(times.columns, dtype=np.int64)
    return message_bytes, {int(ranks): part.to_numpy() / 1e3 for ranks, part in times.iterrows()}
