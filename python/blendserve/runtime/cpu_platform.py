"""Lets the unmodified SGLang wheel run on a machine without an accelerator.

SGLang calls the ``sglang.srt.platforms`` entry points when it first resolves its platform,
which is before it imports ``torchvision`` and ``sgl_kernel``. PyPI has CUDA builds only of
both, so on a machine without CUDA this module puts stand-ins in their place: SGLang's dense
models need nothing of them but names at import time, and one real function. On a machine with
CUDA it does nothing. Real packages that can be imported are left in place; SGLang's CUDA build of
sgl_kernel cannot without NVIDIA's driver. Models that read images need the real torchvision, which
can be imported once its operators are declared (`cpu_media`).
"""

from __future__ import annotations

import gc
import importlib
import importlib.machinery
import importlib.util
import logging
import os
import platform
import sys
from collections.abc import Iterable, Sequence
from enum import Enum
from importlib.abc import MetaPathFinder
from importlib.machinery import ModuleSpec, PathFinder
from importlib.metadata import Distribution, DistributionFinder, MetadataPathFinder
from pathlib import Path
from types import ModuleType
from typing import Any, NoReturn

import torch

from blendserve.runtime.cpu_media import declare_sglang_operators, declare_torchvision_operators

logger = logging.getLogger(__name__)

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

# How often an OpenMP thread looks for work before it sleeps: some ten microseconds, longer than the
# pause between two operators. GNU's default is three hundred times that, which is a time slice of
# the system: another process on the same cores gets hardly any of them.
_SPINS = 1000

# Objects made before young ones are looked through for garbage. SGLang's imports make a million
# that stay; with Python's 700 a sixth of each process's start goes into looking.
_YOUNG_OBJECTS = 50_000


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
    gc.set_threshold(_YOUNG_OBJECTS)
    os.environ["SGLANG_USE_CPU_ENGINE"] = "1"
    # Dynamo would compile small helpers for minutes; on CPU they are cheaper run eagerly.
    os.environ.setdefault("TORCHDYNAMO_DISABLE", "1")
    os.environ.setdefault("OMP_NUM_THREADS", str(os.cpu_count() or 1))
    if "OMP_WAIT_POLICY" not in os.environ:
        # Read by the processes that SGLang spawns, when they load OpenMP.
        os.environ.setdefault("GOMP_SPINCOUNT", str(_SPINS))
    _install_sgl_kernel()
    _install_torchvision()


def needs_cpu_engine() -> bool:
    """True when SGLang has no accelerator to run on and the CPU is one it supports."""
    if os.environ.get("SGLANG_USE_CPU_ENGINE") == "1":
        return True
    if torch.cuda.is_available() or torch.xpu.is_available() or hasattr(torch, "npu"):
        return False
    return platform.machine().lower() in ("x86_64", "amd64", "aarch64", "arm64")


def best_dtype() -> str:
    """Element type of the model that this processor computes fastest.

    bfloat16 where the processor multiplies it itself (AVX512-BF16 or AMX), which takes half the
    memory traffic and is more than twice as fast. Elsewhere torch would convert each weight.
    """
    units = (torch.cpu._is_avx512_bf16_supported, torch.cpu._is_amx_tile_supported)
    return "bfloat16" if any(has_unit() for has_unit in units) else "float32"


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


def _can_be_imported(name: str) -> bool:
    try:
        importlib.import_module(name)
    except (ImportError, OSError) as error:
        logger.info("%s is installed but cannot be imported here: %s", name, error)
        for module in [m for m in sys.modules if m == name or m.startswith(f"{name}.")]:
            del sys.modules[module]
        return False
    return True


def _install_sgl_kernel() -> None:
    if _is_installed("sgl_kernel") and _can_be_imported("sgl_kernel"):
        return
    # NOTE: torch.ops.sgl_kernel.convert_weight_packed must stay undefined: its presence is how
    # SGLang detects the AMX backend.
    why = "speculative decoding, HiCache and AMX kernels need SGLang's own sgl_kernel build."
    kernels = {name: _unsupported(f"sgl_kernel.{name}", why) for name in _UNSUPPORTED_KERNELS}
    _new_module("sgl_kernel", assign_req_to_token_pool_cpu=assign_req_to_token_pool_cpu, **kernels)
    declare_sglang_operators()


class _TorchvisionApart(MetaPathFinder):
    """Finds torchvision in the folder where `make setup` puts its build for CUDA.

    Until its operators are declared, nothing that imports transformers starts beside it. So the
    folder is not on `sys.path`, which child processes inherit.
    """

    def __init__(self, folder: str) -> None:
        self._path = [folder]

    def find_spec(
        self, name: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        return PathFinder.find_spec(name, self._path) if name == "torchvision" else None

    def find_distributions(
        self, context: DistributionFinder.Context | None = None
    ) -> Iterable[Distribution]:
        """Transformers asks for the version."""
        name = context.name if context is not None else None
        wanted = DistributionFinder.Context(name=name, path=self._path)
        return MetadataPathFinder.find_distributions(wanted)


def _install_torchvision() -> None:
    apart = Path(sys.prefix) / "torchvision"
    if not _is_installed("torchvision") and (apart / "torchvision").is_dir():
        sys.meta_path.append(_TorchvisionApart(str(apart)))
    if _is_installed("torchvision"):
        if "torchvision" not in sys.modules:
            declare_torchvision_operators()
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
