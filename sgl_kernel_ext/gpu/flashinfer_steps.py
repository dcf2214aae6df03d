"""Steps by FlashInfer: POD attention for mixed ones, its cascade for shared prefixes.

FlashInfer takes CSR arrays of KV pages; here a page is a slot, which any page size of SGLang's pool
can be read as. What is computed for its plan calls is plain numpy and torch, tested on a CPU.
"""

from __future__ import annotations

import logging
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from sgl_kernel_ext.batch import AttentionShape, PagedBatch
from sgl_kernel_ext.gpu.steps import Runner, Step
from sgl_kernel_ext.gpu.upload import host_tensor, upload
from sgl_kernel_ext.groups import IntArray, Segment

logger = logging.getLogger(__name__)

DTYPES = (torch.bfloat16, torch.float16)
HEAD_DIMS = (64, 128, 256)
# CTAs per multiprocessor that FlashInfer's planner cuts KV for, and the query rows of its tiles.
_CTAS, _TILE_ROWS, _WIDE_TILE_ROWS = 2, 128, 64


def plan_bytes(shape: AttentionShape, multiprocessors: int) -> int:
    """The most float workspace that one plan of FlashInfer's paged prefill asks for.

    It cuts the KV only where that makes at most `_CTAS` tiles per multiprocessor, over all KV
    heads; each tile then holds float32 partial outputs and their log sums for the query heads
    (`PrefillPlanImpl` in its scheduler.cuh, 0.6 and 0.7).
    """
    tiles = _CTAS * multiprocessors // shape.kv_heads
    rows = _TILE_ROWS if shape.head_dim < 256 else _WIDE_TILE_ROWS
    # Both arrays are aligned to 16 bytes.
    return shape.heads * tiles * rows * (shape.head_dim + 1) * 4 + 32


@dataclass(frozen=True)
class Level:
    """One stretch of KV for each group of neighbouring query rows, in FlashInfer's CSR form.

    What FlashInfer reads on the host to plan stays there: on the device it would be copied back,
    and the host would wait.
    """

    query_indptr: torch.Tensor  # [groups + 1], int32, on the host
    kv_indptr: torch.Tensor  # [groups + 1], int32, on the host
    kv_indices: torch.Tensor  # [kv_indptr[-1]], int32, on the device: slots
    last_page_len: torch.Tensor  # [groups], int32, on the host: 1, for pages of one slot


def level(
    slot_table: torch.Tensor,
    table_rows: IntArray,
    begins: IntArray,
    ends: IntArray,
    queries: IntArray,
) -> Level:
    """The level in which group i has `queries[i]` rows and KV positions [begins[i], ends[i])."""
    device = slot_table.device
    lens = ends - begins
    total = int(lens.sum())
    rows, shifts, repeats = upload([table_rows, begins - (np.cumsum(lens) - lens), lens], device)
    # The size is told, or PyTorch would ask the device for it.
    group = torch.repeat_interleave(repeats, output_size=total)
    positions = torch.arange(total, dtype=torch.int32, device=device) + shifts[group]

    def indptr(counts: IntArray) -> torch.Tensor:
        return host_tensor(np.concatenate([[0], np.cumsum(counts)]), device)

    return Level(
        query_indptr=indptr(queries),
        kv_indptr=indptr(lens),
        kv_indices=slot_table[rows[group], positions].to(torch.int32),
        last_page_len=host_tensor(np.ones(len(lens)), device),
    )


def cascade_groups(step: Step) -> list[Segment]:
    """Prefixes from position 0, each read once for its members, that save the most reads.

    A cascade of two levels has one prefix per request, where prefixes may lie within each other:
    a node is taken whole, or the best of what is below it.
    """
    shared = [s for s in step.segments if len(s.members) > 1]
    by_member_and_begin: dict[tuple[int, int], list[int]] = {}
    for number, segment in enumerate(shared):
        for member in segment.members.tolist():
            by_member_and_begin.setdefault((member, segment.begin), []).append(number)
    below = [
        sorted({n for m in s.members.tolist() for n in by_member_and_begin.get((m, s.end), ())})
        for s in shared
    ]
    saved = [0] * len(shared)
    for number in reversed(range(len(shared))):  # Parents stand first.
        segment = shared[number]
        whole = (len(segment.members) - 1) * segment.end
        saved[number] = max(whole, sum(saved[child] for child in below[number]))
    groups = []
    stack = [n for n, s in enumerate(shared) if s.begin == 0]
    while stack:
        number = stack.pop()
        segment = shared[number]
        if saved[number] > (len(segment.members) - 1) * segment.end:
            stack.extend(below[number])
        else:
            groups.append(Segment(0, segment.end, segment.members))
    return groups


def cascade_levels(step: Step, groups: list[Segment]) -> tuple[IntArray, Level, Level] | None:
    """Two levels for decodes under shared prefixes, and the order of the query rows in them.

    The first level holds each group's shared stretch from position 0, or, for a request without a
    group, all but its last position; the second holds the rest. None if a request has one position.
    """
    batch, decodes = step.batch, step.decodes
    if (batch.kv_lens[decodes] < 2).any():
        return None
    grouped = set(np.concatenate([s.members for s in groups]).tolist()) if groups else set()
    alone = [d for d in decodes.tolist() if d not in grouped]
    first = groups + [Segment(0, int(batch.kv_lens[d]) - 1, np.array([d])) for d in alone]
    # A member that ends with its group's prefix would have no rest.
    ends = np.array([min(s.end, int(batch.kv_lens[s.members].min()) - 1) for s in first])
    members = np.concatenate([s.members for s in first])
    sizes = np.array([len(s.members) for s in first])
    leaders = batch.table_rows[[int(s.members[0]) for s in first]]
    shared = level(step.slot_table, leaders, np.zeros_like(ends), ends, sizes)
    private = level(
        step.slot_table,
        batch.table_rows[members],
        np.repeat(ends, sizes),
        batch.kv_lens[members],
        np.ones_like(members),
    )
    return members, shared, private


def mixed_levels(batch: PagedBatch, slot_table: torch.Tensor) -> tuple[int, Level, Level] | None:
    """Prefill tokens of a mixed step, and its two kinds of requests as POD attention takes them.

    None unless all prefill chunks stand before all decodes.
    """
    decode = batch.query_lens == 1
    chunks = int((~decode).sum())
    if decode[:chunks].any():
        return None
    both = [
        level(slot_table, batch.table_rows[p], np.zeros_like(batch.kv_lens[p]), batch.kv_lens[p],
              batch.query_lens[p])
        for p in (slice(0, chunks), slice(chunks, None))
    ]  # fmt: skip
    return int(batch.query_lens[:chunks].sum()), both[0], both[1]


class FlashInferSteps:
    """Full attention in half precision; POD attention has no soft cap.

    A wrapper holds one plan, so each shape of a model's layers has its own; what they write on the
    way lies in one workspace, because layers run one after the other.
    """

    name = "flashinfer"

    def __init__(
        self, flashinfer: Any, device: torch.device | str, multiprocessors: int = 1
    ) -> None:
        self.device = torch.device(device)
        self._flashinfer, self._multiprocessors = flashinfer, multiprocessors
        self._workspace = torch.empty(0, dtype=torch.uint8, device=self.device)
        self._pods: dict[AttentionShape, Any] = {}
        self._cascades: dict[AttentionShape, Any] = {}
        self._groups: tuple[Step | None, list[Segment]] = (None, [])

    def saved_tokens(self, step: Step) -> int:
        """Positions of KV that its kernels need not read: POD reads all, the cascade one level."""
        if step.is_mixed:
            return 0
        return sum((len(s.members) - 1) * s.end for s in self._groups_of(step))

    def _groups_of(self, step: Step) -> list[Segment]:
        if self._groups[0] is not step:
            self._groups = (step, cascade_groups(step))
        return self._groups[1]

    def plan(self, step: Step, shape: AttentionShape, dtype: torch.dtype) -> Runner | None:
        if dtype not in DTYPES or shape.head_dim not in HEAD_DIMS or shape.window >= 0:
            return None
        if step.is_mixed:
            return self._plan_mixed(step, shape, dtype) if shape.soft_cap == 0 else None
        return self._plan_cascade(step, shape, dtype)

    def workspace(self, shape: AttentionShape) -> torch.Tensor:
        """Room for both plans of POD attention, which gives each a half, or for a cascade."""
        needed = 2 * plan_bytes(shape, self._multiprocessors)
        if len(self._workspace) < needed:
            self._workspace = torch.empty(needed, dtype=torch.uint8, device=self.device)
        return self._workspace

    def _plan_mixed(self, step: Step, shape: AttentionShape, dtype: torch.dtype) -> Runner | None:
        levels = mixed_levels(step.batch, step.slot_table)
        if levels is None:
            return None
        if shape not in self._pods:
            self._pods[shape] = self._flashinfer.BatchPODWithPagedKVCacheWrapper(
                self.workspace(shape), "NHD"
            )
        pod = self._pods[shape]
        split, prefill, decode = levels
        pod.plan(
            prefill.query_indptr,
            prefill.kv_indptr,
            prefill.kv_indices,
            prefill.last_page_len,
            decode.query_indptr,
            decode.kv_indptr,
            decode.kv_indices,
            decode.last_page_len,
            num_qo_heads=shape.heads,
            num_kv_heads=shape.kv_heads,
            head_dim=shape.head_dim,
            page_size=1,
            q_data_type=dtype,
            kv_data_type=dtype,
            sm_scale=shape.scale,
        )

        def run_layer(
            query: torch.Tensor,
            key_pool: torch.Tensor,
            value_pool: torch.Tensor,
            output: torch.Tensor,
        ) -> None:
            pool = (key_pool[:, None], value_pool[:, None])  # [slots, page of 1, kv_heads, dim]
            query = query.contiguous()
            output[:split], output[split:] = pod.run(
                query[:split], pool, query[split:], pool, causal_p=True
            )

        return run_layer

    def _plan_cascade(self, step: Step, shape: AttentionShape, dtype: torch.dtype) -> Runner | None:
        levels = cascade_levels(step, self._groups_of(step))
        if levels is None:
            return None
        if shape not in self._cascades:
            self._cascades[shape] = self._flashinfer.MultiLevelCascadeAttentionWrapper(
                2, self.workspace(shape), "NHD"
            )
        cascade = self._cascades[shape]
        members, shared, private = levels
        cascade.plan(
            [shared.query_indptr, private.query_indptr],
            [shared.kv_indptr, private.kv_indptr],
            [shared.kv_indices, private.kv_indices],
            [shared.last_page_len, private.last_page_len],
            shape.heads,
            shape.kv_heads,
            shape.head_dim,
            1,
            causal=False,
            sm_scale=shape.scale,
            logits_soft_cap=shape.soft_cap or None,
            q_data_type=dtype,
            kv_data_type=dtype,
        )
        (order,) = upload([step.batch.query_starts[members]], self.device)

        def run_layer(
            query: torch.Tensor,
            key_pool: torch.Tensor,
            value_pool: torch.Tensor,
            output: torch.Tensor,
        ) -> None:
            pool = (key_pool[:, None], value_pool[:, None])
            output[order] = cascade.run(query[order], pool)

        return run_layer
