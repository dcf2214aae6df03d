"""The prefix tree against brute-force recomputation."""

from itertools import pairwise

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from planner_workloads import prompts, shared_tokens

from blendserve.planner import PrefixTree


@given(prompts)
def test_leaves_are_sorted_by_content_and_shared_counts_the_common_prefix(ids):
    tree = PrefixTree.build(ids)
    in_order = [ids[r] for r in tree.requests]
    assert [p.tolist() for p in in_order] == sorted(p.tolist() for p in ids)
    assert sorted(tree.requests.tolist()) == list(range(len(ids)))
    assert tree.length.tolist() == [len(p) for p in in_order]
    assert tree.shared[1:].tolist() == [shared_tokens(a, b) for a, b in pairwise(in_order)]


@given(prompts)
def test_unique_tokens_are_the_distinct_prefixes(ids):
    tree = PrefixTree.build(ids)
    distinct = {tuple(p[:k].tolist()) for p in ids for k in range(1, len(p) + 1)}
    assert tree.prompt_tokens == sum(len(p) for p in ids)
    assert tree.unique_tokens == len(distinct)
    edges = (tree.length - tree.depth[tree.leaf_parent]).sum()
    edges += (tree.depth[1:] - tree.depth[tree.parent[1:]]).sum()
    assert edges == len(distinct)
    if tree.prompt_tokens:
        assert tree.sharing_ratio == pytest.approx(1 - len(distinct) / tree.prompt_tokens)


@given(prompts)
def test_inner_nodes_are_exactly_the_branching_prefixes(ids):
    tree = PrefixTree.build(ids)
    n = len(ids)
    in_order = [ids[r].tolist() for r in tree.requests]
    expected = {(0, 0, n)}
    for a in range(n):
        for b in range(a + 1, n):
            common = shared_tokens(np.array(in_order[a]), np.array(in_order[b]))
            prefix = in_order[a][:common]
            below = [k for k in range(n) if in_order[k][:common] == prefix]
            expected.add((common, below[0], below[-1] + 1))
    found = set(zip(tree.depth.tolist(), tree.first.tolist(), tree.end.tolist(), strict=True))
    assert found == expected
    assert len(found) == tree.num_nodes
    for node in range(1, tree.num_nodes):
        above = tree.parent[node]
        assert above < node
        assert tree.depth[above] < tree.depth[node]
        assert tree.first[above] <= tree.first[node] < tree.end[node] <= tree.end[above]
        assert tree.level[node] == tree.level[above] + 1
    for leaf in range(n):
        holders = [i for i in range(tree.num_nodes) if tree.first[i] <= leaf < tree.end[i]]
        assert tree.leaf_parent[leaf] == max(holders, key=lambda i: tree.depth[i])


@given(prompts, st.randoms(use_true_random=False))
def test_subtree_sums_equal_sums_over_the_range(ids, random):
    tree = PrefixTree.build(ids)
    values = np.array([random.uniform(0, 1e9) for _ in ids])
    total = tree.subtree_sum(values)
    for node in range(tree.num_nodes):
        assert total[node] == pytest.approx(values[tree.first[node] : tree.end[node]].sum())


@given(prompts, st.data())
def test_subset_equals_a_tree_built_from_the_subset(ids, data):
    tree = PrefixTree.build(ids)
    keep = np.array(data.draw(st.lists(st.booleans(), min_size=len(ids), max_size=len(ids))), bool)
    part = tree.subset(keep)
    fresh = PrefixTree.build([ids[r] for r in tree.requests[keep]])
    assert part.requests.tolist() == tree.requests[keep].tolist()
    for name in ("length", "shared", "parent", "depth", "first", "end", "leaf_parent", "level"):
        assert getattr(part, name).tolist() == getattr(fresh, name).tolist(), name


def test_identical_prompts_are_ordered_by_the_tie_keys():
    ids = [np.array([5, 6], dtype=np.int32)] * 4
    tree = PrefixTree.build(ids, tie_keys=([3, 1, 2, 1], [0, 9, 0, 4]))
    assert tree.requests.tolist() == [3, 1, 2, 0]
    assert tree.unique_tokens == 2


def test_large_ids_sort_as_numbers():
    ids = [np.array([i], dtype=np.int32) for i in (256, 1, 2**31 - 1, 255, 65_536)]
    tree = PrefixTree.build(ids)
    assert tree.requests.tolist() == [1, 3, 0, 4, 2]


def test_a_prompt_inside_a_prompt_inside_a_prompt():
    """A chain as deep as the job is long must not need recursion."""
    ids = [np.zeros(k, dtype=np.int32) for k in range(3_000)]
    tree = PrefixTree.build(ids)
    assert tree.unique_tokens == 2_999
    assert tree.level.max() > 2_900


@pytest.mark.parametrize("bad", [np.array([-1]), np.array([[1]]), np.array([1.5])])
def test_prompts_that_are_not_token_ids_are_refused(bad):
    with pytest.raises(ValueError, match="prompt 1"):
        PrefixTree.build([np.array([1], dtype=np.int32), bad])


def test_an_empty_job_has_a_root_and_nothing_else():
    tree = PrefixTree.build([])
    assert (tree.num_leaves, tree.num_nodes, tree.sharing_ratio) == (0, 1, 0.0)
