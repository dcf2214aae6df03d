"""Datasheet figures of accelerators, each row with its source.

Dense 16-bit matrix rate with 32-bit accumulation, bandwidth and size of the main memory, dense
8-bit rate where there is one, and what one direction of the links to its peers carries.
"""

from __future__ import annotations

from typing import NamedTuple

_GB, _T = 1e9, 1e12


class Chip(NamedTuple):
    """name: of the table. tera_flops, fp8_tera_flops: 10^12 FLOP/s. bandwidth: GB/s. memory: GB.
    links: GB/s to other devices, 0 where unknown. kernels: name in aiconfigurator-core. device:
    regular expression for the name that the driver reports. aliases: what people call it."""

    name: str
    tera_flops: float
    bandwidth: float
    memory: float
    fp8_tera_flops: float
    links: float
    kernels: str
    device: str
    aliases: tuple[str, ...]
    source: str


# The first whose `device` fits is taken, so special models stand before general ones.
CHIPS = (
    Chip("a100-40g-sxm", 312, 1_555, 40, 0, 300, "", r"A100-SXM4-40GB", (),
         "NVIDIA A100 datasheet, 40GB SXM: BF16 dense 312 TFLOP/s, 1,555 GB/s"),
    Chip("a100-80g-pcie", 312, 1_935, 80, 0, 32, "a100_pcie", r"A100.*PCIe?", ("a100-pcie",),
         "NVIDIA A100 datasheet, 80GB PCIe: BF16 dense 312 TFLOP/s, 1,935 GB/s"),
    Chip("a100-80g-sxm", 312, 2_039, 80, 0, 300, "a100_sxm", r"A100",
         ("a100", "a100-80g", "a100-80gb", "a100-sxm"),
         "NVIDIA A100 datasheet, 80GB SXM: BF16 dense 312 TFLOP/s, 2,039 GB/s"),
    Chip("a800-80g-sxm", 312, 2_039, 80, 0, 200, "a100_sxm", r"A800", ("a800",),
         "NVIDIA A800 datasheet, 80GB SXM: as the A100, NVLink 400 GB/s"),
    Chip("a30", 165, 933, 24, 0, 100, "a30", r"A30\b", (),
         "NVIDIA A30 datasheet: BF16 dense 165 TFLOP/s, 933 GB/s"),
    Chip("a10g", 70, 600, 24, 0, 32, "", r"A10G", (),
         "NVIDIA A10G datasheet: FP16 dense 70 TFLOP/s, 600 GB/s"),
    Chip("a10", 125, 600, 24, 0, 32, "", r"A10\b", (),
         "NVIDIA A10 datasheet: BF16 dense 125 TFLOP/s, 600 GB/s"),
    Chip("h100-80g-pcie", 756.5, 2_000, 80, 1_513, 64, "h100_pcie", r"H100 PCIe", ("h100-pcie",),
         "NVIDIA H100 datasheet, PCIe: BF16 1,513 TFLOP/s with sparsity (half dense), 2 TB/s"),
    Chip("h100-94g-nvl", 835.5, 3_900, 94, 1_671, 300, "", r"H100 NVL", ("h100-nvl",),
         "NVIDIA H100 NVL datasheet: BF16 1,671 TFLOP/s with sparsity (half dense), 3.9 TB/s"),
    Chip("gh200-96g", 989, 4_000, 96, 1_979, 450, "", r"GH200", ("gh200",),
         "NVIDIA GH200 datasheet, HBM3: BF16 1,979 TFLOP/s with sparsity (half dense), 4 TB/s"),
    Chip("h200-141g-sxm", 989, 4_800, 141, 1_979, 450, "h200_sxm", r"H200",
         ("h200", "h200-sxm", "h200-141g", "h200-141gb"),
         "NVIDIA H200 datasheet, SXM: BF16 1,979 TFLOP/s with sparsity (half dense), 4.8 TB/s"),
    Chip("h20-96g-sxm", 148, 4_000, 96, 296, 450, "", r"H20\b", ("h20",),
         "NVIDIA H20 datasheet: BF16 dense 148 TFLOP/s, 4.0 TB/s"),
    Chip("h800-80g-sxm", 989, 3_350, 80, 1_979, 200, "h100_sxm", r"H800", ("h800",),
         "NVIDIA H800 datasheet, SXM: as the H100, NVLink 400 GB/s"),
    Chip("h100-80g-sxm", 989, 3_350, 80, 1_979, 450, "h100_sxm", r"H100",
         ("h100", "h100-sxm", "h100-80g", "h100-80gb"),
         "NVIDIA H100 datasheet, SXM: BF16 1,979 TFLOP/s with sparsity (half dense), 3.35 TB/s"),
    Chip("gb200-186g", 2_500, 8_000, 186, 5_000, 900, "gb200", r"GB200", ("gb200",),
         "NVIDIA GB200 NVL72 datasheet, one GPU: BF16 dense 2,500 TFLOP/s, 8 TB/s"),
    Chip("gb300-288g", 2_500, 8_000, 279, 5_000, 900, "gb300", r"GB300", ("gb300",),
         "NVIDIA GB300 NVL72 datasheet, one GPU: BF16 dense 2,500 TFLOP/s, 8 TB/s"),
    Chip("b300-288g-sxm", 2_250, 7_750, 270, 4_500, 900, "b300_sxm", r"B300", ("b300",),
         "NVIDIA HGX B300 datasheet, one GPU: BF16 dense 2,250 TFLOP/s, 7.75 TB/s"),
    Chip("b200-180g-sxm", 2_250, 7_700, 180, 4_500, 900, "b200_sxm", r"B200",
         ("b200", "b200-sxm", "b200-180g", "b200-180gb"),
         "NVIDIA HGX B200 datasheet, one GPU: BF16 dense 2,250 TFLOP/s, 7.7 TB/s"),
    Chip("l40s", 362, 864, 48, 733, 32, "l40s", r"L40S", (),
         "NVIDIA L40S datasheet: BF16 dense 362.05 TFLOP/s, 864 GB/s"),
    Chip("l40", 181, 864, 48, 362, 32, "", r"L40\b", (),
         "NVIDIA L40 datasheet: BF16 dense 181.05 TFLOP/s, 864 GB/s"),
    Chip("l4", 121, 300, 24, 242, 32, "l4", r"L4\b", (),
         "NVIDIA L4 datasheet: BF16 242 TFLOP/s with sparsity (half dense), 300 GB/s"),
    Chip("rtx-pro-6000", 467.8, 1_792, 96, 935.6, 64, "rtx_pro_6000_server", r"RTX PRO 6000",
         ("rtx-pro-6000-server", "rtxpro6000"),
         "aiconfigurator-core 0.12.0, RTX PRO 6000 Server: BF16 467.8 TFLOP/s, 1,792 GB/s"),
    Chip("rtx-6000-ada", 364, 960, 48, 728.5, 32, "", r"RTX 6000 Ada", ("6000-ada", "rtx6000ada"),
         "NVIDIA RTX 6000 Ada datasheet: FP8 1,457 TFLOP/s with sparsity (a quarter of it in BF16 "
         "dense), 960 GB/s"),
    Chip("rtx-4090", 165.2, 1_008, 24, 330.3, 32, "", r"RTX 4090", ("4090", "rtx4090"),
         "NVIDIA Ada architecture paper, RTX 4090: BF16 dense 165.2 TFLOP/s, 1,008 GB/s"),
    Chip("rtx-5090", 209.5, 1_792, 32, 419, 64, "", r"RTX 5090", ("5090", "rtx5090"),
         "NVIDIA RTX Blackwell architecture paper, RTX 5090: BF16 dense 209.5 TFLOP/s, 1,792 GB/s"),
    Chip("mi300x-192g", 1_307.4, 5_300, 192, 2_614.9, 448, "", r"MI300X", ("mi300x",),
         "AMD Instinct MI300X datasheet: BF16 dense 1,307.4 TFLOP/s, 5.3 TB/s"),
    Chip("arc-pro-b60", 98.3, 456, 24, 98.3, 28, "b60", r"B60\b", ("b60",),
         "aiconfigurator-core 0.12.0, Intel Arc Pro B60: BF16 98.3 TFLOP/s, 456 GB/s"),
)  # fmt: skip
