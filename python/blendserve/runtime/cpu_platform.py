"""Lets the unmodified SGLang wheel run on a machine without an accelerator.

SGLang calls the ``sglang.srt.platforms`` entry points when it first resolves its platform,
which is before it imports ``torchvision`` and ``sgl_kernel``. PyPI has CUDA builds only of
both, so on a machine without CUDA this module puts stand-ins in their place: SGLang's dense
models need nothing of them but names at import time, and one real function. On a machine with
CUDA, or where the real packages can be had, it does nothing.
"""

from __future__ import annotations

import importlib.machinery
import importlib.util
import os
import platform
import sys
from enum import Enum
from types import ModuleType
from typing import Any, NoReturn

import torch

# Names that SGLang imports from sgl_kernel on a CPU but calls only for speculative decoding,
# HiCache or AMX. They are absent here, and say so when called.
_UNSUPPORTED_KERNELS = (
    "assign_draft_cache_locs_contiguous_cpu",
    "assign_extend_cache_locs_cpu",
    "build_draft_decode_metadata_cpu",
    "build_tree_kernel_efficient_cpu",
    "copy_all_layer_kv_cache_cpu",
    "fill_accept_out_cache_loc_cpu",
    "fill_bonus_tokens_cpu",
    "rotate_input_ids_cpu",
    "verify_tree_greedy_cpu",
)


class _InterpolationMode(Enum):
    """The members of ``torchvision.transforms.InterpolationMode``, for import-time defaults."""

    NEAREST = "nearest"
    NEAREST_EXACT = "nearest-exact"
    BILINEAR = "bilinear"
    BICUBIC = "bicubic"
    BOX = "box"
    HAMMING = "hamming"
    LANCZOS = "lanczos"


def activate() -> None:
    """Entry point: prepare a machine without CUDA; always leave SGLang its own platform.

    Returns None because SGLang's own CPU platform is the right one once its imports succeed.
    """
    if not needs_cpu_engine():
        return
    os.environ["SGLANG_USE_CPU_ENGINE"] = "1"
    # Dynamo would compile small helpers for minutes; on CPU they are cheaper run eagerly.
    os.environ.setdefault("TORCHDYNAMO_DISABLE", "1")
    os.environ.setdefault("OMP_NUM_THREADS", str(os.cpu_count() or 1))
    _install_sgl_kernel()
    _install_torchvision()


def needs_cpu_engine() -> bool:
    """True when SGLang has no accelerator to run on and the CPU is one it supports."""
    if os.environ.get("SGLANG_USE_CPU_ENGINE") == "1":
        return True
    if torch.cuda.is_available() or torch.xpu.is_available() or hasattr(torch, "npu"):
        return False
    return platform.machine().lower() in ("x86_64", "amd64", "aarch64", "arm64")


def assign_req_to_token_pool_cpu(
    req_pool_indices: torch.Tensor,
    req_to_token: torch.Tensor,
    start_offset: torch.Tensor,
    end_offset: torch.Tensor,
    out_cache_loc: torch.Tensor,
    pool_len: int,
) -> None:
    """Write each request's new KV slots into its row of the request-to-token table.

    Row ``req_pool_indices[i]`` of ``req_to_token`` (shape [requests, pool_len]) receives, at
    columns ``start_offset[i]`` to ``end_offset[i]``, the next slots of the flat
    ``out_cache_loc``, in request order.
    """
    lengths = end_offset - start_offset
    rows = torch.repeat_interleave(req_pool_indices, lengths)
    first = torch.cumsum(lengths, 0) - lengths
    columns = torch.arange(rows.numel()) - torch.repeat_interleave(first - start_offset, lengths)
    req_to_token[rows.long(), columns.long()] = out_cache_loc[: rows.numel()].to(req_to_token.dtype)


def _unsupported(name: str, why: str) -> Any:
    def raise_unsupported(*_args: Any, **_kwargs: Any) -> NoReturn:
        raise NotImplementedError(f"{name} is not available on the CPU engine: {why}")

    return raise_unsupported


def _new_module(name: str, **names: Any) -> ModuleType:
    module = ModuleType(name)
    module.__spec__ = importlib.machinery.ModuleSpec(name, loader=None, is_package=True)
    module.__path__ = []
    module.__dict__.update(names)
    sys.modules[name] = module
    return module


def _is_installed(name: str) -> bool:
    return name in sys.modules or importlib.util.find_spec(name) is not None


def _install_sgl_kernel() -> None:
    if _is_installed("sgl_kernel"):
        return
    # NOTE: torch.ops.sgl_kernel.convert_weight_packed must stay undefined: its presence is how
    # SGLang detects the AMX backend.
    why = "speculative decoding, HiCache and AMX kernels need SGLang's own sgl_kernel build."
    kernels = {name: _unsupported(f"sgl_kernel.{name}", why) for name in _UNSUPPORTED_KERNELS}
    _new_module("sgl_kernel", assign_req_to_token_pool_cpu=assign_req_to_token_pool_cpu, **kernels)


def _install_torchvision() -> None:
    if _is_installed("torchvision"):
        return
    from transformers.models.auto.image_processing_auto import AutoImageProcessor
    from transformers.utils import import_utils

    # transformers caches whether torchvision is there; it must look before the stand-in exists,
    # or its image processors would try to use it. It then hides AutoImageProcessor behind an
    # error, though the class only keeps a registry, which SGLang's configs add to on import.
    import_utils.is_torchvision_available()
    # NOTE: transformers swaps its own entry of sys.modules while it is imported, so the module
    # that later importers see must be looked up there.
    sys.modules["transformers"].AutoImageProcessor = AutoImageProcessor  # type: ignore[attr-defined]
    functional = _new_module(
        "torchvision.transforms.functional", InterpolationMode=_InterpolationMode
    )
    transforms = _new_module(
        "torchvision.transforms", InterpolationMode=_InterpolationMode, functional=functional
    )
    # SGLang up to 0.5.20 imports this at its start.
    jpeg = _unsupported("torchvision.io.decode_jpeg", "images on a GPU need torchvision itself.")
    io = _new_module("torchvision.io", decode_jpeg=jpeg)
    _new_module("torchvision", transforms=transforms, io=io)
