"""The reference itself, against torch's attention where torch has one."""

from __future__ import annotations

import pytest
import torch
from kernel_cases import make_case

from sgl_kernel_ext import reference
from sgl_kernel_ext.batch import AttentionShape, PagedBatch


def test_a_chunk_after_a_cached_prefix_is_the_end_of_full_causal_attention() -> None:
    shape = AttentionShape(heads=6, kv_heads=2, head_dim=16, scale=0.25)
    case = make_case(0, shape=shape, kv_lens=[40], query_lens=[13])
    slots = case.slot_table[int(case.batch.table_rows[0]), :40].long()
    key, value = (pool[slots].double().movedim(0, 1) for pool in (case.key_pool, case.value_pool))
    query = torch.zeros(6, 40, 16, dtype=torch.float64)
    query[:, 27:] = case.query.double().movedim(0, 1)
    expected = torch.nn.functional.scaled_dot_product_attention(
        query, key, value, is_causal=True, scale=0.25, enable_gqa=True
    )[:, 27:].movedim(0, 1)
    actual = reference.attention(
        case.query, case.key_pool, case.value_pool, case.slot_table, case.batch, shape
    )
    torch.testing.assert_close(actual, expected)


def test_a_window_of_zero_sees_only_itself() -> None:
    shape = AttentionShape(heads=2, kv_heads=1, head_dim=16, scale=1.0, window=0)
    case = make_case(1, shape=shape, kv_lens=[9], query_lens=[3])
    slots = case.slot_table[int(case.batch.table_rows[0]), 6:9].long()
    actual = reference.attention(
        case.query, case.key_pool, case.value_pool, case.slot_table, case.batch, shape
    )
    torch.testing.assert_close(actual, case.value_pool[slots].double().expand(3, 2, 16))


def test_a_soft_cap_bounds_the_scores() -> None:
    capped = AttentionShape(heads=1, kv_heads=1, head_dim=16, scale=1e6, soft_cap=1e-9)
    case = make_case(2, shape=capped, kv_lens=[5], query_lens=[1])
    slots = case.slot_table[int(case.batch.table_rows[0]), :5].long()
    actual = reference.attention(
        case.query, case.key_pool, case.value_pool, case.slot_table, case.batch, capped
    )
    # With scores that hardly differ, attention is the mean of the values.
    torch.testing.assert_close(actual[0], case.value_pool[slots].double().mean(0))


def test_an_unwritten_output_counts_as_infinitely_wrong() -> None:
    assert not reference.relative_error(torch.tensor([float("nan"), 1.0]), torch.ones(2)) < 1


@pytest.mark.parametrize(("kv_len", "query_len"), [(3, -1), (3, 4)])
def test_impossible_lengths_are_refused(kv_len: int, query_len: int) -> None:
    with pytest.raises(ValueError, match="request 1 of the batch"):
        PagedBatch.of([0, 1], [5, kv_len], [1, query_len])
