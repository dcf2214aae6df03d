"""The C++ kernels against the float64 reference."""

from __future__ import annotations

import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from kernel_cases import Case, case_with_empty_prompts, make_case, random_case

from sgl_kernel_ext import cpu, reference
from sgl_kernel_ext.batch import AttentionShape
from sgl_kernel_ext.plan import make_plan

pytestmark = pytest.mark.skipif(
    cpu.unavailable_reason() is not None, reason=str(cpu.unavailable_reason())
)

SHAPES = 320
BATCHES = 16


def error(case: Case, threads: int = 2, share: bool = True) -> float:
    plan = make_plan(case.batch, case.shape, cpu.TILING, threads, case.lookup if share else None)
    tensors = (case.query, case.key_pool, case.value_pool, case.slot_table)
    output = case.poisoned_output()
    cpu.run(plan, case.shape, *tensors, output, threads=2)
    expected = reference.attention(*tensors, case.batch, case.shape)
    return reference.relative_error(output, expected)


@pytest.mark.parametrize("first", range(0, SHAPES, SHAPES // BATCHES))
def test_random_batches_equal_the_reference(first: int) -> None:
    for seed in range(first, first + SHAPES // BATCHES):
        # Many planned threads cut small batches as a large machine would.
        threads = (1, 2, 16)[seed % 3]
        assert error(random_case(seed), threads, share=seed % 4 > 0) < 1e-5, seed


@pytest.mark.parametrize("query_lens", [[0, 1, 5], [1, 0, 0, 1], [9, 0]])
def test_an_empty_prompt_costs_nobody_anything(query_lens: list[int]) -> None:
    assert error(case_with_empty_prompts(1, query_lens)) < 1e-5


def test_a_step_of_empty_prompts_has_nothing_to_do() -> None:
    case = case_with_empty_prompts(2, [0, 0])
    plan = make_plan(case.batch, case.shape, cpu.TILING, 2, case.lookup)
    assert (len(plan.items), plan.partial_count) == (0, 0)
    tensors = (case.query, case.key_pool, case.value_pool, case.slot_table)
    cpu.run(plan, case.shape, *tensors, case.poisoned_output(), threads=2)


def test_bfloat16_stays_within_its_precision() -> None:
    for seed in range(20):
        case = random_case(seed)
        case = replace(
            case,
            query=case.query.bfloat16(),
            key_pool=case.key_pool.bfloat16(),
            value_pool=case.value_pool.bfloat16(),
        )
        assert error(case) < 2e-2, seed


@pytest.mark.parametrize("isa", ["avx512", "avx2", "baseline"])
def test_older_instruction_sets_compute_the_same(isa: str) -> None:
    program = (
        "from kernel_cases import random_case\n"
        "from test_cpu_kernels import cpu, error\n"
        f"assert cpu.INSTRUCTION_SETS.index(cpu.instruction_set()) >= "
        f"cpu.INSTRUCTION_SETS.index({isa!r})\n"
        "assert all(error(random_case(s), 2) < 1e-5 for s in range(15))\n"
    )
    subprocess.run(
        [sys.executable, "-c", program],
        env={**os.environ, "SGL_KERNEL_EXT_ISA": isa},
        cwd=Path(__file__).parent,
        check=True,
        timeout=120,
    )


def test_matrix_products_of_torch_in_between_come_to_no_harm() -> None:
    """oneDNN's bfloat16 products use the same tile registers, and set them up in their own way."""
    left, right = torch.randn(2, 256, 256, generator=torch.Generator().manual_seed(0)).bfloat16()
    expected = left @ right
    for seed in range(5):
        assert error(random_case(seed)) < 1e-5
        assert torch.equal(left @ right, expected)


def test_very_large_and_very_small_scores_do_not_overflow() -> None:
    shape = AttentionShape(heads=3, kv_heads=1, head_dim=64, scale=1.0)
    for factor in (1e-20, 1e3):
        case = make_case(3, shape=shape, kv_lens=[300, 70], query_lens=[1, 50], shared=[64, 64])
        case = replace(case, query=case.query * factor)
        assert error(case) < 1e-5


def test_one_group_of_all_requests_reads_its_prefix_once() -> None:
    """The bar: at most 1.15 times one prefix and the suffixes."""
    shape = AttentionShape(heads=9, kv_heads=3, head_dim=64, scale=0.125)
    prefix, suffix, requests = 4096, 128, 64
    case = make_case(
        4,
        shape=shape,
        kv_lens=[prefix + suffix] * requests,
        query_lens=[1] * requests,
        shared=[prefix] * requests,
    )
    plan = make_plan(case.batch, shape, cpu.TILING, 2, case.lookup)
    ideal = (prefix + requests * suffix) * 2 * shape.kv_heads * shape.head_dim * 4
    assert plan.read_bytes(shape, 4) <= 1.15 * ideal
    apart = make_plan(case.batch, shape, cpu.TILING, 2, None)
    assert apart.read_bytes(shape, 4) > 20 * ideal


def test_a_plan_covers_every_visible_position_of_every_query_once() -> None:
    for seed in range(40):
        case = random_case(seed)
        plan = make_plan(case.batch, case.shape, cpu.TILING, 8, case.lookup)
        tokens = int(case.batch.query_lens.sum())
        seen = np.zeros((tokens, case.shape.kv_heads), dtype=np.int64)
        for _, begin, end, kv_head, first_row, end_row in plan.items.tolist():
            for query, visible, _ in plan.rows[first_row:end_row].tolist():
                low = max(begin, visible - 1 - case.shape.window if case.shape.window >= 0 else 0)
                heads = slice(None) if kv_head < 0 else kv_head
                seen[query, heads] += max(min(end, visible) - low, 0)
        visible = np.concatenate(
            [
                np.arange(k - q, k) + 1
                for k, q in zip(case.batch.kv_lens, case.batch.query_lens, strict=True)
            ]
        )
        if case.shape.window >= 0:
            visible = np.minimum(visible, case.shape.window + 1)
        assert (seen == visible[:, None]).all(), seed


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"query": torch.zeros(1, 3, 64, dtype=torch.float16)}, "float32"),
        ({"query": torch.zeros(1, 3, 32)}, "query and output must be"),
        ({"slot_table": torch.zeros(1, 9, dtype=torch.int64)}, "int32"),
        ({"key_pool": torch.zeros(9, 2, 64)}, "the KV pools must be"),
        ({"value_pool": torch.zeros(11, 1, 128)[..., ::2]}, "must be contiguous"),
    ],
)
def test_a_tensor_of_the_wrong_form_is_named(change: dict[str, torch.Tensor], message: str) -> None:
    shape = AttentionShape(heads=3, kv_heads=1, head_dim=64, scale=1.0)
    case = make_case(5, shape=shape, kv_lens=[8], query_lens=[1])
    changed = replace(case, **change)
    plan = make_plan(case.batch, shape, cpu.TILING, 1)
    with pytest.raises(ValueError, match=message):
        cpu.run(
            plan,
            shape,
            changed.query,
            changed.key_pool,
            changed.value_pool,
            changed.slot_table,
            changed.poisoned_output(),
        )
