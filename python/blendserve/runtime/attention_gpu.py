"""The GPU backend: SGLang's own, with kernels of ours for the steps that those do not suit.

SGLang's backend (FlashInfer's if it is installed, Triton's otherwise) computes the prefill and the
decode part of a mixed step one after the other, and reads a shared prefix anew for each decode.
Those two kinds of steps are taken over here. CUDA graphs hold SGLang's own decode kernels: a step
that is replayed from a graph never comes this way, so decodes that save more by sharing than a
graph does are kept from it.
"""

from __future__ import annotations

import importlib.util
import logging
from typing import Any

import numpy as np
import torch

from blendserve.config import load_settings
from blendserve.runtime.device import cost_model_of
from blendserve.runtime.prefix_paths import PrefixPaths, current
from sgl_kernel_ext.batch import AttentionShape, PagedBatch
from sgl_kernel_ext.gpu.steps import Runner, Step, StepKernels, choose_kernels
from sgl_kernel_ext.groups import Segment

logger = logging.getLogger(__name__)

# What a decode step without a CUDA graph may cost more, per layer of the model: launching its
# kernels one by one. An assumption that no GPU has confirmed yet.
EAGER_SECONDS_PER_LAYER = 1e-4
# The method of SGLang that decides between graph and no graph; it has moved once.
_GRAPH_TESTS = (
    (
        "sglang.srt.model_executor.runner.decode_cuda_graph_runner",
        "DecodeCudaGraphRunner.can_run_graph",
    ),
    ("sglang.srt.model_executor.cuda_graph_runner", "CudaGraphRunner.can_run"),
)


class BlendedSteps:
    """Mixed into an SGLang backend class, in front of it."""

    def __init__(self, model_runner: Any, **options: Any) -> None:
        super().__init__(model_runner, **options)  # type: ignore[call-arg]
        self.blend_pool = model_runner.token_to_kv_pool
        self.blend_table: torch.Tensor = model_runner.req_to_token_pool.req_to_token
        self.blend_paths = PrefixPaths()
        self.blend_kernels: list[StepKernels]
        self.blend_kernels, reason = choose_kernels(model_runner.device)
        self.blend_step: Step | None = None
        self.blend_runners: dict[AttentionShape, Runner | None] = {}
        args = model_runner.server_args
        model = cost_model_of(model_runner.model_config, args.tp_size, load_settings())
        self.blend_token_seconds = model.model.kv_bytes_per_token / model.hardware.bandwidth_bytes
        self.blend_eager_seconds = (
            model_runner.model_config.num_hidden_layers * EAGER_SECONDS_PER_LAYER
        )
        # With data-parallel attention, replicas must agree on a graph; each sees its own batch.
        self.blend_may_leave_graph = not args.enable_dp_attention
        logger.info("blend attention: %s", reason)

    def init_forward_metadata(self, forward_batch: Any) -> None:
        super().init_forward_metadata(forward_batch)  # type: ignore[misc]
        self.blend_runners.clear()
        self.blend_step = self._blend_step(forward_batch)

    def init_forward_metadata_out_graph(
        self, forward_batch: Any, *args: Any, **kwargs: Any
    ) -> None:
        # Capture and replay: what is recorded must be SGLang's own path.
        self.blend_step = None
        super().init_forward_metadata_out_graph(forward_batch, *args, **kwargs)  # type: ignore[misc]

    def forward_extend(
        self, q: Any, k: Any, v: Any, layer: Any, forward_batch: Any, *args: Any, **kwargs: Any
    ) -> Any:
        ours = self._blend_forward(q, k, v, layer, forward_batch, *args, **kwargs)
        if ours is not None:
            return ours
        return super().forward_extend(q, k, v, layer, forward_batch, *args, **kwargs)  # type: ignore[misc]

    def forward_decode(
        self, q: Any, k: Any, v: Any, layer: Any, forward_batch: Any, *args: Any, **kwargs: Any
    ) -> Any:
        ours = self._blend_forward(q, k, v, layer, forward_batch, *args, **kwargs)
        if ours is not None:
            return ours
        return super().forward_decode(q, k, v, layer, forward_batch, *args, **kwargs)  # type: ignore[misc]

    def leaves_graph(self, forward_batch: Any) -> bool:
        """Whether a decode step saves more by sharing reads than a CUDA graph saves."""
        if not (self.blend_may_leave_graph and forward_batch.forward_mode.is_decode()):
            return False
        step = self._blend_step(forward_batch)
        if step is None:
            return False
        return bool(step.saved_tokens * self.blend_token_seconds > self.blend_eager_seconds)

    def _blend_step(self, forward_batch: Any) -> Step | None:
        mode = forward_batch.forward_mode
        plain = forward_batch.spec_info is None and forward_batch.encoder_lens is None
        reqs = current.of(forward_batch.rids)
        if not plain or reqs is None or not (mode.is_decode() or mode.is_mixed()):
            return None
        kv_lens = forward_batch.seq_lens_cpu.numpy()
        batch = PagedBatch.of(
            [getattr(req, "kv", req).req_pool_idx for req in reqs],
            kv_lens,
            np.ones_like(kv_lens) if mode.is_decode() else forward_batch.extend_seq_lens_cpu,
        )
        decodes = np.flatnonzero(batch.query_lens == 1)
        found = self.blend_paths.segments(
            [reqs[i] for i in decodes.tolist()], batch.kv_lens[decodes]
        )
        segments = [Segment(s.begin, s.end, decodes[s.members]) for s in found]
        step = Step(batch, segments, self.blend_table)
        return step if step.worth_planning else None

    def _blend_forward(
        self,
        q: torch.Tensor,
        k: torch.Tensor | None,
        v: torch.Tensor | None,
        layer: Any,
        forward_batch: Any,
        save_kv_cache: bool = True,
        **kwargs: Any,
    ) -> torch.Tensor | None:
        """The layer's output, or None if the step or the layer is SGLang's to compute."""
        if self.blend_step is None or kwargs or layer.is_cross_attention:
            return None
        key_pool = self.blend_pool.get_key_buffer(layer.layer_id)
        value_pool = self.blend_pool.get_value_buffer(layer.layer_id)
        if (
            layer.qk_head_dim != layer.v_head_dim
            or getattr(layer.attn_type, "value", layer.attn_type) != "decoder"
            or key_pool.ndim != 3
            or key_pool.dtype != q.dtype
        ):
            return None
        shape = AttentionShape(
            heads=layer.tp_q_head_num,
            kv_heads=layer.tp_k_head_num,
            head_dim=layer.head_dim,
            scale=layer.scaling,
            soft_cap=layer.logit_cap,
            window=layer.sliding_window_size,
        )
        if shape not in self.blend_runners:
            plans = (
                kernels.plan(self.blend_step, shape, q.dtype) for kernels in self.blend_kernels
            )
            self.blend_runners[shape] = next((plan for plan in plans if plan is not None), None)
        run = self.blend_runners[shape]
        if run is None:
            return None
        if save_kv_cache and k is not None and v is not None:
            slots = forward_batch.out_cache_loc
            key_pool[slots] = k.view(-1, shape.kv_heads, shape.head_dim)
            value_pool[slots] = v.view(-1, shape.kv_heads, shape.head_dim)
        query = q.view(-1, shape.heads, shape.head_dim)
        output = torch.empty(query.shape, dtype=query.dtype, device=query.device)
        run(query, key_pool, value_pool, output)
        return output.view(-1, shape.heads * shape.head_dim)


def make_backend(model_runner: Any) -> Any:
    """BlendedSteps over the best backend that this SGLang has for the device."""
    from sglang.srt.layers.attention import flashinfer_backend, triton_backend

    installed = importlib.util.find_spec("flashinfer") is not None
    parent = (
        flashinfer_backend.FlashInferAttnBackend if installed else triton_backend.TritonAttnBackend
    )
    # PD multiplexing runs two backends at once: they must not write to one FlashInfer workspace.
    options = {"init_new_workspace": model_runner.init_new_workspace} if installed else {}
    return type("BlendGpuAttention", (BlendedSteps, parent), {})(model_runner, **options)


def leave_graphs() -> None:
    """Have SGLang ask before it replays a decode step from a CUDA graph."""
    from sglang.srt.plugins.hook_registry import HookRegistry, HookType

    for module, method in _GRAPH_TESTS:
        if importlib.util.find_spec(module) is not None:
            HookRegistry.register(f"{module}.{method}", _can_run_graph, HookType.AROUND)
            return


def _can_run_graph(
    original: Any, runner: Any, forward_batch: Any, *args: Any, **kwargs: Any
) -> bool:
    if not original(runner, forward_batch, *args, **kwargs):
        return False
    backend = runner.model_runner.attn_backend
    return not (isinstance(backend, BlendedSteps) and backend.leaves_graph(forward_batch))
