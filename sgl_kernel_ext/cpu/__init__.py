"""Kernels for a CPU, in C++ (``csrc``): attention, once per layer for the whole batch, and rows."""

from sgl_kernel_ext.cpu.attention import DTYPES, TILING, run
from sgl_kernel_ext.cpu.library import INSTRUCTION_SETS, instruction_set, unavailable_reason

__all__ = ["DTYPES", "INSTRUCTION_SETS", "TILING", "instruction_set", "run", "unavailable_reason"]
