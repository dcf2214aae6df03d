"""Makes the kernel tables that come with the planner from NVIDIA's aiconfigurator-core.

    pip download --no-deps aiconfigurator-core==0.12.0 && unzip aiconfigurator_core-*.whl
    python benchmark/planner/kernel_tables.py aiconfigurator_core/systems/data

It needs pandas and pyarrow. Of each chip the shapes of usual dense, mixture-of-experts and MLA
models are kept, which is a small part; all others are read from the package if it is installed.
"""

from __future__ import annotations

import argparse
from dataclasses import replace
from pathlib import Path

import numpy as np

from blendserve.planner.kernel_import import read_tables
from blendserve.planner.kernel_tables import GemmTable, Grid, KernelTables

CHIPS = ("a100_sxm", "h100_sxm", "h200_sxm", "b200_sxm", "l40s")
VERSION = "0.12.0"
FOLDER = Path(__file__).parents[2] / "python/blendserve/planner/kernels"
# Rows and columns of weight matrices between which times are linear to a few per cent.
SIZES = (
    *(256, 512, 1024, 1536, 2048, 3072, 3584, 4096, 5120, 6144, 7168, 8192, 10240, 12288, 16384),
    *(51200, 65536),
)
WEIGHT_DTYPES = ("bfloat16", "fp8", "fp8_block")
# (query heads, KV heads, head_dim) of a rank: Llama and Qwen of 7B to 72B, Gemma, gpt-oss.
HEADS = (
    *((4, 1, 128), (8, 1, 128), (8, 2, 128), (16, 2, 128), (16, 4, 128), (32, 4, 128)),
    *((12, 2, 128), (24, 4, 128), (32, 8, 128), (40, 8, 128), (48, 8, 128), (64, 8, 128)),
    *((8, 8, 128), (16, 16, 128), (32, 32, 128), (16, 2, 256), (16, 8, 256), (8, 4, 256)),
    *((32, 16, 128), (64, 8, 64), (32, 4, 64), (16, 2, 64), (8, 1, 64)),
)
EXPERTS = (
    *((4096, 14336, 2, 8), (2048, 768, 8, 128), (4096, 1536, 8, 128), (7168, 2048, 8, 256)),
    *((2880, 2880, 4, 32), (2880, 2880, 4, 128), (2048, 512, 10, 512), (5120, 8192, 1, 16)),
    *((6144, 2560, 8, 160), (4096, 1024, 10, 512)),
)
LATENT_HEADS = (16, 32, 64, 128)


def extract(tables: KernelTables) -> KernelTables:
    """What is kept of a chip."""
    return replace(
        tables,
        gemm={
            dtype: _some_sizes(tables.gemm[dtype])
            for dtype in WEIGHT_DTYPES
            if dtype in tables.gemm
        },
        decode={dtype: _some_heads(grids) for dtype, grids in tables.decode.items()},
        prefill={dtype: _some_heads(grids) for dtype, grids in tables.prefill.items()},
        experts={
            dtype: kept
            for dtype, found in tables.experts.items()
            if (kept := {key: time for key, time in found.items() if key[:4] in EXPERTS})
        },
        latent_decode=_some_latent(tables.latent_decode),
        latent_prefill=_some_latent(tables.latent_prefill),
    )


def _some_sizes(table: GemmTable) -> GemmTable:
    n, k = (np.flatnonzero(np.isin(sizes, SIZES)) for sizes in (table.n, table.k))
    return GemmTable(table.n[n], table.k[k], table.m, table.seconds[np.ix_(n, k)])


def _some_heads(grids: dict) -> dict:
    return {key: grid for key, grid in grids.items() if key[:3] in HEADS}


def _some_latent(grids: dict[str, dict[int, Grid]]) -> dict[str, dict[int, Grid]]:
    return {
        dtype: {heads: grid for heads, grid in found.items() if heads in LATENT_HEADS}
        for dtype, found in grids.items()
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("data", type=Path, help="systems/data of the unpacked package")
    options = parser.parse_args()
    FOLDER.mkdir(exist_ok=True)
    for chip in CHIPS:
        tables = read_tables(options.data / chip, chip, VERSION)
        if tables is None:
            raise SystemExit(f"{options.data / chip}: no GEMMs or attention of SGLang")
        path = FOLDER / f"{chip}.npz"
        extract(tables).save(path)
        print(f"{path.name}: {path.stat().st_size / 1e3:.0f} kB, {tables.source}")


if __name__ == "__main__":
    main()
