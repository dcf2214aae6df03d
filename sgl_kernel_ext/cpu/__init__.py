"""Attention on a CPU: kernels in C++ (``csrc``), called once per layer for the whole batch."""

from sgl_kernel_ext.cpu.attention import DTYPES, TILING, run
from sgl_kernel_ext.cpu.library import INSTRUCTION_SETS, instruction_set, unavailable_reason

__all__ = ["DTYPES", "INSTRUCTION_SETS", "TILING", "instruction_set", "run", "unavailable_reason"]
