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
from numpy.typing import NDArray

from sgl_kernel_ext.batch import AttentionShape, PagedBatch
from sgl_kernel_ext.groups import IntArray, Segment, shared_segments

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

    def saved_share(self) -> float:
        """Share of the decodes' KV reads that sharing saves."""
        read = sum(s.end - s.begin for s in self.segments)
        total = int(self.batch.kv_lens[self.decodes].sum())
        return 1.0 - read / total if total else 0.0

    @property
    def worth_planning(self) -> bool:
        """Whether SGLang's own kernels would leave something on the table."""
        return self.is_mixed or self.saved_share() >= MIN_SAVED_SHARE


class StepKernels(Protocol):
    """A family of kernels."""

    name: str

    def plan(self, step: Step, shape: AttentionShape, dtype: torch.dtype) -> Runner | None:
        """Plan a step for layers of one shape; None where the family has no kernel for it."""


class SlotMirror:
    """Host copy of the running requests' slot-table rows, fetched when the batch changes.

    While the same requests decode on, each new position is private, so the copy stays good.
    """

    def __init__(self) -> None:
        self.rows: NDArray[np.int64] = np.empty(0, dtype=np.int64)
        self.lens: IntArray = np.empty(0, dtype=np.int64)
        self.slots: NDArray[np.int32] = np.empty((0, 0), dtype=np.int32)
        self.fetches = 0

    def segments(self, batch: PagedBatch, slot_table: torch.Tensor) -> list[Segment]:
        """Segments of the batch's decodes (`groups.shared_segments`), numbered as in the batch."""
        decodes = np.flatnonzero(batch.query_lens == 1)
        rows, lens = batch.table_rows[decodes], batch.kv_lens[decodes]
        if not len(rows):
            return []
        same = np.array_equal(rows, self.rows) and bool((lens == self.lens + 1).all())
        if not same:
            index = torch.from_numpy(rows).to(slot_table.device)
            self.slots = slot_table[index, : int(lens.max())].cpu().numpy()
            self.rows, self.fetches = rows, self.fetches + 1
        self.lens = lens

        def lookup(members: IntArray, positions: IntArray) -> IntArray:
            known = positions < self.slots.shape[1]
            slots = self.slots[members, np.where(known, positions, 0)].astype(np.int64)
            return np.where(known, slots, -1 - members)

        return [Segment(s.begin, s.end, decodes[s.members]) for s in shared_segments(lookup, lens)]


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
