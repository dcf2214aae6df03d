"""Attention batches of an 8B Llama with random tensors: one layer, many KV slots."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import torch
from report import DEVICE, DRY, multiprocessors

from sgl_kernel_ext import gpu
from sgl_kernel_ext.batch import AttentionShape, PagedBatch
from sgl_kernel_ext.gpu.steps import Step
from sgl_kernel_ext.groups import Segment, shared_segments
from sgl_kernel_ext.plan import plan_segments

# Of an 8B Llama; smaller, and of an element type that it computes right, for the interpreter.
SHAPE = AttentionShape(heads=4, kv_heads=2, head_dim=16, scale=0.25) if DRY else AttentionShape(
    heads=32, kv_heads=8, head_dim=128, scale=128**-0.5
)  # fmt: skip
DTYPE = torch.float32 if DRY else torch.bfloat16
TOKEN_BYTES = 2 * SHAPE.kv_heads * SHAPE.head_dim * 2  # bfloat16


class Layer:
    """One step's tensors: chunks of prefill first, then decodes, as SGLang mixes them."""

    def __init__(
        self,
        prefills: list[tuple[int, int]],
        decodes: list[int],
        shared: int = 0,
        device: torch.device | str = DEVICE,
    ) -> None:
        """prefills: (cached, new) tokens of each chunk. decodes: KV length of each decode, of which
        the first `shared` positions are common to all decodes."""
        kv_lens = [cached + new for cached, new in prefills] + decodes
        query_lens = [new for _, new in prefills] + [1] * len(decodes)
        own = [c + n for c, n in prefills] + [d - shared for d in decodes]
        slots = 1 + shared + sum(own)
        # Requests of a running engine have their slots anywhere in the pool.
        order = torch.from_numpy(np.random.default_rng(0).permutation(slots - 1) + 1)
        table = torch.zeros(len(kv_lens), max(kv_lens), dtype=torch.int32)
        used = shared
        for i, length in enumerate(own):
            begin = shared if i >= len(prefills) else 0
            table[i, :begin] = order[:begin]
            table[i, begin : begin + length] = order[used : used + length]
            used += length
        generator = torch.Generator(device=device).manual_seed(0)

        def random(*size: int) -> torch.Tensor:
            return torch.randn(size, dtype=DTYPE, device=device, generator=generator)

        self.batch = PagedBatch.of(list(range(len(kv_lens))), kv_lens, query_lens)
        self.table = table.to(device)
        self.key_pool = random(slots, SHAPE.kv_heads, SHAPE.head_dim)
        self.value_pool = random(slots, SHAPE.kv_heads, SHAPE.head_dim)
        self.query = random(sum(query_lens), SHAPE.heads, SHAPE.head_dim)
        self.output = torch.empty_like(self.query)
        self.device = device

    def step(self, share: bool = True) -> Step:
        decodes = np.flatnonzero(self.batch.query_lens == 1)
        # Rows that no other request's row resembles: nothing to share.
        apart = torch.arange(self.table.numel()).reshape(self.table.shape)
        slots = (self.table.cpu() if share else apart).numpy()
        segments = shared_segments(
            lambda members, at: slots[decodes[members], at], self.batch.kv_lens[decodes]
        )
        members = [Segment(s.begin, s.end, decodes[s.members]) for s in segments]
        return Step(self.batch, members, self.table)

    def triton(self, share: bool = True) -> Callable[[], None]:
        """The Triton kernels over everything at once."""
        step = self.step(share)
        tiling = gpu.tiling(SHAPE)
        plan = plan_segments(self.batch, SHAPE, tiling, multiprocessors(), step.segments)
        on_device = gpu.to_device(plan, SHAPE, self.device)
        pools = (self.key_pool, self.value_pool)
        return lambda: gpu.run(on_device, SHAPE, self.query, *pools, self.table, self.output)
