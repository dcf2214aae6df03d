"""What every GPU benchmark shares: timing, the device's description, the raw result file."""

from __future__ import annotations

import importlib.metadata
import json
import platform
import statistics
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

RESULTS = Path(__file__).parents[1] / "results"
PACKAGES = ("torch", "triton", "sglang", "flashinfer-python", "sgl-kernel")


def require_gpu() -> torch.device:
    """The CUDA device. Raises SystemExit where there is none."""
    if not torch.cuda.is_available():
        raise SystemExit("this benchmark needs a CUDA device; nothing was measured")
    return torch.device("cuda")


def milliseconds(call: Callable[[], Any], samples: int = 20, warm_up: int = 5) -> list[float]:
    """GPU time of each call, by events, with the L2 cache flushed in between."""
    flush = torch.empty(2**28, dtype=torch.uint8, device="cuda")
    for _ in range(warm_up):
        call()
    taken = []
    for _ in range(samples):
        flush.zero_()
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        call()
        end.record()
        end.synchronize()
        taken.append(start.elapsed_time(end))
    return taken


def median(samples: list[float]) -> float:
    return statistics.median(samples)


def device_report() -> dict[str, Any]:
    versions = {"python": platform.python_version(), "cuda": torch.version.cuda}
    for package in PACKAGES:
        try:
            versions[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            versions[package] = "not installed"
    properties = torch.cuda.get_device_properties(0)
    return {
        "command": " ".join(["python", *sys.argv]),
        "device": properties.name,
        "multiprocessors": properties.multi_processor_count,
        "memory_bytes": properties.total_memory,
        "versions": versions,
    }


def write(name: str, body: dict[str, Any]) -> None:
    """Write benchmark/results/NAME.json, after the rows were printed."""
    path = RESULTS / f"{name}.json"
    path.write_text(json.dumps({**device_report(), **body}, indent=1) + "\n")
    print(f"raw results: {path}")


def table(rows: list[dict[str, Any]], columns: list[str]) -> None:
    """Print the named columns of the rows."""
    cells = [columns, *([_cell(row.get(c)) for c in columns] for row in rows)]
    widths = [max(len(line[i]) for line in cells) for i in range(len(columns))]
    for line in cells:
        print("  ".join(cell.rjust(width) for cell, width in zip(line, widths, strict=True)))


def _cell(value: Any) -> str:
    return f"{value:.3f}" if isinstance(value, float) else str(value)
