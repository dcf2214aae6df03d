"""Which figures a device is planned with, from what NVIDIA's driver calls it."""

from __future__ import annotations

import sys
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from blendserve.planner import HARDWARE
from blendserve.runtime import device
from blendserve.runtime.device import Gpu, choose_hardware, hardware_of


@pytest.mark.parametrize(
    ("name", "row"),
    [
        ("NVIDIA A100-SXM4-80GB", "a100-80g-sxm"),
        ("NVIDIA A100-SXM4-40GB", "a100-40g-sxm"),
        ("NVIDIA H100 80GB HBM3", "h100-80g-sxm"),
        ("NVIDIA H100 PCIe", "h100-80g-pcie"),
        ("NVIDIA GH200 480GB", "gh200-96g"),
        ("NVIDIA H200", "h200-141g-sxm"),
        ("NVIDIA H20", "h20-96g-sxm"),
        ("NVIDIA B200", "b200-180g-sxm"),
        ("NVIDIA GB200", "gb200-186g"),
        ("NVIDIA L40S", "l40s"),
        ("NVIDIA L4", "l4"),
    ],
)
def test_a_chip_of_the_table_has_its_row(name: str, row: str) -> None:
    assert hardware_of(Gpu(name, (9, 0), 0, 0, 0, 0, 1)) is HARDWARE[row]


# (as the driver says it: name, capability, multiprocessors, MHz, memory MHz, bus bits), and the
# datasheet's TFLOP/s of dense bfloat16 and GB/s.
OTHERS: list[tuple[tuple[Any, ...], float, float]] = [
    (("NVIDIA A100-SXM4-80GB MIG 3g.40gb", (8, 0), 42, 1410, 1593, 2560), 121, 1_020),
    (("NVIDIA X100", (9, 0), 132, 1980, 2619, 5120), 989, 3_350),  # an H100's
    (("NVIDIA X8", (8, 6), 72, 1695, 6251, 384), 125, 600),  # an A10's
    (("NVIDIA X200", (10, 0), 148, 1965, 3996, 8192), 2_250, 8_000),  # a B200's
    (("NVIDIA X6000", (12, 0), 188, 2430, 13998, 512), 468, 1_792),  # an RTX PRO 6000's
    (("Tesla X4", (7, 5), 40, 1590, 5001, 256), 65, 320),  # a T4's
]


@pytest.mark.parametrize(("said", "tflops", "gb_s"), OTHERS, ids=[row[0][0] for row in OTHERS])
def test_another_chip_is_planned_with_the_drivers_figures(
    said: tuple[Any, ...], tflops: float, gb_s: float, caplog: pytest.LogCaptureFixture
) -> None:
    name, capability, multiprocessors, clock, memory_clock, bus = said
    device._warn.cache_clear()
    gpu = Gpu(name, capability, multiprocessors, clock * 1e6, memory_clock * 1e6, bus, 40 << 30)
    found = hardware_of(gpu)
    # Clocks at their highest, which none holds under load.
    assert found.compute_flops == pytest.approx(tflops * 1e12, rel=0.18)
    assert found.bandwidth_bytes == pytest.approx(gb_s * 1e9, rel=0.06)
    assert found.memory_bytes == 40 << 30
    assert f"{name!r} is not in the hardware table" in caplog.text


def test_of_a_chip_that_nothing_is_known_of_the_nearest_memory_decides(
    caplog: pytest.LogCaptureFixture,
) -> None:
    device._warn.cache_clear()
    row = hardware_of(Gpu("NVIDIA X1", (13, 0), 100, 1e9, 1e9, 4096, 141 * 10**9))
    assert row is HARDWARE["h200-141g-sxm"]
    assert "--hardware FILE.json" in caplog.text


class FakeNvml:
    """The calls of NVIDIA's management library, for two GPUs."""

    NVML_CLOCK_SM, NVML_CLOCK_MEM = 1, 2
    names = ("NVIDIA H200", "NVIDIA L4")

    def __getattr__(self, name: str) -> Any:
        if name in ("nvmlInit", "nvmlShutdown"):
            return lambda: None
        raise AttributeError(name)

    def nvmlDeviceGetCount(self) -> int:
        return len(self.names)

    def nvmlDeviceGetHandleByIndex(self, index: int) -> int:
        return index

    def nvmlDeviceGetHandleByUUID(self, uuid: str) -> int:
        return 1 if uuid == "GPU-second" else 0

    def nvmlDeviceGetName(self, handle: int) -> str:
        return self.names[handle]

    def nvmlDeviceGetCudaComputeCapability(self, handle: int) -> tuple[int, int]:
        return ((9, 0), (8, 9))[handle]

    def nvmlDeviceGetNumGpuCores(self, handle: int) -> int:
        return (16_896, 7_424)[handle]

    def nvmlDeviceGetMaxClockInfo(self, handle: int, kind: int) -> int:
        return ((1_980, 3_201), (2_040, 6_251))[handle][kind - 1]

    def nvmlDeviceGetMemoryBusWidth(self, handle: int) -> int:
        return (6_144, 192)[handle]

    def nvmlDeviceGetMemoryInfo(self, handle: int) -> Any:
        return SimpleNamespace(total=(141, 24)[handle] * 10**9)


@pytest.fixture
def driver(monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.setitem(sys.modules, "pynvml", FakeNvml())
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    monkeypatch.delenv("SGLANG_USE_CPU_ENGINE", raising=False)
    for touches in ("init", "get_device_name", "get_device_properties", "current_device"):
        monkeypatch.setattr(torch.cuda, touches, lambda *_: pytest.fail("CUDA was initialised"))
    device.first_gpu.cache_clear()
    yield monkeypatch
    device.first_gpu.cache_clear()


def test_the_device_is_found_without_memory_of_it_being_taken(driver: Any) -> None:
    """The engine's HTTP process asks, too: a CUDA context there is memory that nobody counted."""
    assert choose_hardware("auto") is HARDWARE["h200-141g-sxm"]
    found = device.first_gpu()
    assert found is not None
    assert (found.multiprocessors, found.memory_bus_bits) == (132, 6_144)


@pytest.mark.parametrize("visible", ["1", "1,0", "GPU-second"])
def test_the_first_device_that_may_be_used_counts(driver: Any, visible: str) -> None:
    driver.setenv("CUDA_VISIBLE_DEVICES", visible)
    found = device.first_gpu()
    assert found is not None
    assert (found.name, found.multiprocessors) == ("NVIDIA L4", 58)


@pytest.mark.parametrize("visible", ["", "-1"])
def test_hidden_gpus_and_the_cpu_engine_are_planned_for_a_cpu(driver: Any, visible: str) -> None:
    driver.setenv("CUDA_VISIBLE_DEVICES", visible)
    assert choose_hardware("auto").name == "cpu"
    driver.delenv("CUDA_VISIBLE_DEVICES")
    driver.setenv("SGLANG_USE_CPU_ENGINE", "1")
    assert choose_hardware("auto").name == "cpu"


def test_a_row_that_is_named_asks_no_driver(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(device, "first_gpu", lambda: pytest.fail("asked"))
    assert choose_hardware("l40s") is HARDWARE["l40s"]
