"""Triton kernels over work items: prefill tiles, split-KV decodes, shared prefixes, all together.

An item's rows are packed: the query heads of one KV head, for each of its query tokens, so that a
key that has been read serves all of them. An item has few rows (a decode) or many (a prefill tile,
or a shared prefix under many decodes), which are two tile shapes of one function. ``blended``
launches both shapes together: where they alternate on a multiprocessor, the memory-bound tiles use
the bandwidth that the compute-bound ones leave idle.
"""

from __future__ import annotations

import os
from typing import Any

import triton
import triton.language as tl
from triton import knobs

INTERPRETED = bool(knobs.runtime.interpret)
TUNES = os.environ.get("SGL_KERNEL_EXT_TUNE", "1") != "0"
LOG2_E = tl.constexpr(1.4426950408889634)
FEW_ROWS = 16  # the smallest tile that tensor cores take
# Column of the item array that says which tile shape an item needs.
KIND_NOTHING, KIND_FEW, KIND_MANY = 0, 1, 2


KINDS = ("decode_only", "prefill_only", "blended")
# (few tile, many tile, warps, stages) by kind, for heads of up to 128 elements and for wider ones.
# Each takes seconds to compile, so there are few. All fit Ampere, Hopper and Blackwell and spill
# less than 1 KB; the stages are those from which on Triton keeps a second tile of keys and values,
# whose addresses it must load first (test/kernels/candidate_resources.py).
_CANDIDATES = {
    ("decode_only", False): [(64, 64, 4, 5), (32, 64, 2, 5), (32, 64, 4, 8), (64, 64, 4, 8)],
    ("prefill_only", False): [(64, 64, 8, 2), (64, 64, 8, 5), (64, 128, 8, 2)],
    ("blended", False): [(64, 64, 8, 2), (64, 64, 8, 5), (64, 128, 8, 2)],
    ("decode_only", True): [(32, 32, 4, 5), (32, 32, 8, 5), (64, 32, 8, 5)],
    ("prefill_only", True): [(32, 32, 8, 2), (32, 64, 8, 2)],
    ("blended", True): [(32, 32, 8, 2), (32, 64, 8, 2)],
}


def candidates(kind: str, head_dim: int) -> list[Any]:
    """The settings that are tried for a kernel, the first one where nothing can be timed."""
    return [
        triton.Config({"FEW_TILE": few, "MANY_TILE": many}, num_warps=warps, num_stages=stages)
        for few, many, warps, stages in _CANDIDATES[kind, head_dim > 128]
    ]


def _tuned(kind: str) -> Any:
    """`_items` under the candidates of its kind. The choice is kept on disk; the interpreter cannot
    time, and takes the first; so does a run that is told to (`SGL_KERNEL_EXT_TUNE=0`)."""

    def usable(configs: list[Any], named: dict[str, Any], **constants: Any) -> list[Any]:
        found = candidates(kind, {**named, **constants}["HEAD_DIM"])
        return found if TUNES else found[:1]

    every = [config for dim in (128, 256) for config in candidates(kind, dim)]
    return triton.autotune(
        every[:1] if INTERPRETED else every,
        ["HEADS", "KV_HEADS", "HEAD_DIM", "MANY_ROWS"],
        prune_configs_by=None if INTERPRETED else {"early_config_prune": usable},
        cache_results=True,
    )(_items)


@triton.jit
def _dot(a, b, UPCAST: tl.constexpr):  # type: ignore[no-untyped-def]
    # The interpreter holds bfloat16 as integers, which its dot multiplies as such. The product of
    # two such numbers is exact in float32, so widening them first changes nothing.
    if UPCAST:
        a = a.to(tl.float32)
        b = b.to(tl.float32)
    return tl.dot(a, b, input_precision="ieee")


@triton.jit
def _tanh(x):  # type: ignore[no-untyped-def]
    # 1 - 2 / (e^2x + 1), from the side where the exponential cannot overflow.
    e = tl.exp(-2.0 * tl.abs(x))
    t = (1.0 - e) / (1.0 + e)
    return tl.where(x < 0, -t, t)


@triton.jit
def _attend(  # type: ignore[no-untyped-def]
    item,
    rows,
    query,
    key_pool,
    value_pool,
    slots,
    output,
    partials,
    partial_stats,
    query_stride,
    slot_stride,
    scale,
    soft_cap,
    window,
    HEADS: tl.constexpr,
    KV_HEADS: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    WIDTH: tl.constexpr,
    UPCAST: tl.constexpr,
    ROWS: tl.constexpr,
    TILE: tl.constexpr,
):
    """One item: [ROWS] packed query rows over its KV positions, TILE at a time."""
    table_row = tl.load(item)
    begin = tl.load(item + 1)
    end = tl.load(item + 2)
    kv_head = tl.load(item + 3)
    first_row = tl.load(item + 4)
    end_row = tl.load(item + 5)
    group: tl.constexpr = HEADS // KV_HEADS

    packed = tl.arange(0, ROWS)
    member = first_row + packed // group
    live = member < end_row
    head = kv_head * group + packed % group
    token = tl.load(rows + member * 3, mask=live, other=0).to(tl.int64)
    visible = tl.load(rows + member * 3 + 1, mask=live, other=0)
    place = tl.load(rows + member * 3 + 2, mask=live, other=-1).to(tl.int64)
    dims = tl.arange(0, WIDTH)
    in_head = dims < HEAD_DIM

    q_at = token[:, None] * query_stride + head[:, None] * HEAD_DIM + dims[None, :]
    q = tl.load(query + q_at, mask=live[:, None] & in_head[None, :], other=0.0)
    maximum = tl.full([ROWS], -1e30, tl.float32)
    total = tl.zeros([ROWS], tl.float32)
    gathered = tl.zeros([ROWS, WIDTH], tl.float32)
    for start in range(begin, end, TILE):
        position = start + tl.arange(0, TILE)
        there = position < end
        slot = tl.load(
            slots + table_row.to(tl.int64) * slot_stride + position, mask=there, other=0
        ).to(tl.int64)
        kv_at = (slot * KV_HEADS + kv_head) * HEAD_DIM
        k = tl.load(
            key_pool + kv_at[None, :] + dims[:, None],
            mask=there[None, :] & in_head[:, None],
            other=0.0,
        )
        # Powers of two, which is what the hardware computes.
        scores = _dot(q, k, UPCAST) * (scale * LOG2_E)
        if soft_cap > 0:
            scores = (soft_cap * LOG2_E) * _tanh(scores / (soft_cap * LOG2_E))
        seen = there[None, :] & (position[None, :] < visible[:, None])
        if window >= 0:
            seen = seen & (position[None, :] >= visible[:, None] - 1 - window)
        scores = tl.where(seen, scores, float("-inf"))
        top = tl.maximum(maximum, tl.max(scores, 1))
        shrink = tl.exp2(maximum - top)
        weights = tl.exp2(scores - top[:, None])
        total = total * shrink + tl.sum(weights, 1)
        maximum = top
        v = tl.load(
            value_pool + kv_at[:, None] + dims[None, :],
            mask=there[:, None] & in_head[None, :],
            other=0.0,
        )
        gathered = gathered * shrink[:, None] + _dot(weights.to(v.dtype), v, UPCAST)

    total = tl.where(live, total, 1.0)
    whole = live & (place < 0)
    part = live & (place >= 0)
    out_at = (token[:, None] * HEADS + head[:, None]) * HEAD_DIM + dims[None, :]
    tl.store(
        output + out_at,
        (gathered / total[:, None]).to(output.dtype.element_ty),
        mask=whole[:, None] & in_head[None, :],
    )
    at = place * HEADS + head
    tl.store(
        partials + at[:, None] * HEAD_DIM + dims[None, :],
        gathered,
        mask=part[:, None] & in_head[None, :],
    )
    tl.store(partial_stats + at * 2, maximum, mask=part)
    tl.store(partial_stats + at * 2 + 1, total, mask=part)


@triton.jit
def _items(  # type: ignore[no-untyped-def]
    items,
    rows,
    query,
    key_pool,
    value_pool,
    slots,
    output,
    partials,
    partial_stats,
    query_stride,
    slot_stride,
    scale,
    soft_cap,
    window,
    HEADS: tl.constexpr,
    KV_HEADS: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    WIDTH: tl.constexpr,
    UPCAST: tl.constexpr,
    HAS_FEW: tl.constexpr,
    HAS_MANY: tl.constexpr,
    MANY_ROWS: tl.constexpr,
    FEW_TILE: tl.constexpr,
    MANY_TILE: tl.constexpr,
):
    """One program per item. A launch with one kind of item compiles for that kind alone."""
    item = items + tl.program_id(0) * 7
    kind = tl.load(item + 6)
    if HAS_FEW:  # noqa: SIM102 - decided when compiling, the other when running
        if kind == 1:
            _attend(
                item, rows, query, key_pool, value_pool, slots, output, partials, partial_stats,
                query_stride, slot_stride, scale, soft_cap, window,
                HEADS, KV_HEADS, HEAD_DIM, WIDTH, UPCAST, 16, FEW_TILE,
            )  # fmt: skip
    if HAS_MANY:  # noqa: SIM102 - decided when compiling, the other when running
        if kind == 2:
            _attend(
                item, rows, query, key_pool, value_pool, slots, output, partials, partial_stats,
                query_stride, slot_stride, scale, soft_cap, window,
                HEADS, KV_HEADS, HEAD_DIM, WIDTH, UPCAST, MANY_ROWS, MANY_TILE,
            )  # fmt: skip


decode_only, prefill_only, blended = map(_tuned, KINDS)


@triton.jit
def merge(  # type: ignore[no-untyped-def]
    merged_query,
    merge_begin,
    partials,
    partial_stats,
    output,
    HEADS: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    WIDTH: tl.constexpr,
):
    """Join the partial results of one query token and head by the log-sum-exp rule, base 2."""
    number = tl.program_id(0)
    head = tl.program_id(1)
    begin = tl.load(merge_begin + number)
    end = tl.load(merge_begin + number + 1)
    dims = tl.arange(0, WIDTH)
    in_head = dims < HEAD_DIM
    maximum = -1e30
    total = 0.0
    gathered = tl.zeros([WIDTH], tl.float32)
    at = begin.to(tl.int64) * HEADS + head
    for _ in range(begin, end):
        part_maximum = tl.load(partial_stats + at * 2)
        top = tl.maximum(maximum, part_maximum)
        old, new = tl.exp2(maximum - top), tl.exp2(part_maximum - top)
        values = tl.load(partials + at * HEAD_DIM + dims, mask=in_head, other=0.0)
        gathered = gathered * old + values * new
        total = total * old + tl.load(partial_stats + at * 2 + 1) * new
        maximum = top
        at += HEADS
    if end > begin:
        token = tl.load(merged_query + number).to(tl.int64)
        tl.store(
            output + (token * HEADS + head) * HEAD_DIM + dims,
            (gathered / total).to(output.dtype.element_ty),
            mask=in_head,
        )
