"""What a device attains at most: a large matrix product, and a copy through its memory."""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from dataclasses import dataclass

import torch

_ROUNDS = 7
# Far beyond any cache; a GPU has several times the memory traffic in the same time.
_CPU_COPY_BYTES, _GPU_COPY_BYTES = 512 << 20, 4 << 30
_CPU_SIDE, _GPU_SIDE = 2_048, 8_192


@dataclass(frozen=True)
class Ceilings:
    """device: its name. compute_flops: FLOP/s of a product in `dtype`; bandwidth_bytes: read and
    written per second by a copy; memory_bytes: there."""

    device: str
    dtype: str
    compute_flops: float
    bandwidth_bytes: float
    memory_bytes: float


def measure(dtype: str) -> Ceilings:
    """Of the first GPU, or this CPU: the best of a few rounds each.

    Args:
        dtype: as SGLang's --dtype has it, one of torch's names.
    """
    has_gpu = torch.cuda.is_available()
    where = torch.device("cuda" if has_gpu else "cpu")
    side = _GPU_SIDE if has_gpu else _CPU_SIDE
    a, b = (torch.rand(side, side, device=where).to(getattr(torch, dtype)) for _ in range(2))
    size = _GPU_COPY_BYTES if has_gpu else _CPU_COPY_BYTES
    source = torch.zeros(size, dtype=torch.uint8, device=where)
    target = torch.empty_like(source)
    if has_gpu:
        said = torch.cuda.get_device_properties(0)
        name, memory = str(said.name), float(said.total_memory)
    else:
        name, memory = _processor(), float(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"))
    return Ceilings(
        device=name,
        dtype=dtype,
        compute_flops=2.0 * side**3 / _least_seconds(lambda: torch.matmul(a, b), has_gpu),
        bandwidth_bytes=2.0 * size / _least_seconds(lambda: target.copy_(source), has_gpu),
        memory_bytes=memory,
    )


def _least_seconds(work: Callable[[], object], on_gpu: bool) -> float:
    found = []
    for _ in range(_ROUNDS):
        if on_gpu:
            torch.cuda.synchronize()
        started = time.perf_counter()
        work()
        if on_gpu:
            torch.cuda.synchronize()
        found.append(time.perf_counter() - started)
    return min(found)


def _processor() -> str:
    try:
        with open("/proc/cpuinfo", encoding="utf-8") as lines:
            name = next(line.partition(":")[2] for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        name = "CPU"
    return f"{name.strip()}, {torch.get_num_threads()} threads"
