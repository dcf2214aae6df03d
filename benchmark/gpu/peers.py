"""What stock SGLang runs for the same step: prefill and decode in kernels of their own.

    TRITON_INTERPRET=1 python benchmark/gpu/peers.py    # SGLang's Triton against the reference

Functions return a call that computes one layer, or None where the package is not installed.
"""

from __future__ import annotations

import importlib
import inspect
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from batches import SHAPE, Layer
from report import multiprocessors

from sgl_kernel_ext import reference
from sgl_kernel_ext.gpu.flashinfer_steps import level, mixed_levels, plan_bytes

Call = Callable[[], None]
KV_SPLITS = (4, 8, 16)  # SGLang's default is 8
_TRITON_HOMES = ("sglang.kernels.ops.attention", "sglang.srt.layers.attention.triton_ops")


def flashinfer_apart(layer: Layer, module: Any | None) -> Call | None:
    """FlashInfer's paged prefill, then its paged decode: what SGLang's backend launches."""
    if module is None:
        return None
    needed = max(plan_bytes(SHAPE, multiprocessors()), 128 * 2**20)
    workspaces = [torch.empty(needed, dtype=torch.uint8, device=layer.device) for _ in "pd"]
    prefill = module.BatchPrefillWithPagedKVCacheWrapper(workspaces[0], "NHD")
    # As SGLang decides for grouped heads.
    decode = module.BatchDecodeWithPagedKVCacheWrapper(
        workspaces[1], "NHD", use_tensor_cores=SHAPE.group >= 4
    )
    levels = mixed_levels(layer.batch, layer.table)
    assert levels is not None
    split, chunks, decodes = levels
    heads = (SHAPE.heads, SHAPE.kv_heads, SHAPE.head_dim, 1)
    types = {"q_data_type": torch.bfloat16, "kv_data_type": torch.bfloat16}
    if split:
        arrays = (chunks.query_indptr, chunks.kv_indptr, chunks.kv_indices, chunks.last_page_len)
        prefill.plan(*arrays, *heads, causal=True, sm_scale=SHAPE.scale, **types)
    if split < len(layer.query):
        arrays = (decodes.kv_indptr, decodes.kv_indices, decodes.last_page_len)
        decode.plan(*arrays, *heads, sm_scale=SHAPE.scale, **types)
    pool = (layer.key_pool[:, None], layer.value_pool[:, None])

    def call() -> None:
        if split:
            prefill.run(layer.query[:split], pool, out=layer.output[:split])
        if split < len(layer.query):
            decode.run(layer.query[split:], pool, out=layer.output[split:])

    return call


def flash_attention_3(layer: Layer) -> Call | None:
    """FlashAttention-3 as SGLang has it, its default on Hopper: the whole step in one launch."""
    try:
        with_kv_cache = importlib.import_module("sgl_kernel.flash_attn").flash_attn_with_kvcache
    except ImportError:
        return None
    batch, device = layer.batch, layer.device
    lens, starts = (
        torch.from_numpy(x.astype(np.int32)).to(device)
        for x in (batch.kv_lens, np.concatenate([[0], np.cumsum(batch.query_lens)]))
    )
    longest = int(batch.query_lens.max())
    pools = (layer.key_pool[:, None], layer.value_pool[:, None])
    table = layer.table.contiguous()

    def call() -> None:
        layer.output.copy_(
            with_kv_cache(
                layer.query, *pools, page_table=table, cache_seqlens=lens, cu_seqlens_q=starts,
                max_seqlen_q=longest, softmax_scale=SHAPE.scale, causal=True,
            )
        )  # fmt: skip

    return call


def sglang_triton(layer: Layer, splits: int = KV_SPLITS[1]) -> Call | None:
    """SGLang's Triton backend: extend attention over the chunks, then split-KV decode."""
    found = _triton_functions()
    if found is None:
        return None
    extend, decode = found
    batch, table = layer.batch, layer.table
    levels = mixed_levels(batch, table)
    assert levels is not None
    split, _, decodes = levels
    device = layer.device
    chunks = slice(0, int((batch.query_lens > 1).sum()))
    cached = batch.kv_lens[chunks] - batch.query_lens[chunks]
    none = np.zeros_like(cached)
    before = level(table, batch.table_rows[chunks], none, cached, batch.query_lens[chunks])
    new = level(
        table, batch.table_rows[chunks], cached, batch.kv_lens[chunks], batch.query_lens[chunks]
    )
    # A step writes its own keys and values; the kernel is handed those in its order.
    keys, values = layer.key_pool[new.kv_indices.long()], layer.value_pool[new.kv_indices.long()]
    count = len(layer.query) - split
    logits = torch.empty(count, SHAPE.heads, splits, SHAPE.head_dim, device=device)
    sums = torch.empty(count, SHAPE.heads, splits, device=device)
    split_counts = torch.full((count,), splits, dtype=torch.int32, device=device)
    indptrs = [
        p.to(device, non_blocking=True)
        for p in (before.query_indptr, before.kv_indptr, decodes.kv_indptr)
    ]
    scales = {"k_scale": 1.0, "v_scale": 1.0}
    extend_scales, decode_scales = (
        {k: v for k, v in scales.items() if k in inspect.signature(f).parameters} for f in found
    )

    def call() -> None:
        if split:
            extend(
                layer.query[:split], keys, values, layer.output[:split], layer.key_pool,
                layer.value_pool, indptrs[0], indptrs[1], before.kv_indices, None, True, None,
                int(batch.query_lens[chunks].max()), sm_scale=SHAPE.scale, **extend_scales,
            )  # fmt: skip
        if count:
            decode(
                layer.query[split:], layer.key_pool, layer.value_pool, layer.output[split:],
                indptrs[2], decodes.kv_indices, logits, sums, split_counts, splits,
                sm_scale=SHAPE.scale, **decode_scales,
            )  # fmt: skip

    return call


def _triton_functions() -> tuple[Any, Any] | None:
    for home in _TRITON_HOMES:
        try:
            return (
                importlib.import_module(f"{home}.extend_attention").extend_attention_fwd,
                importlib.import_module(f"{home}.decode_attention").decode_attention_fwd,
            )
        except ImportError:
            continue
    return None


def main() -> None:
    layer = Layer([(70, 40), (0, 9)], [200, 33, 128], device="cpu")
    for name in ("query", "key_pool", "value_pool", "output"):
        # The interpreter multiplies bfloat16 as integers.
        setattr(layer, name, getattr(layer, name).float())
    call = sglang_triton(layer)
    if call is None:
        raise SystemExit("SGLang's Triton kernels were not found")
    call()
    tensors = (layer.query, layer.key_pool, layer.value_pool, layer.table)
    expected = reference.attention(*tensors, layer.batch, SHAPE)
    error = reference.relative_error(layer.output, expected)
    print(f"SGLang's Triton kernels against float64: relative error {error:.1e}")
    if not error < 1e-5:
        raise SystemExit("too much: the arguments are not what these kernels take")


if __name__ == "__main__":
    main()
