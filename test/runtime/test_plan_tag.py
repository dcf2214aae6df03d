"""The plan tag survives its way through a request, and no client's data is mistaken for one."""

from __future__ import annotations

import json
import math

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from blendserve.planner import NextUse, Side
from blendserve.runtime.plan_tag import KEY, LengthUpdate, PlanTag, UseTag, without_tag

quick = settings(deadline=None, database=None)

TAG = PlanTag(
    Side.LEFT,
    rank=3,
    density=2.5,
    output_tokens=40.0,
    likely_output_tokens=(30.0, 50.0),
    use=UseTag("batch_1", Side.LEFT, 7, 3, (NextUse(16, 9, Side.LEFT),)),
    updates=(LengthUpdate("a", 9.0, (8.0, 10.0)),),
)

# The tag's densities stop where anything is compute-bound; see the test of infinities.
densities = st.floats(0, 1e12, exclude_max=True)
counts = st.integers(0, 2**40)
uses = st.builds(
    lambda prefixes, users: tuple(
        NextUse(prefix, *user) for prefix, user in zip(sorted(prefixes), users, strict=False)
    ),
    st.sets(st.integers(1, 2**20), max_size=5),
    st.lists(st.tuples(counts, st.sampled_from(Side)), min_size=5, max_size=5),
)
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
    use=st.none()
    | st.builds(
        UseTag,
        job=st.text(max_size=8),
        side=st.sampled_from(Side),
        due=counts,
        since=counts,
        next_uses=uses,
    ),
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


def test_params_are_one_text_under_a_key_of_ours():
    assert list(map(type, TAG.to_params().values())) == [str]
    assert all(key.startswith("blendserve_") for key in TAG.to_params())


@pytest.mark.parametrize("params", [None, {}])
def test_a_request_without_params_is_not_planned(params):
    assert PlanTag.from_params(params) is None


@quick
@given(foreign_params)
def test_a_request_with_params_of_the_client_alone_is_not_planned(params):
    assert PlanTag.from_params(params) is None


def with_value(text, *path):
    """The params of a tag with JSON text in the place of one value."""
    tag = json.loads(TAG.to_params()[KEY])
    at = tag
    for name in path[:-1]:
        at = at[name]
    at[path[-1]] = "the value"
    return {KEY: json.dumps(tag).replace('"the value"', text)}


FIELDS = tuple(json.loads(TAG.to_params()[KEY]))


def test_a_tag_can_be_written_by_hand():
    assert PlanTag.from_params(with_value("7", "rank")).rank == 7
    corners = with_value('[[16, 9, "left"], [40, 12, "right"]]', "use", "next_uses")
    uses = (NextUse(16, 9, Side.LEFT), NextUse(40, 12, Side.RIGHT))
    assert PlanTag.from_params(corners).use.next_uses == uses


def test_what_is_left_without_a_tag_is_the_clients():
    assert without_tag({**TAG.to_params(), "own": 1, "__req__": None}) == {
        "own": 1,
        "__req__": None,
    }
    assert without_tag({**TAG.to_params(), "__req__": None}) is None


@pytest.mark.parametrize("text", [None, 5, [], {}, "", "soon", "{}", "[]", "null", "{", "\ud800"])
def test_a_key_with_something_else_in_it_is_no_tag(text):
    assert PlanTag.from_params({KEY: text}) is None


@pytest.mark.parametrize("field", ["side", "rank", "density", "output_tokens"])
def test_a_tag_that_lacks_what_it_must_have_is_none(field):
    tag = json.loads(TAG.to_params()[KEY])
    del tag[field]
    assert PlanTag.from_params({KEY: json.dumps(tag)}) is None


@pytest.mark.parametrize("field", FIELDS)
@pytest.mark.parametrize("text", ['"soon"', "[1, {}]", "{}", "NaN", "Infinity", "1e999", "-1"])
def test_a_tag_with_a_malformed_value_is_none(field, text):
    assert PlanTag.from_params(with_value(text, field)) is None


@pytest.mark.parametrize("side", ['"LEFT"', '"middle"', "0", "true"])
def test_there_are_two_sides_only(side):
    assert PlanTag.from_params(with_value(side, "side")) is None


@pytest.mark.parametrize(
    ("text", "path"),
    [
        ("[3, 2]", ["likely_output_tokens"]),
        ("[-3, 2]", ["likely_output_tokens"]),
        ("[1e999]", ["likely_output_tokens"]),
        ('[{"rid": "a", "output_tokens": 1}]', ["updates"]),
        ('[{"rid": "a", "output_tokens": -1, "likely_output_tokens": []}]', ["updates"]),
        ('[{"rid": "a", "output_tokens": 1, "likely_output_tokens": [3, 2]}]', ["updates"]),
        ('"soon"', ["use", "due"]),
        ("null", ["use", "since"]),
        ('[[16, 9, "middle"]]', ["use", "next_uses"]),
        ("[[16, 9]]", ["use", "next_uses"]),
        ('[[40, 9, "left"], [16, 12, "left"]]', ["use", "next_uses"]),
        ('[[0, 9, "left"]]', ["use", "next_uses"]),
    ],
)
def test_what_a_client_made_up_is_no_tag(text, path):
    assert PlanTag.from_params(with_value(text, *path)) is None
