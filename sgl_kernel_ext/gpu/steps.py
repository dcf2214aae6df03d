"""The steps that get kernels of our own on a GPU: mixed ones, and decodes under shared prefixes.

Two families can compute them: FlashInfer (POD attention, cascade) and the Triton kernels here.
Both are planned once per step and layer shape, and run once per layer.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
import torch

from sgl_kernel_ext.batch import AttentionShape, PagedBatch
from sgl_kernel_ext.groups import IntArray, Segment

# (query, key_pool, value_pool, output): one layer.
Runner = Callable[[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor], None]

# Shared KV that is read once instead of per request must be this much of all KV to be worth the
# second pass and the merge.
MIN_SAVED_SHARE = 0.1
FLASHINFER_NAMES = ("BatchPODWithPagedKVCacheWrapper", "MultiLevelCascadeAttentionWrapper")


@dataclass(frozen=True)
class Step:
    """One step's requests: prefill chunks first, then the decodes, as SGLang mixes them."""

    batch: PagedBatch
    segments: list[Segment]  # of the decodes; members are numbers into the batch
    slot_table: torch.Tensor  # [rows, positions], int32, on the device

    @property
    def decodes(self) -> IntArray:
        return np.flatnonzero(self.batch.query_lens == 1)

    @property
    def is_mixed(self) -> bool:
        return 0 < len(self.decodes) < len(self.batch)

    @property
    def saved_tokens(self) -> int:
        """Positions of KV that the decodes need not read, because others read them."""
        read = sum(s.end - s.begin for s in self.segments)
        return int(self.batch.kv_lens[self.decodes].sum()) - read

    @property
    def worth_planning(self) -> bool:
        """Whether SGLang's own kernels would leave something on the table."""
        total = int(self.batch.kv_lens[self.decodes].sum())
        return self.is_mixed or self.saved_tokens > MIN_SAVED_SHARE * total


class StepKernels(Protocol):
    """A family of kernels."""

    name: str

    def plan(self, step: Step, shape: AttentionShape, dtype: torch.dtype) -> Runner | None:
        """Plan a step for layers of one shape; None where the family has no kernel for it."""


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
    from sgl_kernel_ext.gpu.flashinfer_steps import FlashInferSteps
    from sgl_kernel_ext.gpu.triton_steps import TritonSteps

    module, reason = flashinfer_or_reason()
    if module is None:
        return [TritonSteps(device)], f"Triton, because {reason}"
    return (
        [FlashInferSteps(module, device), TritonSteps(device)],
        f"FlashInfer with Triton behind it, because {reason}",
    )
