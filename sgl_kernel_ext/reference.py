"""Paged attention in plain torch and float64: slow, obvious, and what every kernel must equal."""

from __future__ import annotations

import torch

from sgl_kernel_ext.batch import AttentionShape, PagedBatch


def attention(
    query: torch.Tensor,
    key_pool: torch.Tensor,
    value_pool: torch.Tensor,
    slot_table: torch.Tensor,
    batch: PagedBatch,
    shape: AttentionShape,
) -> torch.Tensor:
    """Causal attention of every query token over its request's KV.

    Args:
        query: [tokens, heads, head_dim], in the order of the batch.
        key_pool, value_pool: [slots, kv_heads, head_dim].
        slot_table: [rows, positions], integers: the KV slot of each position.

    Returns:
        [tokens, heads, head_dim], float64. The new tokens' own keys and values must be in the
        pools already, as they are in SGLang.
    """
    output = torch.empty(query.shape, dtype=torch.float64)
    start = 0
    for row, kv_len, query_len in zip(
        batch.table_rows.tolist(), batch.kv_lens.tolist(), batch.query_lens.tolist(), strict=True
    ):
        slots = slot_table[row, :kv_len].long().cpu()
        key = key_pool.cpu()[slots].double().repeat_interleave(shape.group, dim=1)
        value = value_pool.cpu()[slots].double().repeat_interleave(shape.group, dim=1)
        rows = query[start : start + query_len].cpu().double()
        scores = torch.einsum("qhd,khd->hqk", rows, key) * shape.scale
        if shape.soft_cap > 0:
            scores = shape.soft_cap * torch.tanh(scores / shape.soft_cap)
        position = torch.arange(kv_len - query_len, kv_len)[:, None]
        visible = torch.arange(kv_len)[None, :] <= position
        if shape.window >= 0:
            visible &= torch.arange(kv_len)[None, :] >= position - shape.window
        weights = scores.masked_fill(~visible, -torch.inf).softmax(dim=-1)
        output[start : start + query_len] = torch.einsum("hqk,khd->qhd", weights, value)
        start += query_len
    return output


def relative_error(actual: torch.Tensor, expected: torch.Tensor) -> float:
    """Relative Frobenius error; NaN or infinity anywhere in `actual` makes it so as well."""
    expected = expected.double()
    difference = actual.detach().cpu().double() - expected
    return float(difference.norm() / expected.norm())
