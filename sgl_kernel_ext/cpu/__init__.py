"""Attention on a CPU: a plan per step in numpy, kernels in C++ (``csrc``), OpenMP threads."""

from sgl_kernel_ext.cpu.attention import DTYPES, run
from sgl_kernel_ext.cpu.library import unavailable_reason
from sgl_kernel_ext.cpu.plan import Plan, make_plan

__all__ = ["DTYPES", "Plan", "make_plan", "run", "unavailable_reason"]
