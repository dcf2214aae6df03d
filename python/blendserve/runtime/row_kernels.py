"""On a CPU: norms, activations and rotary embeddings in one pass each, by C++ kernels.

SGLang computes them as chains of torch's operators there, each with its own pass over memory and
its own start of all threads. SGLang's operators let an instance name the method that it runs; that
is set on those of a model that has just been loaded, as far as the kernels cover them. A call that
they do not cover goes SGLang's way.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import Any

import torch
from sglang.srt.layers.activation import SiluAndMul
from sglang.srt.layers.layernorm import RMSNorm
from sglang.srt.layers.rotary_embedding.base import RotaryEmbedding
from sglang.srt.utils import cpu_has_amx_support

from sgl_kernel_ext import cpu
from sgl_kernel_ext.cpu import rows

logger = logging.getLogger(__name__)

Forward = Callable[..., Any]


def register() -> None:
    """Have every model use the kernels as soon as it is loaded."""
    from sglang.srt.plugins.hook_registry import HookRegistry, HookType

    HookRegistry.register(
        "sglang.srt.model_executor.model_runner.ModelRunner.load_model",
        _after_loading,
        HookType.AFTER,
    )


def _after_loading(result: Any, runner: Any) -> None:
    if str(runner.device) == "cpu":
        use_row_kernels(runner.model)


def use_row_kernels(model: torch.nn.Module) -> None:
    """Set our method on every operator of the model that the kernels cover, and log how many."""
    if cpu_has_amx_support():
        # Then SGLang's own build of sgl_kernel is there, which has such kernels.
        return
    reason = cpu.unavailable_reason()
    if reason is not None:
        logger.warning("blend rows: norms and activations run as SGLang's: %s", reason)
        return
    covered = 0
    module: Any
    for module in model.modules():
        method = _method(module)
        # Another one than None was set by SGLang, which wants that one.
        if method is not None and getattr(module, "_forward_method", module) is None:
            module._forward_method = method
            covered += 1
    logger.info("blend rows: %d norms, activations and rotary embeddings in C++", covered)


def _method(module: torch.nn.Module) -> Forward | None:
    if type(module) is SiluAndMul:
        return _activation(module)
    if type(module) is RMSNorm and _is_plain_norm(module):
        return _norm(module)
    if isinstance(module, RotaryEmbedding) and _is_plain_rotary(module):
        return _rotary(module)
    return None


def _activation(op: Any) -> Forward:
    def forward(x: torch.Tensor) -> torch.Tensor:
        if not _is_rows(x) or x.shape[1] % 2:
            return op.forward_native(x)  # type: ignore[no-any-return]
        return rows.silu_and_multiply(x)

    return forward


def _is_plain_norm(op: Any) -> bool:
    return (
        op.has_weight
        and not op.cast_x_before_out_mul
        and not op.fp32_residual
        and op.override_orig_dtype is None
        and op.variance_size_override is None
    )


def _norm(op: Any) -> Forward:
    def forward(
        x: torch.Tensor, residual: torch.Tensor | None = None, *others: Any, **named: Any
    ) -> Any:
        # An empty last batch of SGLang's data parallelism, a further addend, a fused quantisation.
        plain = not any(other is not None for other in (*others, *named.values()))
        fits = _is_rows(x) and x.dtype == op.weight.dtype and x.shape[1] == op.hidden_size
        if residual is not None:
            fits = fits and _is_rows(residual) and residual.dtype == x.dtype
        if not (plain and fits):
            return op.forward_native(x, residual, *others, **named)
        output, total = rows.normalise(x, residual, op.weight, op.variance_epsilon)
        return output if residual is None else (output, total)

    return forward


def _is_plain_rotary(op: Any) -> bool:
    kind = type(op)
    return (
        kind.forward_native is RotaryEmbedding.forward_native
        and kind.forward_cpu is RotaryEmbedding.forward_cpu
        and kind.forward_cuda is RotaryEmbedding.forward_cuda
        and op.is_neox_style
        and op.rotary_dim % 2 == 0
        and op.rotary_dim <= op.head_size
    )


def _rotary(op: Any) -> Forward:
    def forward(
        positions: torch.Tensor, query: torch.Tensor, key: torch.Tensor, *others: Any, **named: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:
        cache = op.cos_sin_cache
        covered = (
            not any(other is not None for other in (*others, *named.values()))
            and not hasattr(op, "sin_cos_cache")
            and _is_rows(query)
            and _is_rows(key)
            and query.dtype == key.dtype == cache.dtype
            and positions.dtype == torch.int64
            and positions.shape == query.shape[:1]
            and positions.is_contiguous()
            and cache.is_contiguous()
        )
        if not covered:
            return op.forward_native(positions, query, key, *others, **named)  # type: ignore[no-any-return]
        # In place, as SGLang does on a GPU.
        rows.rotate(query, key, cache, positions, op.head_size)
        return query, key

    return forward


def _is_rows(x: torch.Tensor) -> bool:
    return x.dim() == 2 and x.stride(1) == 1 and x.dtype in cpu.DTYPES
