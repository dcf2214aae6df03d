"""Puts a plan on the device and runs it: plan once per step, run once per layer."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
import triton
from numpy.typing import NDArray

from sgl_kernel_ext.batch import AttentionShape
from sgl_kernel_ext.gpu import kernels
from sgl_kernel_ext.gpu.upload import upload
from sgl_kernel_ext.plan import Plan, Tiling

DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def many_rows(shape: AttentionShape) -> int:
    """Packed rows of the large tile: what shared memory holds beside a tile of keys and values."""
    return 64 if shape.head_dim > 128 else 128


def tiling(shape: AttentionShape) -> Tiling:
    """How a plan for these kernels is cut: items that fill a tile with packed rows.

    Raises:
        ValueError: one query token already has more packed rows than the large tile.
    """
    members = many_rows(shape) // shape.group
    if members == 0:
        raise ValueError(
            f"{shape.group} query heads per KV head exceed the {many_rows(shape)} rows of a tile"
        )
    return Tiling(
        query_tile=members,
        max_members=members,
        min_split_tokens=256,
        items_per_worker=2,
        shared_read_cost=0.02,
    )


@dataclass
class DevicePlan:
    """A plan's arrays on the device, int32, with room to spare when a CUDA graph needs it."""

    items: torch.Tensor  # [capacity, 7]: the plan's six columns, one KV head each, and the kind
    rows: torch.Tensor  # [capacity, 3]
    merged_query: torch.Tensor  # [capacity]
    merge_begin: torch.Tensor  # [capacity + 1]
    partials: torch.Tensor  # [capacity, heads, head_dim], float32
    partial_stats: torch.Tensor  # [capacity, heads, 2], float32: maximum, sum
    kinds: frozenset[int]
    window: int


def expand(plan: Plan, shape: AttentionShape) -> NDArray[np.int32]:
    """The plan's items with one KV head each and their kind, both kinds evenly interleaved.

    A GPU hands out programs in order, so the order decides which tiles share a multiprocessor.
    """
    whole = plan.items[:, 3] < 0
    items = np.repeat(plan.items, np.where(whole, shape.kv_heads, 1), axis=0)
    heads = items[:, 3]
    heads[heads < 0] = np.tile(np.arange(shape.kv_heads), int(whole.sum()))
    packed = (items[:, 5] - items[:, 4]) * shape.group
    kind = np.where(packed <= kernels.FEW_ROWS, kernels.KIND_FEW, kernels.KIND_MANY)
    # Each kind is spread evenly over the whole launch and keeps its own order, costliest first.
    place = np.empty(len(items))
    for one in (kernels.KIND_FEW, kernels.KIND_MANY):
        of_kind = kind == one
        count = int(of_kind.sum())
        place[of_kind] = (np.arange(count) + 0.5) / max(count, 1)
    order = np.argsort(place, kind="stable")
    return np.concatenate([items, kind[:, None]], axis=1)[order].astype(np.int32)


def to_device(plan: Plan, shape: AttentionShape, device: torch.device | str) -> DevicePlan:
    """Upload a plan into arrays of its own size, without waiting for the device."""
    items = expand(plan, shape)
    arrays = (items, plan.rows, plan.merged_query, plan.merge_begin)
    on_device = upload(arrays, torch.device(device))
    return DevicePlan(
        items=on_device[0],
        rows=on_device[1],
        merged_query=on_device[2],
        merge_begin=on_device[3],
        partials=torch.empty(plan.partial_count, shape.heads, shape.head_dim, device=device),
        partial_stats=torch.empty(plan.partial_count, shape.heads, 2, device=device),
        kinds=frozenset(np.unique(items[:, 6]).tolist()),
        window=plan.window,
    )


def run(
    plan: DevicePlan,
    shape: AttentionShape,
    query: torch.Tensor,
    key_pool: torch.Tensor,
    value_pool: torch.Tensor,
    slot_table: torch.Tensor,
    output: torch.Tensor,
) -> None:
    """Write the attention of all query tokens into `output`; arguments as for the CPU kernels.

    Raises:
        ValueError: element types that the kernels do not take, or a plan for another window.
    """
    if query.dtype not in DTYPES or not (query.dtype == key_pool.dtype == value_pool.dtype):
        raise ValueError(
            f"query and pools must have one type of {DTYPES}, not {query.dtype}, "
            f"{key_pool.dtype}, {value_pool.dtype}"
        )
    if plan.window != shape.window:
        raise ValueError(f"the plan is for window {plan.window}, the layer has {shape.window}")
    if not len(plan.items):
        return  # No request has a query token, and a launch needs a program.
    kinds = plan.kinds - {kernels.KIND_NOTHING}
    kernel = {
        frozenset({kernels.KIND_FEW}): kernels.decode_only,
        frozenset({kernels.KIND_MANY}): kernels.prefill_only,
    }.get(kinds, kernels.blended)
    width = max(triton.next_power_of_2(shape.head_dim), 16)
    kernel[(len(plan.items),)](
        plan.items,
        plan.rows,
        query,
        key_pool,
        value_pool,
        slot_table,
        output,
        plan.partials,
        plan.partial_stats,
        query.stride(0),
        slot_table.stride(0),
        shape.scale,
        shape.soft_cap,
        shape.window,
        HEADS=shape.heads,
        KV_HEADS=shape.kv_heads,
        HEAD_DIM=shape.head_dim,
        WIDTH=width,
        UPCAST=kernels.INTERPRETED,
        HAS_FEW=kernels.KIND_FEW in kinds,
        HAS_MANY=kernels.KIND_MANY in kinds,
        MANY_ROWS=many_rows(shape),
    )
    if len(plan.merged_query):
        kernels.merge[(len(plan.merged_query), shape.heads)](
            plan.merged_query,
            plan.merge_begin,
            plan.partials,
            plan.partial_stats,
            output,
            HEADS=shape.heads,
            HEAD_DIM=shape.head_dim,
            WIDTH=width,
        )
