"""Weights packed once for the CPU, instead of at every product.

SGLang's dense layers call ``F.linear``, which on a CPU reorders the weight into the layout of the
kernels before each product: for the few tokens of a decode step that takes longer than the product.
Here each layer's weight is reordered when the model is loaded, by the operators that torch's own
compiler uses, and the plain one is let go. What reads or writes weights later (updates while the
engine runs, ``get_weights_by_name``) sees plain ones for as long as it takes.
"""

from __future__ import annotations

import contextlib
import ctypes
import logging
from collections.abc import Callable, Iterator
from typing import Any

import torch
from sglang.srt.layers.linear import ColumnParallelLinear, RowParallelLinear
from sglang.srt.layers.logits_processor import LogitsProcessor
from sglang.srt.layers.quantization.unquant import (
    UnquantizedEmbeddingMethod,
    UnquantizedLinearMethod,
)
from sglang.srt.layers.vocab_parallel_embedding import ParallelLMHead, VocabParallelEmbedding

from blendserve.runtime.cpu_platform import best_dtype

logger = logging.getLogger(__name__)

_DTYPES = (torch.float32, torch.bfloat16)
# What of a model reads or writes its parameters after it has been loaded.
_METHODS_ON_WEIGHTS = ("load_weights", "get_weights_by_name")


def register() -> None:
    """Have every model packed as soon as it is loaded."""
    from sglang.srt.plugins.hook_registry import HookRegistry, HookType

    HookRegistry.register(
        "sglang.srt.model_executor.model_runner.ModelRunner.load_model",
        _after_loading,
        HookType.AFTER,
    )
    HookRegistry.register(
        "sglang.srt.model_executor.model_runner_components.weight_updater"
        "._model_load_weights_direct",
        _load_directly,
        HookType.AROUND,
    )


def _after_loading(result: Any, runner: Any) -> None:
    pack_model(runner)


def _load_directly(original: Callable[..., Any], model: Any, named_tensors: Any) -> Any:
    """The one update that goes round the model's own ``load_weights``."""
    packed = getattr(model, "packed_weights", None)
    with packed.plain() if packed is not None else contextlib.nullcontext():
        return original(model, named_tensors)


def unavailable_reason(dtype: torch.dtype) -> str | None:
    """Why weights of this type cannot be packed here, or None if they can."""
    if dtype not in _DTYPES:
        return f"there is no packed product for {dtype}"
    operators = ("_reorder_linear_weight", "_linear_pointwise")
    if not torch.backends.mkldnn.is_available() or not all(  # type: ignore[no-untyped-call]
        hasattr(torch.ops.mkldnn, name) for name in operators
    ):
        return f"torch {torch.__version__} was built without oneDNN's linear operators"
    if dtype == torch.bfloat16 and not torch.ops.mkldnn._is_mkldnn_bf16_supported():
        return "oneDNN has no bfloat16 for this processor"
    return None


def pack(weight: torch.Tensor) -> torch.nn.Parameter:
    """A weight [outputs, inputs] in oneDNN's own layout, which only ``product`` can read."""
    packed = torch.ops.mkldnn._reorder_linear_weight(weight.detach())
    return torch.nn.Parameter(packed, requires_grad=False)


def product(x: torch.Tensor, packed: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
    """``F.linear`` with a packed weight: [..., inputs] to [..., outputs]."""
    return torch.ops.mkldnn._linear_pointwise(x, packed, bias, "none", [], "")  # type: ignore[no-any-return]


class PackedLinear(UnquantizedLinearMethod):  # type: ignore[misc]
    """A dense layer whose ``weight`` is packed."""

    def process_weights_after_loading(self, layer: Any) -> None:
        """Nothing: it is packed already when SGLang calls this after an update."""

    def apply(self, layer: Any, x: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
        return product(x, layer.weight, bias)

    def apply_into(
        self,
        layer: Any,
        x: torch.Tensor,
        output: torch.Tensor,
        bias: torch.Tensor | None = None,
    ) -> torch.Tensor:
        return output.copy_(product(x, layer.weight, bias))


class PackedHead(UnquantizedEmbeddingMethod):  # type: ignore[misc]
    """The logits' head. Of a tied one, ``weight`` stays plain: the embedding reads its rows."""

    def __init__(self, packed: torch.nn.Parameter) -> None:
        self.packed = packed

    def apply(self, layer: Any, x: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
        return product(x.to(self.packed.dtype), self.packed, bias)


class PackedModel:
    """Which layers of a model are packed, and the way back."""

    def __init__(self, model: torch.nn.Module, with_head: bool) -> None:
        self.model = model
        self.linears: list[Any] = [module for module in model.modules() if _is_plain_linear(module)]
        self.heads: list[Any] = list(_plain_heads(model)) if with_head else []
        users: dict[int, int] = {}
        for module in model.modules():
            weight = module._parameters.get("weight")
            if weight is not None:
                users[id(weight)] = users.get(id(weight), 0) + 1
        self.tied = {
            id(head): type(head) is not ParallelLMHead or users[id(head.weight)] > 1
            for head in self.heads
        }
        self.packed_bytes = 0
        self.doubled_bytes = 0
        self._depth = 0
        self._pack()
        for name in _METHODS_ON_WEIGHTS:
            method = getattr(model, name, None)
            if method is not None:
                # On the one object: module attributes that are no parameters are plain ones.
                setattr(model, name, self._on_plain_weights(method))

    @contextlib.contextmanager
    def plain(self) -> Iterator[None]:
        """Plain weights inside; packed anew on leaving, whatever happened inside."""
        if self._depth == 0:
            self._unpack()
        self._depth += 1
        try:
            yield
        finally:
            self._depth -= 1
            if self._depth == 0:
                self._pack()

    def _on_plain_weights(self, method: Callable[..., Any]) -> Callable[..., Any]:
        def call(*args: Any, **kwargs: Any) -> Any:
            with self.plain():
                return method(*args, **kwargs)

        return call

    def _pack(self) -> None:
        self.packed_bytes = self.doubled_bytes = 0
        for module in self.linears:
            self._swap(module, pack(module.weight))
            module.quant_method = PackedLinear()
        for head in self.heads:
            packed = pack(head.weight)
            if self.tied[id(head)]:
                self.doubled_bytes += packed.nbytes
                self.packed_bytes += packed.nbytes
            else:
                self._swap(head, packed)
            head.quant_method = PackedHead(packed)
        _return_freed_memory()

    def _unpack(self) -> None:
        for module in self.linears:
            self._swap(module, torch.nn.Parameter(module.weight.to_dense(), requires_grad=False))
            module.quant_method = UnquantizedLinearMethod()
        for head in self.heads:
            if not self.tied[id(head)]:
                dense = torch.nn.Parameter(head.weight.to_dense(), requires_grad=False)
                self._swap(head, dense)
            head.quant_method = UnquantizedEmbeddingMethod()

    def _swap(self, module: Any, weight: torch.nn.Parameter) -> None:
        # Its attributes tell SGLang's loaders which part of a checkpoint belongs in it.
        weight.__dict__.update(module.weight.__dict__)
        self.packed_bytes += weight.nbytes
        module.weight = weight


def _is_plain_linear(module: torch.nn.Module) -> bool:
    # Replicated layers are left alone: models read the weights of their routers themselves.
    return (
        isinstance(module, ColumnParallelLinear | RowParallelLinear)
        and type(module.quant_method) is UnquantizedLinearMethod
        and _is_packable(module)
    )


def _plain_heads(model: torch.nn.Module) -> Iterator[Any]:
    for module in model.modules():
        head = module._modules.get("lm_head")
        if (
            isinstance(head, VocabParallelEmbedding)
            and type(head.quant_method) is UnquantizedEmbeddingMethod
            and _is_packable(head)
        ):
            yield head


def _is_packable(module: torch.nn.Module) -> bool:
    """A plain matrix on the CPU that SGLang has not packed itself, as it does for AMX."""
    weight = module._parameters.get("weight")
    return (
        weight is not None
        and weight.dim() == 2
        and weight.device.type == "cpu"
        and weight.layout == torch.strided
        and unavailable_reason(weight.dtype) is None
        and not getattr(module, "use_intel_amx_backend", False)
    )


def _return_freed_memory() -> None:
    # The C library would keep what the plain weights took, between the packed ones.
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
    if trim is not None:
        trim(0)


def _casts_its_head(model: torch.nn.Module) -> bool:
    """Whether logits are computed in another type than the weights have."""
    return any(
        getattr(module, "use_fp32_lm_head", False)
        or getattr(module, "rl_on_policy_target", None) is not None
        for module in model.modules()
        if isinstance(module, LogitsProcessor)
    )


def pack_model(runner: Any) -> None:
    """Pack what a ModelRunner of SGLang has just loaded, and say so in the log."""
    if str(runner.device) != "cpu":
        return
    model = runner.model
    reason = unavailable_reason(runner.dtype)
    if reason is not None:
        logger.warning("blend linear: weights are reordered at every product: %s", reason)
        return
    packed = PackedModel(model, with_head=runner.is_generation and not _casts_its_head(model))
    model.packed_weights = packed
    logger.info(
        "blend linear: %s (this processor is fastest in %s; --dtype chooses); %d layers and %d "
        "logits heads packed once for oneDNN, %.0f MB, of which %.0f MB beside the embedding that "
        "is tied to the head",
        str(runner.dtype).removeprefix("torch."),
        best_dtype(),
        len(packed.linears),
        len(packed.heads),
        packed.packed_bytes / 1e6,
        packed.doubled_bytes / 1e6,
    )
