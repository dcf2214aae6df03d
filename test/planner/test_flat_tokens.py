"""Prompts in one array: a sequence of views, sorted in place of the list they stand for."""

import tracemalloc
from itertools import pairwise

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from planner_workloads import LLAMA_ON_A100, mixed_job, prompts, shared_tokens

from blendserve.planner import FlatTokens, Job, PrefixTree, make_plan
from blendserve.planner import prefix_sort as sorting


def flat(job: Job) -> Job:
    tokens = np.concatenate([np.empty(0, dtype=np.int32), *job.token_ids])
    offsets = np.cumsum([0, *map(len, job.token_ids)])
    return Job.from_flat(tokens, offsets, job.max_output_tokens, job.known_output_tokens)


@given(prompts)
def test_it_reads_like_the_list_of_prompts(ids):
    held = FlatTokens.of(ids)
    assert len(held) == len(ids)
    assert [p.tolist() for p in held] == [p.tolist() for p in ids]
    assert [p.tolist() for p in held[::-2]] == [p.tolist() for p in ids[::-2]]
    if ids:
        assert held[-1].tolist() == ids[-1].tolist()
        assert all(view.base is not None for view in held)
    with pytest.raises(IndexError):
        held[len(ids)]


@given(prompts, st.sampled_from([1, 2, 3, 64]), st.sampled_from([1, 2, 8]), st.sampled_from([1, 5]))
def test_the_sort_is_stable_and_exact_for_every_width(ids, skip, width, batch):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sorting, "SKIP_TOKENS", skip)
        patch.setattr(sorting, "SORT_TOKENS", width)
        patch.setattr(sorting, "BATCH_REQUESTS", batch)
        start = np.arange(len(ids))[::-1]
        order, shared = sorting.sort_prompts(FlatTokens.of(ids), start)
    expected = sorted(start.tolist(), key=lambda r: ids[r].tolist())
    assert order.tolist() == expected
    pairs = pairwise(expected)
    assert shared[1:].tolist() == [shared_tokens(ids[a], ids[b]) for a, b in pairs]


def test_a_flat_job_has_the_plan_of_the_listed_one():
    job = mixed_job(600)
    listed, from_flat = make_plan(job, LLAMA_ON_A100), make_plan(flat(job), LLAMA_ON_A100)
    assert listed.order.tolist() == from_flat.order.tolist()
    assert listed.density.tolist() == from_flat.density.tolist()


def test_a_tree_of_flat_tokens_takes_no_copy_of_them():
    rng = np.random.default_rng(0)
    prefix = rng.integers(0, 9, 4_000).astype(np.int32)
    held = FlatTokens.of([np.append(prefix, np.int32(k)) for k in range(1_000)])
    tracemalloc.start()
    PrefixTree.build(held)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 0.2 * held.tokens.nbytes


@pytest.mark.parametrize(
    ("tokens", "offsets", "message"),
    [
        ([1, -2], [0, 1, 2], "prompt 1 holds a token id outside"),
        ([1, 2**31], [0, 1, 2], "prompt 1 holds a token id outside"),
        ([1.5], [0, 1], "integer token ids"),
        ([1, 2], [0, 1], "run from 0 to 2"),
        ([1, 2], [0, 2, 1, 2], "must not decrease"),
        ([], [], "run from 0 to 0"),
    ],
)
def test_arrays_that_are_no_prompts_are_refused(tokens, offsets, message):
    with pytest.raises(ValueError, match=message):
        Job.from_flat(np.array(tokens), np.array(offsets), np.ones(max(len(offsets) - 1, 0)))
