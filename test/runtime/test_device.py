"""Which figures a device is planned with, from what NVIDIA's driver calls it."""

from __future__ import annotations

import sys
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from blendserve.planner import HARDWARE
from blendserve.runtime import device
from blendserve.runtime.device import DeviceError, Gpu, choose_hardware, hardware_of


@pytest.mark.parametrize(
    ("name", "row"),
    [
        ("NVIDIA A100-SXM4-80GB", "a100-80g-sxm"),
        ("NVIDIA H100 80GB HBM3", "h100-80g-sxm"),
        ("NVIDIA H200", "h200-141g-sxm"),
        ("NVIDIA L40S", "l40s"),
    ],
)
def test_a_chip_of_the_table_has_its_row(name: str, row: str) -> None:
    assert hardware_of(Gpu(name, (9, 0), 0, 0, 0, 0, 0)) is HARDWARE[row]


# (as the driver says it: name, capability, multiprocessors, MHz, memory MHz, bus bits), and the
# datasheet's TFLOP/s of dense bfloat16 and GB/s.
OTHERS: list[tuple[tuple[Any, ...], float, float]] = [
    (("NVIDIA GH200 480GB", (9, 0), 132, 1980, 2619, 6144), 989, 4_000),
    (("NVIDIA H100 PCIe", (9, 0), 114, 1755, 1593, 5120), 756, 2_039),
    (("NVIDIA H100 NVL", (9, 0), 132, 1785, 2619, 6016), 835, 3_938),
    (("NVIDIA H800", (9, 0), 132, 1980, 2619, 5120), 989, 3_350),
    (("NVIDIA A100-SXM4-40GB", (8, 0), 108, 1410, 1215, 5120), 312, 1_555),
    (("NVIDIA A800-SXM4-80GB", (8, 0), 108, 1410, 1593, 5120), 312, 2_039),
    (("NVIDIA A10", (8, 6), 72, 1695, 6251, 384), 125, 600),
    (("NVIDIA L4", (8, 9), 58, 2040, 6251, 192), 121, 300),
    (("NVIDIA L40", (8, 9), 142, 2490, 9001, 384), 362, 864),
    (("NVIDIA B200", (10, 0), 148, 1965, 3996, 8192), 2_250, 8_000),
    (("NVIDIA GB200", (10, 0), 152, 2062, 3996, 8192), 2_500, 8_000),
    (("NVIDIA B300 SXM6 AC", (10, 3), 148, 2032, 3996, 8192), 2_500, 8_000),
    (("NVIDIA RTX PRO 6000 Blackwell Server Edition", (12, 0), 188, 2430, 12481, 512), 504, 1_597),
    (("Tesla T4", (7, 5), 40, 1590, 5001, 256), 65, 320),
]


@pytest.mark.parametrize(("said", "tflops", "gb_s"), OTHERS, ids=[row[0][0] for row in OTHERS])
def test_another_chip_is_planned_with_the_drivers_figures(
    said: tuple[Any, ...], tflops: float, gb_s: float, caplog: pytest.LogCaptureFixture
) -> None:
    name, capability, multiprocessors, clock, memory_clock, bus = said
    hardware_of.cache_clear()
    gpu = Gpu(name, capability, multiprocessors, clock * 1e6, memory_clock * 1e6, bus, 40 << 30)
    found = hardware_of(gpu)
    # Clocks at their highest: planning goes by the ratio, which changes little by little.
    assert found.compute_flops == pytest.approx(tflops * 1e12, rel=0.18)
    assert found.bandwidth_bytes == pytest.approx(gb_s * 1e9, rel=0.06)
    assert found.memory_bytes == 40 << 30
    assert f"{name} is not in the hardware table" in caplog.text


def test_a_chip_that_nothing_is_known_of_is_refused_with_the_ways_out() -> None:
    with pytest.raises(DeviceError, match=r"--hardware FILE\.json") as refusal:
        hardware_of(Gpu("NVIDIA X1", (13, 0), 100, 1e9, 1e9, 4096, 1 << 30))
    assert "'NVIDIA X1' (compute capability 13.0)" in str(refusal.value)
    assert all(row in str(refusal.value) for row in ("h100-80g-sxm", "l40s"))


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
