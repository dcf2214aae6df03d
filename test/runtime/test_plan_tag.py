"""The plan tag survives its way through a request, and no client's data is mistaken for one."""

from __future__ import annotations

import json
import math

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from blendserve.planner import Side
from blendserve.runtime.plan_tag import LengthUpdate, PlanTag

quick = settings(deadline=None, database=None)

TAG = PlanTag(Side.LEFT, rank=3, density=2.5, output_tokens=40.0)

# The tag's densities stop where anything is compute-bound; see the test of infinities.
densities = st.floats(0, 1e12, exclude_max=True)
likely = st.lists(st.integers(0, 10**5).map(float), max_size=8).map(sorted).map(tuple)
tags = st.builds(
    PlanTag,
    side=st.sampled_from(Side),
    rank=st.integers(0, 10**9),
    density=densities,
    output_tokens=st.floats(0, 1e7),
    likely_output_tokens=likely,
    compute_seconds=st.floats(0, 1e9),
    memory_seconds=st.floats(0, 1e9),
    rest_compute_seconds=st.floats(0, 1e9),
    rest_memory_seconds=st.floats(0, 1e9),
    updates=st.lists(
        st.builds(
            LengthUpdate,
            rid=st.uuids().map(lambda rid: rid.hex),
            output_tokens=st.integers(0, 10**5).map(float),
            likely_output_tokens=likely,
        ),
        max_size=5,
    ).map(tuple),
)
json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(),
    lambda inner: st.lists(inner) | st.dictionaries(st.text(), inner),
    max_leaves=5,
)
foreign_params = st.dictionaries(
    st.text().filter(lambda key: not key.startswith("blendserve_")), json_values, max_size=4
)


def through_json(tag):
    """As the tag travels: in the body of a request, which has no infinity and no NaN."""
    return json.loads(json.dumps(tag.to_params(), allow_nan=False))


@quick
@given(tags)
def test_a_tag_arrives_as_it_was_sent(tag):
    assert PlanTag.from_params(through_json(tag)) == tag


@quick
@given(tags, foreign_params)
def test_the_clients_own_params_beside_it_do_no_harm(tag, others):
    assert PlanTag.from_params({**others, **through_json(tag)}) == tag


@quick
@given(tags)
def test_an_infinite_density_arrives_as_one_above_every_finite_one(tag):
    infinite = PlanTag(tag.side, tag.rank, math.inf, tag.output_tokens)
    arrived = PlanTag.from_params(through_json(infinite))
    assert arrived is not None
    assert math.isfinite(arrived.density)
    assert arrived.density > tag.density
    assert (arrived.side, arrived.rank, arrived.output_tokens) == (
        tag.side,
        tag.rank,
        tag.output_tokens,
    )


def test_params_are_scalars_under_keys_of_ours():
    params = TAG.to_params()
    assert all(key.startswith("blendserve_") for key in params)
    assert all(type(value) in (str, int, float) for value in params.values())


@pytest.mark.parametrize("params", [None, {}])
def test_a_request_without_params_is_not_planned(params):
    assert PlanTag.from_params(params) is None


@quick
@given(foreign_params)
def test_a_request_with_params_of_the_client_alone_is_not_planned(params):
    assert PlanTag.from_params(params) is None


@pytest.mark.parametrize("key", TAG.to_params())
def test_a_tag_that_lacks_a_key_is_none(key):
    params = TAG.to_params()
    del params[key]
    assert PlanTag.from_params(params) is None


@pytest.mark.parametrize("key", TAG.to_params())
@pytest.mark.parametrize("value", [None, "", "soon", [], [1], {}, {"left": 1}])
def test_a_tag_with_a_malformed_value_is_none(key, value):
    assert PlanTag.from_params({**TAG.to_params(), key: value}) is None


@pytest.mark.parametrize("number", ["NaN", "Infinity", "-Infinity", "1e999", "1" + 400 * "0"])
@pytest.mark.parametrize("name", ["rank", "density", "output_tokens", "rest_memory_seconds"])
def test_a_tag_with_a_number_that_is_not_finite_is_none(name, number):
    # As the text of a body: Python's parser takes all of these.
    params = json.loads(json.dumps(TAG.to_params())[:-1] + f', "blendserve_{name}": {number}}}')
    assert PlanTag.from_params(params) is None


@pytest.mark.parametrize("number", [-1, -0.5, "-3", -(10**400)])
@pytest.mark.parametrize("name", ["rank", "density", "output_tokens", "rest_memory_seconds"])
def test_a_tag_with_a_negative_number_is_none(name, number):
    assert PlanTag.from_params({**TAG.to_params(), f"blendserve_{name}": number}) is None


@pytest.mark.parametrize("side", ["LEFT", "middle", 0, True])
def test_there_are_two_sides_only(side):
    assert PlanTag.from_params({**TAG.to_params(), "blendserve_side": side}) is None


@pytest.mark.parametrize("updates", ["abc", "abc:1", "abc:1:x", "abc:nan:1", "abc:1:-2", ":"])
def test_a_tag_with_updates_that_we_did_not_write_is_none(updates):
    assert PlanTag.from_params({**TAG.to_params(), "blendserve_updates": updates}) is None
