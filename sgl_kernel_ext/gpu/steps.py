"""The steps that get kernels of our own on a GPU: mixed ones, and decodes under shared prefixes.

Two families can compute them: FlashInfer (POD attention, cascade) and the Triton kernels here.
Both are planned once per step and layer shape, and run once per layer.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np
import torch

from sgl_kernel_ext.batch import AttentionShape, PagedBatch
from sgl_kernel_ext.groups import IntArray, Segment

# (query, key_pool, value_pool, output): one layer.
Runner = Callable[[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor], None]

logger = logging.getLogger(__name__)

# Shared KV that is read once instead of per request must be this much of all KV to be worth the
# second pass and the merge; and a family must save so much more than another to be preferred.
MIN_SAVED_SHARE = 0.1


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
    def tokens(self) -> int:
        """Rows of the query."""
        return int(self.batch.query_lens.sum())

    @property
    def decode_tokens(self) -> int:
        """Positions of KV that the decodes look at."""
        return int(self.batch.kv_lens[self.decodes].sum())

    @property
    def saved_tokens(self) -> int:
        """Positions of KV that the decodes need not read, because others read them."""
        return self.decode_tokens - sum(s.end - s.begin for s in self.segments)


class StepKernels(Protocol):
    """A family of kernels."""

    name: str

    def saved_tokens(self, step: Step) -> int:
        """Of `step.saved_tokens`, those that these kernels do not read."""

    def plan(self, step: Step, shape: AttentionShape, dtype: torch.dtype) -> Runner | None:
        """Plan a step for layers of one shape; None where the family has no kernel for it."""


def by_savings(kernels: Sequence[StepKernels], step: Step) -> list[StepKernels]:
    """The families in the order to ask them: as given, but first one that reads much less."""
    if not kernels:
        return []
    saved = [family.saved_tokens(step) for family in kernels]
    best = max(range(len(kernels)), key=saved.__getitem__)
    if saved[best] - saved[0] <= MIN_SAVED_SHARE * step.decode_tokens:
        best = 0
    return [kernels[best], *(k for i, k in enumerate(kernels) if i != best)]


class Planner:
    """The families, asked in turn: one that fails once at a kind of step is not asked again."""

    def __init__(self, kernels: Sequence[StepKernels]) -> None:
        self.kernels = list(kernels)
        self._failed: set[tuple[str, bool]] = set()

    def saved_tokens(self, step: Step) -> int:
        """What the family that would be asked first does not read. The ranks of a model must say
        the same, so what has failed on one of them does not count."""
        order = by_savings(self.kernels, step)
        return order[0].saved_tokens(step) if order else 0

    def plan(self, step: Step, shape: AttentionShape, dtype: torch.dtype) -> Runner | None:
        """A runner of the first family that has one; None leaves the layer to SGLang."""
        plans = (
            self.plan_with(family, step, shape, dtype)
            for family in by_savings(self._able(step), step)
        )
        return next((runner for runner in plans if runner is not None), None)

    def plan_with(
        self, family: StepKernels, step: Step, shape: AttentionShape, dtype: torch.dtype
    ) -> Runner | None:
        """A runner of this family, if it has one."""
        try:
            return family.plan(step, shape, dtype)
        except Exception as error:
            # It compiles, allocates and plans, and raises what those raise. The step can be
            # computed without it.
            self._failed.add((family.name, step.is_mixed))
            logger.warning(
                "%s cannot plan %s steps of %s and is not asked for them any more: %s",
                family.name, "mixed" if step.is_mixed else "decode", shape, error,
            )  # fmt: skip
            return None

    def _able(self, step: Step) -> list[StepKernels]:
        return [k for k in self.kernels if (k.name, step.is_mixed) not in self._failed]
