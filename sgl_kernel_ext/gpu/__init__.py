"""Attention on a GPU: Triton kernels over the same plans as on a CPU."""

from sgl_kernel_ext.gpu.attention import DevicePlan, run, tiling, to_device

__all__ = ["DevicePlan", "run", "tiling", "to_device"]
