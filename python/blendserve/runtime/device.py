"""What this engine runs on, as the cost model knows it."""

from __future__ import annotations

import functools
import logging
import os
from dataclasses import dataclass
from typing import Any

import torch

from blendserve.config import Settings
from blendserve.planner import (
    CostModel,
    Hardware,
    ModelSpec,
    hardware,
    known_device,
    nearest_device,
)

logger = logging.getLogger(__name__)

# Dense bfloat16 (before 8.0: float16) operations per clock and multiprocessor, and CUDA cores per
# multiprocessor, by compute capability: NVIDIA's architecture white papers.
_CHIPS = {
    (7, 0): (1024, 64), (7, 5): (1024, 64),
    (8, 0): (2048, 64), (8, 6): (1024, 128), (8, 7): (1024, 128), (8, 9): (1024, 128),
    (9, 0): (4096, 128),
    (10, 0): (8192, 128), (10, 3): (8192, 128),
    (12, 0): (1024, 128), (12, 1): (1024, 128),
}  # fmt: skip


@dataclass(frozen=True)
class Gpu:
    """What NVIDIA's driver says of a device; 0 for what it does not say."""

    name: str
    capability: tuple[int, int]
    multiprocessors: int
    clock_hz: float
    memory_clock_hz: float
    memory_bus_bits: int
    memory_bytes: int


def cost_model_of(model_config: Any, tp_size: int | None, settings: Settings) -> CostModel:
    """The cost model of a server, from SGLang's model configuration. The log says what of the model
    or the device is not known."""
    spec = ModelSpec.from_config(model_config.hf_config.to_dict())
    for caveat in spec.caveats:
        _warn(caveat)
    chip, ranks = choose_hardware(settings.hardware), int(tp_size or 1)
    # Of a stand-in nothing that it attains is known any better.
    of = CostModel.tensor_parallel if chip.guess else CostModel.attained
    return of(spec, chip, ranks)


def choose_hardware(name: str) -> Hardware:
    """The device to plan for: a row of the hardware table or a .json file by name; "auto" is the
    first GPU that this process may use, or the CPU. Raises HardwareError for another name."""
    if name != "auto":
        return hardware(name)
    if os.environ.get("SGLANG_USE_CPU_ENGINE") == "1":
        return hardware("cpu")
    gpu = first_gpu()
    return hardware("cpu") if gpu is None else hardware_of(gpu)


def hardware_of(gpu: Gpu) -> Hardware:
    """The row of this chip; else, with a warning, what the driver says of it; else the row of the
    nearest memory."""
    # A part of a chip has the whole one's name, and not its figures.
    row = None if " MIG " in gpu.name else known_device(gpu.name)
    if row is not None:
        return row
    figures = (gpu.multiprocessors, gpu.clock_hz, gpu.memory_clock_hz, gpu.memory_bus_bits)
    operations, _ = _CHIPS.get(gpu.capability, (0, 0))
    if operations and all(figures):
        row = Hardware(
            name=gpu.name,
            compute_flops=gpu.multiprocessors * gpu.clock_hz * operations,
            # Two transfers a clock.
            bandwidth_bytes=2 * gpu.memory_clock_hz * gpu.memory_bus_bits / 8,
            memory_bytes=float(gpu.memory_bytes),
            source="multiprocessors, clocks and bus width as the driver reports them",
        )
        taken = "the driver's figures"
    else:
        row = nearest_device(gpu.memory_bytes)
        taken = f"those of {row.name}, whose memory is nearest"
    _warn(
        f"{gpu.name!r} is not in the hardware table; plans are made for {taken}: "
        f"{row.compute_flops / 1e12:.0f} TFLOP/s, {row.bandwidth_bytes / 1e9:.0f} GB/s. Measure it "
        "(benchmark/gpu) and give the file of its figures: --hardware FILE.json"
    )
    return row


@functools.cache
def _warn(message: str) -> None:
    """Once in a process."""
    logger.warning(message)


@functools.cache
def first_gpu() -> Gpu | None:
    """The first NVIDIA GPU of this process; None without one.

    Asked of the driver's management library, which, unlike CUDA, takes no memory on the GPU; of
    CUDA where that library does not answer.
    """
    try:
        found = _by_nvml()
    except Exception as error:  # The library has an exception class per code.
        logger.info("NVML does not answer (%s); CUDA is asked", error)
        found = None
    if found is not None or not torch.cuda.is_available():
        return found
    said = torch.cuda.get_device_properties(0)
    return Gpu(
        name=said.name,
        capability=(said.major, said.minor),
        multiprocessors=said.multi_processor_count,
        clock_hz=1e3 * getattr(said, "clock_rate", 0),
        memory_clock_hz=1e3 * getattr(said, "memory_clock_rate", 0),
        memory_bus_bits=getattr(said, "memory_bus_width", 0),
        memory_bytes=said.total_memory,
    )


def _by_nvml() -> Gpu | None:
    import pynvml as nvml

    nvml.nvmlInit()
    try:
        # CUDA_VISIBLE_DEVICES numbers devices by speed, NVML by bus. Machines with several kinds of
        # GPU need CUDA_DEVICE_ORDER=PCI_BUS_ID for more than this.
        visible = os.environ.get("CUDA_VISIBLE_DEVICES")
        first = "0" if visible is None else visible.split(",")[0].strip()
        if first in ("", "-1") or not nvml.nvmlDeviceGetCount():
            return None
        handle = (
            nvml.nvmlDeviceGetHandleByIndex(int(first))
            if first.isdigit()
            else nvml.nvmlDeviceGetHandleByUUID(first)
        )
        name = nvml.nvmlDeviceGetName(handle)
        if first.startswith("MIG"):
            # A part of a chip: CUDA, which sees only that part, knows its size.
            return None
        major, minor = nvml.nvmlDeviceGetCudaComputeCapability(handle)
        _, cores = _CHIPS.get((major, minor), (0, 128))
        return Gpu(
            name=name,
            capability=(major, minor),
            multiprocessors=nvml.nvmlDeviceGetNumGpuCores(handle) // cores,
            clock_hz=1e6 * nvml.nvmlDeviceGetMaxClockInfo(handle, nvml.NVML_CLOCK_SM),
            memory_clock_hz=1e6 * nvml.nvmlDeviceGetMaxClockInfo(handle, nvml.NVML_CLOCK_MEM),
            memory_bus_bits=nvml.nvmlDeviceGetMemoryBusWidth(handle),
            memory_bytes=nvml.nvmlDeviceGetMemoryInfo(handle).total,
        )
    finally:
        nvml.nvmlShutdown()
