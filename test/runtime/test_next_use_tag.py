"""The future of a request's prefixes survives the way to the cache, and nothing else gets in."""

from __future__ import annotations

import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from blendserve.planner import NextUse, Side
from blendserve.runtime.next_use import UseTag

counts = st.integers(0, 2**40)
tags = st.builds(
    lambda job, side, due, since, prefixes, users: UseTag(
        job,
        side,
        due,
        since,
        tuple(
            NextUse(prefix, *user) for prefix, user in zip(sorted(prefixes), users, strict=False)
        ),
    ),
    st.text(max_size=8),
    st.sampled_from(Side),
    counts,
    counts,
    st.sets(st.integers(1, 2**20), max_size=5),
    st.lists(st.tuples(counts, st.sampled_from(Side)), min_size=5, max_size=5),
)
PARAMS = {
    "blendserve_job": "batch_1",
    "blendserve_side": "left",
    "blendserve_due": 7,
    "blendserve_since": 3,
    "blendserve_next_uses": "16:L:9 40:R:12",
}


@given(tags)
def test_a_tag_comes_back_from_json_as_it_was(tag):
    params = {"blendserve_side": tag.side.value, **tag.to_params()}
    assert all(isinstance(value, str | int) for value in params.values())
    assert UseTag.from_params(json.loads(json.dumps(params))) == tag


def test_a_tag_reads_as_documented():
    uses = (NextUse(16, 9, Side.LEFT), NextUse(40, 12, Side.RIGHT))
    assert UseTag.from_params(PARAMS) == UseTag("batch_1", Side.LEFT, 7, 3, uses)


@pytest.mark.parametrize("params", [None, {}, {"temperature": 1}])
def test_a_request_without_a_plan_has_no_tag(params):
    assert UseTag.from_params(params) is None


@pytest.mark.parametrize(
    "changed",
    [
        {"blendserve_side": "middle"},
        {"blendserve_due": "soon"},
        {"blendserve_since": None},
        {"blendserve_next_uses": "16:9"},
        {"blendserve_next_uses": "16:X:9"},
        {"blendserve_next_uses": "40:L:9 16:L:12"},
        {"blendserve_next_uses": "0:L:9"},
        {"blendserve_next_uses": 5},
    ],
)
def test_what_a_client_made_up_is_no_tag(changed):
    assert UseTag.from_params({**PARAMS, **changed}) is None
