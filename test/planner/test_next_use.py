"""When a prefix is needed again: each request's staircase against a search through all pairs."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from planner_workloads import LLAMA_ON_A100, jobs, mixed_job, prompts, shared_tokens

from blendserve.planner import (
    PrefixTree,
    Side,
    dual_scan_sequence,
    make_plan,
    make_timetable,
    next_uses,
)


def searched(sequence: list[np.ndarray]) -> list[list[tuple[int, int]]]:
    """For each prompt: a corner wherever a later one shares more than all before it did."""
    corners = []
    for j, prompt in enumerate(sequence):
        longest, found = 0, []
        for later in range(j + 1, len(sequence)):
            shared = shared_tokens(prompt, sequence[later])
            if shared > longest:
                longest = shared
                found.append((shared, later))
        corners.append(found)
    return corners


def staircases(tree: PrefixTree, leaves: np.ndarray) -> list[list[tuple[int, int]]]:
    uses = next_uses(tree, leaves)
    pairs = list(zip(uses.prefix_tokens.tolist(), uses.user.tolist(), strict=True))
    return [
        pairs[first:end]
        for first, end in zip(uses.offsets[:-1].tolist(), uses.offsets[1:].tolist(), strict=True)
    ]


@given(prompts, st.data())
def test_next_uses_are_those_that_a_search_finds(ids, data):
    """In any order, of any part of the tree's requests."""
    tree = PrefixTree.build(ids)
    leaves = data.draw(st.permutations(range(len(ids))))[: data.draw(st.integers(0, len(ids)))]
    sequence = [ids[tree.requests[leaf]] for leaf in leaves]
    assert staircases(tree, np.array(leaves, dtype=np.int64)) == searched(sequence)


def test_a_chain_of_nested_prompts_costs_a_few_corners_each():
    """Each prompt continues the one before: paths are up to n nodes long, staircases are not."""
    n = 3000
    length = np.arange(1, n + 1)
    tree = PrefixTree.from_lcp(np.arange(n), length, length - 1)
    assert tree.num_nodes == n
    rng = np.random.default_rng(0)
    forward = next_uses(tree, np.arange(n))
    assert forward.user.tolist() == list(range(1, n))
    assert forward.prefix_tokens.tolist() == list(range(1, n))
    assert len(next_uses(tree, rng.permutation(n)).user) < 3 * n


@given(jobs(), st.integers(0, 5), st.integers(0, 1000))
def test_a_timetable_numbers_the_sample_first_and_then_both_fronts(job, sampled, first_due):
    plan = make_plan(job, LLAMA_ON_A100)
    sample = plan.order[:: max(len(plan.order) // (sampled + 1), 1)][:sampled]
    timetable = make_timetable(plan, sample, first_due)
    order, left = dual_scan_sequence(plan)
    rest = [(int(r), bool(side)) for r, side in zip(order, left, strict=True) if r not in sample]
    assert timetable.order.tolist() == [*sample.tolist(), *(request for request, _ in rest)]
    assert timetable.left.tolist()[len(sample) :] == [side for _, side in rest]
    assert timetable.due_after(np.arange(len(job))) == first_due + len(job)
    sequence = [job.token_ids[request] for request in timetable.order]
    for index, (request, corners) in enumerate(
        zip(timetable.order.tolist(), searched(sequence), strict=True)
    ):
        assert timetable.due(request) == first_due + index
        assert [
            (use.prefix_tokens, use.due, use.side is Side.LEFT)
            for use in timetable.next_uses(request)
        ] == [(prefix, first_due + user, timetable.left[user]) for prefix, user in corners]


def test_a_sampled_request_keeps_the_side_of_its_density():
    plan = make_plan(mixed_job(400), LLAMA_ON_A100)
    ends = plan.order[[0, -1]]
    assert make_timetable(plan, ends).left[:2].tolist() == [True, False]


def test_the_next_timetable_goes_on_behind_the_latest_request_that_was_sent():
    plan = make_plan(mixed_job(20), LLAMA_ON_A100)
    timetable = make_timetable(plan, first_due=100)
    sent = timetable.order[[7, 2]]
    assert timetable.due_after(sent) == 108
    assert timetable.due_after(sent[:0]) == 100


def test_a_request_that_is_not_planned_has_no_due():
    job = mixed_job(20)
    plan = make_plan(job, LLAMA_ON_A100, exclude=[3])
    with pytest.raises(KeyError):
        make_timetable(plan).due(3)
