"""The GPU backend: SGLang's own, with kernels of ours for the steps that those do not suit.

SGLang's FlashInfer and Triton backends compute the prefill and the decode part of a mixed step one
after the other, and all read a shared prefix anew for each decode. Those two kinds of steps are
taken over here. CUDA graphs hold SGLang's own decode kernels: a step that is replayed from a graph
never comes this way, so decodes that save more by sharing than a graph does are kept from it.
"""

from __future__ import annotations

import importlib.util
import logging
from typing import Any

import numpy as np
import torch

from blendserve.config import load_settings
from blendserve.runtime.attention_warm_up import warm_up
from blendserve.runtime.device import cost_model_of
from blendserve.runtime.prefix_paths import PrefixPaths, current
from sgl_kernel_ext.batch import AttentionShape, PagedBatch
from sgl_kernel_ext.gpu.choice import choose_kernels
from sgl_kernel_ext.gpu.steps import MIN_SAVED_SHARE, Planner, Runner, Step
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
    """Mixed into an SGLang backend class, in front of it; see `make_backend`."""

    def blend_init(self, model_runner: Any, planner: Planner, takes_mixed: bool) -> None:
        """takes_mixed: whether SGLang's backend computes a mixed step in two launches."""
        self.blend_pool = model_runner.token_to_kv_pool
        self.blend_table: torch.Tensor = model_runner.req_to_token_pool.req_to_token
        self.blend_paths = PrefixPaths()
        self.blend_planner = planner
        self.blend_takes_mixed = takes_mixed
        # Of the batch that was looked at last: a decode step is, before it leaves its graph and
        # after.
        self.blend_seen: tuple[Any, Step | None] = (None, None)
        self.blend_step: Step | None = None
        # Whether SGLang's backend has planned the step, too: only if a layer asks for that.
        self.blend_planned = True
        self.blend_runners: dict[AttentionShape, Runner | None] = {}
        args = model_runner.server_args
        model = cost_model_of(model_runner.model_config, args.tp_size, load_settings())
        self.blend_token_seconds = model.model.kv_bytes_per_token / model.hardware.bandwidth_bytes
        self.blend_eager_seconds = (
            model_runner.model_config.num_hidden_layers * EAGER_SECONDS_PER_LAYER
        )
        # With data-parallel attention, replicas must agree on a graph; each sees its own batch.
        self.blend_may_leave_graph = not args.enable_dp_attention

    def init_forward_metadata(self, forward_batch: Any) -> None:
        self.blend_runners.clear()
        self.blend_step = self._blend_step(forward_batch)
        self.blend_seen = (None, None)
        # Most taken-over steps need no plan of SGLang's, which would wait for the GPU.
        self.blend_planned = self.blend_step is None
        if self.blend_planned:
            super().init_forward_metadata(forward_batch)  # type: ignore[misc]

    def init_forward_metadata_out_graph(
        self, forward_batch: Any, *args: Any, **kwargs: Any
    ) -> None:
        # Capture and replay: what is recorded must be SGLang's own path.
        self.blend_step, self.blend_planned = None, True
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
        saved = self.blend_planner.saved_tokens(step) * self.blend_token_seconds
        return bool(saved > self.blend_eager_seconds)

    def _blend_step(self, forward_batch: Any) -> Step | None:
        """The step, if it is one to be taken over."""
        batch, step = self.blend_seen
        if batch is not forward_batch:
            step = self._blend_look(forward_batch)
            self.blend_seen = (forward_batch, step)
        return step

    def _blend_look(self, forward_batch: Any) -> Step | None:
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
        if step.is_mixed and self.blend_takes_mixed:
            return step
        saved = self.blend_planner.saved_tokens(step)
        return step if saved > MIN_SAVED_SHARE * step.decode_tokens else None

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
        if self.blend_step is None:
            return None
        run = None if kwargs else self._blend_runner(q, layer)
        if run is None:
            if not self.blend_planned:
                self.blend_planned = True
                super().init_forward_metadata(forward_batch)  # type: ignore[misc]
            return None
        heads, dim = layer.tp_q_head_num, layer.head_dim
        if save_kv_cache and k is not None and v is not None:
            keys, values = (x.view(-1, layer.tp_k_head_num, dim) for x in (k, v))
            self.blend_pool.set_kv_buffer(layer, forward_batch.out_cache_loc, keys, values)
        query = q.view(-1, heads, dim)
        output = torch.empty(query.shape, dtype=query.dtype, device=query.device)
        key_pool = self.blend_pool.get_key_buffer(layer.layer_id)
        value_pool = self.blend_pool.get_value_buffer(layer.layer_id)
        run(query, key_pool, value_pool, output)
        return output.view(-1, heads * dim)

    def _blend_runner(self, q: torch.Tensor, layer: Any) -> Runner | None:
        step = self.blend_step
        key_pool = self.blend_pool.get_key_buffer(layer.layer_id)
        if (
            step is None
            or layer.is_cross_attention
            or layer.qk_head_dim != layer.v_head_dim
            or getattr(layer.attn_type, "value", layer.attn_type) != "decoder"
            or key_pool.ndim != 3
            or key_pool.dtype != q.dtype
            # SGLang has padded the step, or cut it.
            or len(q) != step.tokens
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
            self.blend_runners[shape] = self.blend_planner.plan(step, shape, q.dtype)
        return self.blend_runners[shape]


def left_to_sglang(model_runner: Any) -> str | None:
    """Why no layer of this model can be taken over; None if layers can."""
    pool, config = model_runner.token_to_kv_pool, model_runner.model_config
    if getattr(model_runner, "use_mla_backend", False):
        return "the model has multi-head latent attention"
    if hasattr(pool, "swa_kv_pool"):
        return "sliding-window layers have a KV pool of their own"
    held = getattr(pool, "dtype", None)
    if held != model_runner.dtype:
        return f"the KV cache is {held}, and the model {model_runner.dtype}"
    if getattr(config, "is_encoder_decoder", False):
        return "the model has an encoder"
    if getattr(model_runner.server_args, "speculative_algorithm", None):
        return "steps of speculative decoding are neither mixed nor plain decodes"
    return None


def parent_name(model_runner: Any) -> str:
    """SGLang's backend to stand in front of, as its registry calls it.

    As SGLang chooses for page size 1: FlashAttention-3 on Hopper, otherwise FlashInfer or, without
    it, Triton.
    """
    capability, _ = torch.cuda.get_device_capability()
    mla = getattr(model_runner, "use_mla_backend", False)
    if capability == 9 and not mla and _has("sgl_kernel.flash_attn", "sgl_kernel.flash_ops"):
        return "fa3"
    return "flashinfer" if _has("flashinfer") else "triton"


def _has(*modules: str) -> bool:
    try:
        return all(importlib.util.find_spec(module) is not None for module in modules)
    except ImportError:
        return False


def make_backend(model_runner: Any) -> Any:
    """BlendedSteps over SGLang's backend, or that alone where none of its steps can be taken."""
    from sglang.srt.layers.attention.attention_registry import ATTENTION_BACKENDS

    name = parent_name(model_runner)
    backend = ATTENTION_BACKENDS[name](model_runner)
    reason = left_to_sglang(model_runner)
    if reason is not None:
        logger.warning("--attention-backend blend is SGLang's %s here, because %s", name, reason)
        return backend
    kernels, why = choose_kernels(model_runner.device)
    planner = Planner(kernels)
    warm_up(planner, model_runner)
    # One launch of FlashAttention-3 takes prefill and decodes together.
    takes_mixed = name != "fa3"
    logger.info("blend attention over SGLang's %s: %s", name, why)
    # SGLang's factory alone knows how its backend is made.
    backend.__class__ = type("BlendGpuAttention", (BlendedSteps, type(backend)), {})
    backend.blend_init(model_runner, planner, takes_mixed)
    return backend


def leave_graphs() -> None:
    """Have SGLang ask before it replays a decode step from a CUDA graph."""
    from sglang.srt.plugins.hook_registry import HookRegistry, HookType

    for module, method in _GRAPH_TESTS:
        if importlib.util.find_spec(module) is not None:
            HookRegistry.register(f"{module}.{method}", _can_run_graph, HookType.AROUND)
            return
    logger.warning("SGLang decides about CUDA graphs elsewhere: decode steps all stay in theirs")


def _can_run_graph(
    original: Any, runner: Any, forward_batch: Any, *args: Any, **kwargs: Any
) -> bool:
    if not original(runner, forward_batch, *args, **kwargs):
        return False
    backend = runner.model_runner.attn_backend
    return not (isinstance(backend, BlendedSteps) and backend.leaves_graph(forward_batch))
