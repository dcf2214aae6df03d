"""The Triton kernels compile for GPUs, which needs none, only Triton's compiler; some of what is
tried there, all of it in `make test-candidates`."""

from __future__ import annotations

import itertools
import json
from pathlib import Path

import pytest

pytest.importorskip("triton.backends.nvidia")

import triton
from candidate_resources import SHAPES, SHARED_LIMIT, Resources, resources
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


compiled = pytest.mark.skipif(kernels.INTERPRETED, reason="the interpreter replaces the compiler")


@compiled
@pytest.mark.parametrize(
    ("kind", "head_dim", "arch", "number"),
    [
        ("decode_only", 128, 90, 0),
        ("decode_only", 256, 80, 0),
        ("blended", 128, 80, 0),
    ],
)
def test_a_candidate_fits_spills_little_and_pipelines(
    kind: str, head_dim: int, arch: int, number: int
) -> None:
    found = resources(kind, head_dim, arch, kernels.candidates(kind, head_dim)[number])
    assert found.faults() == []


@compiled
@pytest.mark.parametrize(("capability", "element"), [(80, "bf16"), (90, "fp16")])
def test_the_merge_compiles(capability: int, element: str) -> None:
    compile_kernel(kernels.merge, element, capability, HEADS=32, HEAD_DIM=128, WIDTH=128)


def last_compiled() -> list[Resources]:
    log = Path(__file__).parents[1] / "logs" / "candidates.json"
    return [Resources(**row) for row in json.loads(log.read_text())]


def test_every_candidate_has_been_compiled_for_every_architecture() -> None:
    """The log of `make test-candidates` is of these candidates: write it anew after a change."""
    found = [
        (r.kernel, r.head_dim, r.arch, r.few_tile, r.many_tile, r.warps, r.stages)
        for r in last_compiled()
    ]
    assert found == [
        (kind, dim, arch, c.kwargs["FEW_TILE"], c.kwargs["MANY_TILE"], c.num_warps, c.num_stages)
        for kind, dim, arch in itertools.product(kernels.KINDS, SHAPES, SHARED_LIMIT)
        for c in kernels.candidates(kind, dim)
    ]


def test_none_of_them_exceeds_its_architecture_or_spills_over_a_kilobyte() -> None:
    assert [row for row in last_compiled() if row.faults() or row.ctas < 1] == []


def test_more_stages_of_a_decode_kernel_hold_more_tiles() -> None:
    """Triton may take a number of stages and keep one buffer all the same."""
    held: dict[tuple[int, ...], dict[int, int]] = {}
    for row in last_compiled():
        if row.kernel == "decode_only":
            tile = (row.head_dim, row.arch, row.few_tile, row.warps)
            held.setdefault(tile, {})[row.stages] = row.shared
    several = [stages for stages in held.values() if len(stages) > 1]
    assert several
    for stages in several:
        shared = [stages[count] for count in sorted(stages)]
        assert all(fewer < more for fewer, more in itertools.pairwise(shared))


def test_few_candidates_are_tried_and_none_twice() -> None:
    for kind in kernels.KINDS:
        for head_dim in (64, 128, 256):
            tried = [(c.kwargs, c.num_warps, c.num_stages) for c in
                     kernels.candidates(kind, head_dim)]  # fmt: skip
            assert 1 <= len(tried) <= 4
            assert all(tried.count(one) == 1 for one in tried)


@compiled
def test_only_the_candidates_of_a_head_size_are_compiled(monkeypatch: pytest.MonkeyPatch) -> None:
    prune = kernels.blended.early_config_prune
    for head_dim in (128, 256):
        found = prune(kernels.blended.configs, {}, HEAD_DIM=head_dim)
        assert [c.kwargs for c in found] == [
            c.kwargs for c in kernels.candidates("blended", head_dim)
        ]
    monkeypatch.setattr(kernels, "TUNES", False)
    assert len(prune(kernels.blended.configs, {}, HEAD_DIM=128)) == 1
