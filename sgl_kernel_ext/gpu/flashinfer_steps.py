"""Steps by FlashInfer: POD attention for mixed ones, its cascade for shared prefixes.

FlashInfer takes CSR arrays of KV pages; here a page is a slot, which any page size of SGLang's pool
can be read as. What is computed for its plan calls is plain numpy and torch, tested on a CPU.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from sgl_kernel_ext.batch import AttentionShape, PagedBatch
from sgl_kernel_ext.gpu.steps import Runner, Step
from sgl_kernel_ext.groups import IntArray, Segment

WORKSPACE_BYTES = 128 * 2**20
DTYPES = (torch.bfloat16, torch.float16)
HEAD_DIMS = (64, 128, 256)


@dataclass(frozen=True)
class Level:
    """One stretch of KV for each group of neighbouring query rows, in FlashInfer's CSR form."""

    query_indptr: torch.Tensor  # [groups + 1], int32
    kv_indptr: torch.Tensor  # [groups + 1], int32
    kv_indices: torch.Tensor  # [kv_indptr[-1]], int32: slots
    last_page_len: torch.Tensor  # [groups], int32: 1, for pages of one slot


def level(
    slot_table: torch.Tensor,
    table_rows: IntArray,
    begins: IntArray,
    ends: IntArray,
    queries: IntArray,
) -> Level:
    """The level in which group i has `queries[i]` rows and KV positions [begins[i], ends[i])."""
    lens = ends - begins
    starts = np.cumsum(lens) - lens
    rows = torch.from_numpy(np.repeat(table_rows, lens)).to(slot_table.device)
    positions = np.arange(int(lens.sum())) + np.repeat(begins - starts, lens)
    columns = torch.from_numpy(positions).to(slot_table.device)

    def indptr(counts: IntArray) -> torch.Tensor:
        return torch.from_numpy(np.concatenate([[0], np.cumsum(counts)]).astype(np.int32))

    return Level(
        query_indptr=indptr(queries),
        kv_indptr=indptr(lens),
        kv_indices=slot_table[rows, columns].to(torch.int32),
        last_page_len=torch.ones(len(lens), dtype=torch.int32),
    )


def cascade_levels(step: Step) -> tuple[IntArray, Level, Level] | None:
    """Two levels for decodes under shared prefixes, and the order of the query rows in them.

    The first level holds each group's shared stretch from position 0, or, for a request without a
    group, all but its last position; the second holds the rest. None if a request has one position.
    """
    batch, decodes = step.batch, step.decodes
    if (batch.kv_lens[decodes] < 2).any():
        return None
    groups = [s for s in step.segments if s.begin == 0 and len(s.members) > 1]
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
    """Full attention in half precision; POD attention has no soft cap."""

    name = "flashinfer"

    def __init__(self, flashinfer: Any, device: torch.device | str) -> None:
        self.device = torch.device(device)
        self.workspace = torch.empty(WORKSPACE_BYTES, dtype=torch.uint8, device=self.device)
        self.pod = flashinfer.BatchPODWithPagedKVCacheWrapper(self.workspace, "NHD")
        self.cascade = flashinfer.MultiLevelCascadeAttentionWrapper(2, self.workspace, "NHD")

    def plan(self, step: Step, shape: AttentionShape, dtype: torch.dtype) -> Runner | None:
        if dtype not in DTYPES or shape.head_dim not in HEAD_DIMS or shape.window >= 0:
            return None
        if step.is_mixed:
            return self._plan_mixed(step, shape, dtype) if shape.soft_cap == 0 else None
        return self._plan_cascade(step, shape, dtype)

    def _plan_mixed(self, step: Step, shape: AttentionShape, dtype: torch.dtype) -> Runner | None:
        levels = mixed_levels(step.batch, step.slot_table)
        if levels is None:
            return None
        split, prefill, decode = levels
        self.pod.plan(
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
            output[:split], output[split:] = self.pod.run(
                query[:split], pool, query[split:], pool, causal_p=True
            )

        return run_layer

    def _plan_cascade(self, step: Step, shape: AttentionShape, dtype: torch.dtype) -> Runner | None:
        levels = cascade_levels(step)
        if levels is None:
            return None
        members, shared, private = levels
        self.cascade.plan(
            [shared.query_indptr.to(self.device), private.query_indptr.to(self.device)],
            [shared.kv_indptr.to(self.device), private.kv_indptr.to(self.device)],
            [shared.kv_indices, private.kv_indices],
            [shared.last_page_len.to(self.device), private.last_page_len.to(self.device)],
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
        order = torch.from_numpy(step.batch.query_starts[members]).to(self.device)

        def run_layer(
            query: torch.Tensor,
            key_pool: torch.Tensor,
            value_pool: torch.Tensor,
            output: torch.Tensor,
        ) -> None:
            pool = (key_pool[:, None], value_pool[:, None])
            output[order] = self.cascade.run(query[order], pool)

        return run_layer
