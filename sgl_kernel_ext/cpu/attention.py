"""Runs a plan: one call per layer, all requests of the step, every thread."""

from __future__ import annotations

import ctypes

import torch

from sgl_kernel_ext.batch import AttentionShape
from sgl_kernel_ext.cpu import library
from sgl_kernel_ext.plan import Plan, Tiling

DTYPES = (torch.float32, torch.bfloat16)
TILING = Tiling(
    query_tile=64, max_members=64, min_split_tokens=128, items_per_worker=3, shared_read_cost=0.12
)


def run(
    plan: Plan,
    shape: AttentionShape,
    query: torch.Tensor,
    key_pool: torch.Tensor,
    value_pool: torch.Tensor,
    slot_table: torch.Tensor,
    output: torch.Tensor,
    threads: int | None = None,
) -> None:
    """Write the attention of all query tokens into `output`.

    Args:
        plan: of this step, made for a shape with the same KV heads and window.
        query: [tokens, heads, head_dim]; rows may be apart (a slice of a fused projection).
        key_pool, value_pool: [slots, kv_heads, head_dim], contiguous.
        slot_table: [rows, positions], int32, contiguous.
        output: [tokens, heads, head_dim], contiguous.
        threads: default torch's own number.

    Raises:
        ValueError: a tensor is not of the described form.
        OSError: the kernels were not built (``library.unavailable_reason`` says why).
    """
    _check(plan, shape, query, key_pool, value_pool, slot_table, output)
    arguments = library.AttentionArguments(
        query=query.data_ptr(),
        key_pool=key_pool.data_ptr(),
        value_pool=value_pool.data_ptr(),
        output=output.data_ptr(),
        slots=slot_table.data_ptr(),
        items=plan.items.ctypes.data,
        beside=plan.beside.ctypes.data,
        rows=plan.rows.ctypes.data,
        merged_query=plan.merged_query.ctypes.data,
        merge_begin=plan.merge_begin.ctypes.data,
        item_count=len(plan.items),
        compute_bound=len(plan.beside),
        merge_count=len(plan.merged_query),
        partial_count=plan.partial_count,
        heads=shape.heads,
        kv_heads=shape.kv_heads,
        head_dim=shape.head_dim,
        query_stride=query.stride(0),
        slot_stride=slot_table.stride(0),
        window=shape.window,
        bfloat16=int(query.dtype == torch.bfloat16),
        scale=shape.scale,
        soft_cap=shape.soft_cap,
    )
    library.load().blend_attention(ctypes.byref(arguments), threads or torch.get_num_threads())


def _check(
    plan: Plan,
    shape: AttentionShape,
    query: torch.Tensor,
    key_pool: torch.Tensor,
    value_pool: torch.Tensor,
    slot_table: torch.Tensor,
    output: torch.Tensor,
) -> None:
    heads, kv_heads = (shape.heads, shape.head_dim), (shape.kv_heads, shape.head_dim)
    if query.dtype not in DTYPES or not (
        query.dtype == key_pool.dtype == value_pool.dtype == output.dtype
    ):
        raise ValueError(
            f"query, pools and output must all be float32 or all bfloat16, not {query.dtype}, "
            f"{key_pool.dtype}, {value_pool.dtype}, {output.dtype}"
        )
    if query.shape[1:] != heads or output.shape != query.shape:
        raise ValueError(
            f"query and output must be [tokens, {heads[0]}, {heads[1]}], not "
            f"{tuple(query.shape)} and {tuple(output.shape)}"
        )
    if key_pool.shape[1:] != kv_heads or value_pool.shape != key_pool.shape:
        raise ValueError(
            f"the KV pools must be [slots, {kv_heads[0]}, {kv_heads[1]}], not "
            f"{tuple(key_pool.shape)} and {tuple(value_pool.shape)}"
        )
    if query.stride()[1:] != (shape.head_dim, 1):
        raise ValueError("the heads of a query token must be contiguous")
    if slot_table.dtype != torch.int32:
        raise ValueError(f"the slot table must be int32, not {slot_table.dtype}")
    for name, tensor in (("key pool", key_pool), ("value pool", value_pool), ("output", output)):
        if not tensor.is_contiguous():
            raise ValueError(f"the {name} must be contiguous")
    if plan.window != shape.window:
        raise ValueError(f"the plan is for window {plan.window}, the layer has {shape.window}")
