"""Steps by the Triton kernels: one launch for prefill tiles, decodes and shared prefixes."""

from __future__ import annotations

import torch

from sgl_kernel_ext.batch import AttentionShape
from sgl_kernel_ext.gpu.attention import DTYPES, many_rows, run, tiling, to_device
from sgl_kernel_ext.gpu.steps import Runner, Step
from sgl_kernel_ext.plan import plan_segments


class TritonSteps:
    """Every shape whose packed query heads fit a tile."""

    name = "triton"

    def __init__(self, device: torch.device | str, multiprocessors: int = 1) -> None:
        self.device = torch.device(device)
        self.workers = multiprocessors

    def saved_tokens(self, step: Step) -> int:
        """Prefixes of any depth are read once."""
        return step.saved_tokens

    def plan(self, step: Step, shape: AttentionShape, dtype: torch.dtype) -> Runner | None:
        if dtype not in DTYPES or shape.group > many_rows(shape):
            return None
        plan = plan_segments(step.batch, shape, tiling(shape), self.workers, step.segments)
        on_device = to_device(plan, shape, self.device)

        def run_layer(
            query: torch.Tensor,
            key_pool: torch.Tensor,
            value_pool: torch.Tensor,
            output: torch.Tensor,
        ) -> None:
            run(on_device, shape, query, key_pool, value_pool, step.slot_table, output)

        return run_layer
