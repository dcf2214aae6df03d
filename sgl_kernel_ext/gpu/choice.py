"""Which families of kernels take over attention steps on this machine."""

from __future__ import annotations

import importlib
from typing import Any

import torch

from sgl_kernel_ext.gpu.flashinfer_steps import FlashInferSteps
from sgl_kernel_ext.gpu.steps import StepKernels
from sgl_kernel_ext.gpu.triton_steps import TritonSteps

FLASHINFER_NAMES = ("BatchPODWithPagedKVCacheWrapper", "MultiLevelCascadeAttentionWrapper")


def flashinfer_or_reason() -> tuple[Any | None, str]:
    """The flashinfer module if it has what is needed, and the reason for the choice."""
    try:
        module = importlib.import_module("flashinfer")
    except ImportError as error:
        return None, f"FlashInfer cannot be imported ({error})"
    missing = [name for name in FLASHINFER_NAMES if not hasattr(module, name)]
    version = getattr(module, "__version__", "of unknown version")
    if missing:
        return None, f"FlashInfer {version} lacks {', '.join(missing)}"
    return module, f"FlashInfer {version} is installed"


def choose_kernels(device: torch.device | str) -> tuple[list[StepKernels], str]:
    """Families in the order to ask them, and a sentence that says why.

    Triton comes last, for what FlashInfer has no kernel for (a soft cap in a mixed step).
    """
    device = torch.device(device)
    multiprocessors = 1
    if device.type == "cuda":
        multiprocessors = torch.cuda.get_device_properties(device).multi_processor_count
    module, reason = flashinfer_or_reason()
    if module is None:
        return [TritonSteps(device, multiprocessors)], f"Triton, because {reason}"
    return (
        [
            FlashInferSteps(module, device, multiprocessors),
            TritonSteps(device, multiprocessors),
        ],
        f"FlashInfer with Triton behind it, because {reason}",
    )
