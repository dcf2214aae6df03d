"""The CPU backend: one kernel call per layer for the whole batch, shared prefixes read once.

SGLang's own CPU backend loops over the requests in Python, and gathers each one's KV before it
computes. This one plans a step once and leaves the rest to ``sgl_kernel_ext.cpu``. What those
kernels do not cover goes SGLang's way, layer by layer.
"""

from __future__ import annotations

import logging
from typing import Any

import numpy as np
import torch
from sglang.srt.layers.attention.torch_native_backend import TorchNativeAttnBackend
from sglang.srt.layers.radix_attention import AttentionType
from sglang.srt.mem_cache.memory_pool import MHATokenToKVPool

from sgl_kernel_ext import cpu
from sgl_kernel_ext.batch import AttentionShape, PagedBatch
from sgl_kernel_ext.cpu import rows
from sgl_kernel_ext.plan import Plan, make_plan

logger = logging.getLogger(__name__)

_CACHED_KINDS = (AttentionType.DECODER, AttentionType.DECODER.value)


class BlendCpuAttention(TorchNativeAttnBackend):  # type: ignore[misc]
    """SGLang's torch_native backend with its two attention functions replaced."""

    def __init__(self, model_runner: Any) -> None:
        super().__init__(model_runner)
        self.kv_pool = model_runner.token_to_kv_pool
        self.slot_table: torch.Tensor = model_runner.req_to_token_pool.req_to_token
        self.batch: PagedBatch | None = None
        self.plans: dict[AttentionShape, Plan] = {}
        self.shapes: dict[int, AttentionShape | None] = {}
        reason = cpu.unavailable_reason() or self._unfit_pool()
        self.usable = reason is None
        if reason is None:
            logger.info("blend attention: C++ kernels for the CPU, %s", cpu.instruction_set())
        else:
            logger.warning("blend attention runs as torch_native: %s", reason)

    def _unfit_pool(self) -> str | None:
        if type(self.kv_pool) is not MHATokenToKVPool:
            return f"the KV pool is a {type(self.kv_pool).__name__}"
        if self.kv_pool.store_dtype not in cpu.DTYPES:
            return f"the KV cache is {self.kv_pool.store_dtype}"
        return None

    def init_forward_metadata(self, forward_batch: Any) -> None:
        super().init_forward_metadata(forward_batch)
        self.plans.clear()
        mode = forward_batch.forward_mode
        if not self.usable or mode.is_idle() or forward_batch.encoder_lens is not None:
            self.batch = None
            return
        kv_lens = forward_batch.seq_lens.numpy()
        self.batch = PagedBatch.of(
            forward_batch.req_pool_indices.numpy(),
            kv_lens,
            np.ones_like(kv_lens) if mode.is_decode() else forward_batch.extend_seq_lens.numpy(),
        )

    def forward_extend(
        self, q: Any, k: Any, v: Any, layer: Any, forward_batch: Any, save_kv_cache: bool = True
    ) -> Any:
        shape = self._shape(layer, q)
        if shape is None or self.batch is None:
            return super().forward_extend(q, k, v, layer, forward_batch, save_kv_cache)
        return self._attend(shape, q, k, v, layer, forward_batch, save_kv_cache)

    def forward_decode(
        self, q: Any, k: Any, v: Any, layer: Any, forward_batch: Any, save_kv_cache: bool = True
    ) -> Any:
        shape = self._shape(layer, q)
        if shape is None or self.batch is None:
            return super().forward_decode(q, k, v, layer, forward_batch, save_kv_cache)
        return self._attend(shape, q, k, v, layer, forward_batch, save_kv_cache)

    def _attend(
        self,
        shape: AttentionShape,
        q: torch.Tensor,
        k: torch.Tensor | None,
        v: torch.Tensor | None,
        layer: Any,
        forward_batch: Any,
        save_kv_cache: bool,
    ) -> torch.Tensor:
        key_pool = self.kv_pool.get_key_buffer(layer.layer_id)
        value_pool = self.kv_pool.get_value_buffer(layer.layer_id)
        if save_kv_cache and k is not None and v is not None:
            width = shape.kv_heads * shape.head_dim
            slots = forward_batch.out_cache_loc
            rows.store(k.view(-1, width), v.view(-1, width), key_pool, value_pool, slots)
        query = q.view(-1, shape.heads, shape.head_dim)
        output = torch.empty(query.shape, dtype=query.dtype)
        cpu.run(self._plan(shape), shape, query, key_pool, value_pool, self.slot_table, output)
        return output.view(-1, shape.heads * shape.head_dim)

    def _plan(self, shape: AttentionShape) -> Plan:
        plan = self.plans.get(shape)
        if plan is None:
            assert self.batch is not None
            table, table_rows = self.slot_table.numpy(), self.batch.table_rows
            plan = self.plans[shape] = make_plan(
                self.batch,
                shape,
                cpu.TILING,
                torch.get_num_threads(),
                lambda members, positions: table[table_rows[members], positions],
            )
        return plan

    def _shape(self, layer: Any, q: torch.Tensor) -> AttentionShape | None:
        """The layer's shape, or None if the kernels do not cover such a layer."""
        if layer.layer_id not in self.shapes:
            self.shapes[layer.layer_id] = self._make_shape(layer, q)
        return self.shapes[layer.layer_id]

    def _make_shape(self, layer: Any, q: torch.Tensor) -> AttentionShape | None:
        covered = (
            self.usable
            and not layer.is_cross_attention
            and layer.attn_type in _CACHED_KINDS
            and layer.qk_head_dim == layer.v_head_dim
            and q.dtype == self.kv_pool.store_dtype == self.kv_pool.dtype
        )
        if not covered:
            logger.info("blend attention: layer %d runs as torch_native", layer.layer_id)
            return None
        return AttentionShape(
            heads=layer.tp_q_head_num,
            kv_heads=layer.tp_k_head_num,
            head_dim=layer.head_dim,
            scale=layer.scaling,
            soft_cap=layer.logit_cap,
            window=layer.sliding_window_size,
        )
