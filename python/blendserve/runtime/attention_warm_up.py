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
from sgl_kernel_ext.groups import MIN_SHARED_TOKENS, Segment

logger = logging.getLogger(__name__)

_CHUNK, _OWN = 64, 16
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


def steps_of(shape: AttentionShape, device: torch.device | str) -> list[Step]:
    """Small steps of each kind that has a kernel of its own."""

    def step(prefills: int, decodes: int) -> Step:
        shared = MIN_SHARED_TOKENS if not prefills else 0
        kv_lens = [_CHUNK] * prefills + [shared + _OWN] * decodes
        table = torch.arange(len(kv_lens) * max(kv_lens), dtype=torch.int32)
        table = table.view(len(kv_lens), -1).clone()
        table[prefills:, :shared] = table[prefills, :shared].clone()
        batch = PagedBatch.of(
            list(range(len(kv_lens))), kv_lens, [_CHUNK] * prefills + [1] * decodes
        )
        members = np.arange(prefills, prefills + decodes)
        segments = [Segment(0, shared, members)] if shared else []
        segments += [Segment(shared, shared + _OWN, members[i : i + 1]) for i in range(decodes)]
        return Step(batch, segments, table.to(device))

    few = max(FEW_ROWS // shape.group, 2)
    return [step(1, 2), step(0, few), step(0, 2 * few)]


def warm_up(planner: Planner, model_runner: Any) -> None:
    """Plan and run each kind of step once with every family. A family that fails is logged."""
    shape, dtype = usual_shape(model_runner), model_runner.dtype
    if (shape, dtype) in _warm:
        return
    _warm.add((shape, dtype))
    device = model_runner.device
    for step in steps_of(shape, device):
        for family in planner.kernels:
            start = time.perf_counter()
            run = planner.plan_with(family, step, shape, dtype)
            if run is None:
                continue
            pools = torch.zeros(
                2, step.slot_table.numel(), shape.kv_heads, shape.head_dim,
                dtype=dtype, device=device,
            )  # fmt: skip
            query = torch.zeros(
                step.tokens, shape.heads, shape.head_dim, dtype=dtype, device=device
            )
            run(query, pools[0], pools[1], torch.empty_like(query))
            if torch.device(device).type == "cuda":
                torch.cuda.synchronize()
            logger.info(
                "%s kernels for %s steps are ready (%.0f s)",
                family.name, "mixed" if step.is_mixed else "decode", time.perf_counter() - start,
            )  # fmt: skip
