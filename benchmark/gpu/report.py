"""What every measurement shares: timing, the device's description, rows written at once."""

from __future__ import annotations

import importlib.metadata
import json
import os
import platform
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

PACKAGES = (
    "torch", "triton", "sglang", "flashinfer-python", "sglang-kernel", "transformers", "numpy",
)  # fmt: skip
# A dry run pretends: tiny sizes on the CPU, kernels in Triton's interpreter.
DRY = os.environ.get("CAMPAIGN_DRY_RUN") == "1"
DEVICE = "cpu" if DRY else "cuda"


def milliseconds(call: Callable[[], Any], samples: int = 20, warm_up: int = 3) -> list[float]:
    """GPU time of each call, by events, with the L2 cache flushed in between."""
    if DRY:
        start = time.perf_counter()
        call()
        return [1e3 * (time.perf_counter() - start)]
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


def synchronize() -> None:
    """Wait for the device."""
    if not DRY:
        torch.cuda.synchronize()


def median(samples: list[float]) -> float:
    return statistics.median(samples)


def multiprocessors() -> int:
    """Of the device; a few in a dry run."""
    return 4 if DRY else torch.cuda.get_device_properties(0).multi_processor_count


def device_report() -> dict[str, Any]:
    """What was measured on: device, driver, versions, command, time."""
    versions = {"python": platform.python_version(), "cuda": torch.version.cuda}
    for package in PACKAGES:
        try:
            versions[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            versions[package] = "not installed"
    found: dict[str, Any] = {
        "command": " ".join(["python", *sys.argv]),
        "date": time.strftime("%Y-%m-%d %H:%M UTC", time.gmtime()),
        "versions": versions,
    }
    if DRY:
        return {**found, "device": "dry run on a CPU: no figure here is a measurement"}
    properties = torch.cuda.get_device_properties(0)
    fields = "name,driver_version,clocks.max.sm,clocks.max.mem,power.limit,mig.mode.current"
    asked = ["nvidia-smi", f"--query-gpu={fields}", "--format=csv,noheader"]
    try:
        smi = subprocess.run(asked, capture_output=True, text=True, timeout=20).stdout.strip()
    except (OSError, subprocess.TimeoutExpired) as error:
        smi = f"nvidia-smi: {error}"
    return {
        **found,
        "device": properties.name,
        "multiprocessors": properties.multi_processor_count,
        "memory_bytes": properties.total_memory,
        "nvidia_smi": {"fields": fields, "values": smi},
    }


class Rows:
    """A file of rows, one JSON object a line, each on the disk when it is known."""

    def __init__(self, path: Path) -> None:
        self.path = path
        path.parent.mkdir(parents=True, exist_ok=True)

    def add(self, **row: Any) -> dict[str, Any]:
        with self.path.open("a") as file:
            file.write(json.dumps(row) + "\n")
            file.flush()
            os.fsync(file.fileno())
        shown = {k: v for k, v in row.items() if k != "samples"}
        print("  ".join(f"{k} {_cell(v)}" for k, v in shown.items()), flush=True)
        return row

    def read(self) -> list[dict[str, Any]]:
        if not self.path.exists():
            return []
        return [json.loads(line) for line in self.path.read_text().splitlines()]


def _cell(value: Any) -> str:
    return f"{value:.4g}" if isinstance(value, float) else str(value)
