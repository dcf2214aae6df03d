"""The Triton kernels compile for Ampere and Hopper, which needs no GPU, only Triton's compiler."""

from __future__ import annotations

import pytest

pytest.importorskip("triton.backends.nvidia")

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from sgl_kernel_ext.gpu import kernels

INTEGERS = dict.fromkeys(("query_stride", "slot_stride", "window"), "i32")
FLOATS = dict.fromkeys(("scale", "soft_cap"), "fp32")
TABLES = dict.fromkeys(("items", "rows", "slots", "merged_query", "merge_begin"), "*i32")
RESULTS = dict.fromkeys(("partials", "partial_stats"), "*fp32")


def compile_kernel(
    function: triton.JITFunction, element: str, capability: int, **constants: object
) -> None:
    tensors = dict.fromkeys(("query", "key_pool", "value_pool", "output"), f"*{element}")
    known = {**INTEGERS, **FLOATS, **TABLES, **RESULTS, **tensors}
    signature = {name: known.get(name, "constexpr") for name in function.arg_names}
    triton.compile(
        ASTSource(
            function, signature, {(function.arg_names.index(k),): v for k, v in constants.items()}
        ),
        target=GPUTarget("cuda", capability, 32),
        options={"num_warps": 4, "num_stages": 2},
    )


@pytest.mark.skipif(kernels.INTERPRETED, reason="the interpreter replaces the compiler")
@pytest.mark.parametrize(
    ("capability", "element", "head_dim"),
    [(80, "bf16", 64), (90, "bf16", 128), (90, "fp16", 256)],
)
def test_the_kernels_compile(capability: int, element: str, head_dim: int) -> None:
    shape = {"HEADS": 32, "HEAD_DIM": head_dim, "WIDTH": head_dim}
    compile_kernel(
        kernels.blended.fn,
        element,
        capability,
        KV_HEADS=8,
        UPCAST=False,
        HAS_FEW=True,
        HAS_MANY=True,
        MANY_ROWS=64 if head_dim > 128 else 128,
        FEW_TILE=64,
        MANY_TILE=32 if head_dim > 128 else 64,
        **shape,
    )
    compile_kernel(kernels.merge, element, capability, **shape)
