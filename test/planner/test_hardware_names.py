"""Devices by the names that people type and drivers report."""

from __future__ import annotations

import pytest

from blendserve.planner import HARDWARE, hardware, known_device, nearest_device


@pytest.mark.parametrize(
    ("typed", "row"),
    [
        ("h100", "h100-80g-sxm"),
        ("A100", "a100-80g-sxm"),
        ("H200", "h200-141g-sxm"),
        ("b200", "b200-180g-sxm"),
        ("h100_80gb", "h100-80g-sxm"),
        ("RTX 4090", "rtx-4090"),
        ("4090", "rtx-4090"),
        ("mi300x", "mi300x-192g"),
        ("h20", "h20-96g-sxm"),
        (" l40s ", "l40s"),
    ],
)
def test_names_as_people_type_them(typed: str, row: str) -> None:
    assert hardware(typed) is HARDWARE[row]


@pytest.mark.parametrize(
    ("reported", "row"),
    [
        ("NVIDIA A100-SXM4-80GB", "a100-80g-sxm"),
        ("NVIDIA A100-SXM4-40GB", "a100-40g-sxm"),
        ("NVIDIA A100 80GB PCIe", "a100-80g-pcie"),
        ("NVIDIA A800-SXM4-80GB", "a800-80g-sxm"),
        ("NVIDIA A10", "a10"),
        ("NVIDIA A10G", "a10g"),
        ("NVIDIA H100 80GB HBM3", "h100-80g-sxm"),
        ("NVIDIA H100 PCIe", "h100-80g-pcie"),
        ("NVIDIA H100 NVL", "h100-94g-nvl"),
        ("NVIDIA H200", "h200-141g-sxm"),
        ("NVIDIA H20", "h20-96g-sxm"),
        ("NVIDIA H800", "h800-80g-sxm"),
        ("NVIDIA GH200 480GB", "gh200-96g"),
        ("NVIDIA B200", "b200-180g-sxm"),
        ("NVIDIA GB200", "gb200-186g"),
        ("NVIDIA L4", "l4"),
        ("NVIDIA L40", "l40"),
        ("NVIDIA L40S", "l40s"),
        ("NVIDIA GeForce RTX 4090", "rtx-4090"),
        ("NVIDIA GeForce RTX 5090", "rtx-5090"),
        ("NVIDIA RTX 6000 Ada Generation", "rtx-6000-ada"),
        ("NVIDIA RTX PRO 6000 Blackwell Server Edition", "rtx-pro-6000"),
        ("AMD Instinct MI300X", "mi300x-192g"),
    ],
)
def test_names_as_drivers_report_them(reported: str, row: str) -> None:
    assert known_device(reported) is HARDWARE[row]


def test_an_unknown_device_is_taken_for_that_of_the_nearest_memory() -> None:
    assert known_device("Tesla V100-SXM2-32GB") is None
    assert nearest_device(34e9).name == "rtx-5090"
    assert nearest_device(150e9).name == "h200-141g-sxm"
