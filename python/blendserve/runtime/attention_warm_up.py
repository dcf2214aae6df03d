"""Compiles the GPU kernels that a model's steps will need, before the server takes requests.

FlashInfer compiles with nvcc at first use, 18 files for POD attention alone; Triton tries its
candidates. In a step that would take longer than SGLang's watchdog and the front wait for it.
"""

from __future__ import annotations

import logging
import time
from typing import Any

import numpy as np
import torch

from sgl_kernel_ext.batch import AttentionShape, PagedBatch
from sgl_kernel_ext.gpu.kernels import FEW_ROWS
from sgl_kernel_ext.gpu.steps import Planner, Step
from sgl_kernel_ext.groups import Segment

logger = logging.getLogger(__name__)

# Sizes of the warm-up's steps. Triton times its candidates on them, so they are those of a job.
_CHUNK, _DECODES, _SHARED, _OWN = 512, 64, 512, 512
# SGLang makes a backend several times in a process: one per stream of PD multiplexing.
_warm: set[tuple[AttentionShape, torch.dtype]] = set()


def usual_shape(model_runner: Any) -> AttentionShape:
    """The shape of most of the model's layers on this rank."""
    config, args = model_runner.model_config, model_runner.server_args
    ranks = int(args.tp_size or 1)
    if args.enable_dp_attention:
        ranks //= int(args.dp_size or 1)
    return AttentionShape(
        heads=max(config.num_attention_heads // ranks, 1),
        kv_heads=config.get_num_kv_heads(ranks),
        head_dim=config.head_dim,
        scale=config.head_dim**-0.5,
    )


def steps_of(shape: AttentionShape, slots: int, device: torch.device | str) -> list[Step]:
    """A step of each kind that has a kernel of its own, over a pool of so many slots: mixed, groups
    of few packed rows under a prefix, one group of many."""

    def step(prefills: int, group: int) -> Step:
        """Decodes in groups of so many that share; 1: none does."""
        shared = _SHARED if group > 1 else 0
        decodes = _DECODES // group * group
        kv_lens = [_CHUNK] * prefills + [shared + _OWN] * decodes
        # Slots lie anywhere; it does not matter here that some are several requests'.
        random = torch.Generator().manual_seed(0)
        table = torch.randint(slots, (len(kv_lens), max(kv_lens)), generator=random).int()
        segments = []
        for first in range(prefills, prefills + decodes, group):
            members = np.arange(first, first + group)
            if shared:
                segments.append(Segment(0, shared, members))
            segments += [Segment(shared, shared + _OWN, np.array([m])) for m in members]
        query_lens = [_CHUNK] * prefills + [1] * decodes
        batch = PagedBatch.of(list(range(len(kv_lens))), kv_lens, query_lens)
        return Step(batch, segments, table.to(device))

    return [step(1, 1), step(0, max(FEW_ROWS // shape.group, 2)), step(0, _DECODES)]


def warm_up(planner: Planner, model_runner: Any) -> None:
    """Plan and run each kind of step once with every family. A family that fails is logged."""
    shape, dtype = usual_shape(model_runner), model_runner.dtype
    if (shape, dtype) in _warm:
        return
    _warm.add((shape, dtype))
    device = model_runner.device
    # SGLang's own pool, which holds nothing yet: there is no room for another of its size.
    layer = int(getattr(model_runner, "start_layer", 0) or 0)
    pool = model_runner.token_to_kv_pool
    pools = (pool.get_key_buffer(layer), pool.get_value_buffer(layer))
    if any(p.ndim != 3 or p.shape[1:] != (shape.kv_heads, shape.head_dim) for p in pools):
        return
    for step in steps_of(shape, len(pools[0]), device):
        for family in planner.kernels:
            start = time.perf_counter()
            run = planner.plan_with(family, step, shape, dtype)
            if run is None:
                continue
            query = torch.zeros(
                step.tokens, shape.heads, shape.head_dim, dtype=dtype, device=device
            )
            run(query, *pools, torch.empty_like(query))
            if torch.device(device).type == "cuda":
                torch.cuda.synchronize()
            logger.info(
                "%s kernels for %s steps are ready (%.0f s)",
                family.name, "mixed" if step.is_mixed else "decode", time.perf_counter() - start,
            )  # fmt: skip
