"""What SGLang's vision-language models need on a machine without an accelerator.

PyPI has CUDA builds only of torchvision. Their C++ library does not load beside a CPU build of
PyTorch, and then the package cannot be imported: it registers code for operators that nobody has
declared. What processors of images and videos use of it is Python, so the operators' names are
declared here. The same goes for four names of SGLang's that some of its models look up.
"""

from __future__ import annotations

import importlib.util
from pathlib import Path

import torch

# What torchvision 0.15 to 0.28 registers Python code for.
_TORCHVISION_OPERATORS = (
    *("nms", "qnms", "roi_align", "_roi_align_backward", "roi_pool", "_roi_pool_backward"),
    *("ps_roi_align", "_ps_roi_align_backward", "ps_roi_pool", "_ps_roi_pool_backward"),
    *("deform_conv2d", "_deform_conv2d_backward", "qroi_align"),
)
# What models that share a module with Qwen's vision models look up when they are imported, and call
# on processors with AMX only.
_SGLANG_OPERATORS = (
    "fused_sigmoid_mul_cpu",
    "fused_qk_gemma_rmsnorm_cpu",
    "fused_qk_gemma_rmsnorm_with_gate_cpu",
    "fused_qkvzba_split_reshape_cat_contiguous_cpu",
)

# An operator lives as long as the library that declared it.
_libraries: list[torch.library.Library] = []


def declare_torchvision_operators() -> None:
    """Make an installed torchvision importable. Does nothing where its C++ library loads."""
    if hasattr(torch.ops.torchvision, _TORCHVISION_OPERATORS[0]) or _loads_its_library():
        return
    _declare("torchvision", "DEF", _TORCHVISION_OPERATORS)


def declare_sglang_operators() -> None:
    """Make those of SGLang's modules importable that look up kernels of its own CPU build."""
    missing = [name for name in _SGLANG_OPERATORS if not hasattr(torch.ops.sgl_kernel, name)]
    _declare("sgl_kernel", "FRAGMENT", missing)


def _loads_its_library() -> bool:
    spec = importlib.util.find_spec("torchvision")
    folders = spec.submodule_search_locations if spec is not None else None
    for path in (path for folder in folders or () for path in Path(folder).glob("_C*.so")):
        try:
            torch.ops.load_library(path)  # type: ignore[no-untyped-call]
        except OSError:
            continue
        return True
    return False


def _declare(namespace: str, kind: str, names: tuple[str, ...] | list[str]) -> None:
    library = torch.library.Library(namespace, kind)  # type: ignore[no-untyped-call]
    for name in names:
        library.define(f"{name}(Tensor x) -> Tensor")  # type: ignore[no-untyped-call]
    _libraries.append(library)
