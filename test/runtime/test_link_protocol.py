"""Frames and prompts between a coordinator and its engines: whole, or an error that says so."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from blendserve.runtime.link_protocol import (
    FrameReader,
    LinkError,
    frame,
    frames,
    pack_prompts,
    unpack_prompts,
)
from blendserve.runtime.prompt_data import Prompt

heads = st.dictionaries(st.text(max_size=8).filter(lambda key: key != "bytes"), st.integers(0, 99))


@settings(deadline=None, database=None)
@given(
    st.lists(st.tuples(heads, st.one_of(st.none(), st.binary(max_size=60))), max_size=8),
    st.integers(1, 50),
)
def test_frames_come_out_as_they_went_in_however_they_are_cut(sent, size):
    data = b"".join(frame(head, content) for head, content in sent)
    reader = FrameReader()
    found = []
    for place in range(0, len(data), size):
        found += reader.feed(data[place : place + size])
    assert reader.empty
    expected = [
        (head, b"") if content is None else ({**head, "bytes": len(content)}, content)
        for head, content in sent
    ]
    assert found == expected
    assert frames(data) == expected


@pytest.mark.parametrize(
    ("data", "says"),
    [
        (b"no json\n", "does not begin with JSON"),
        (b"[1]\n", "no object"),
        (b'{"bytes": -1}\n', "no number of bytes"),
        (b'{"bytes": "x"}\n', "no number of bytes"),
        (b'{"bytes": 9}\nabc', "cut short"),
        (b'{"a": 1}', "cut short"),
        (b"x" * (5 << 20), "too long"),
    ],
)
def test_what_is_no_frame_is_refused(data, says):
    with pytest.raises(LinkError, match=says):
        frames(data)


def prompt(tokens, limit=9, exact=False, sequences=1):
    return Prompt(np.array(tokens, dtype=np.int32), limit, exact, sequences)


def test_prompts_come_out_as_they_went_in():
    sent = [prompt([1, 2, 49_151]), None, prompt([], 5, True, 4), prompt([7])]
    found = unpack_prompts(pack_prompts(sent))
    assert [one is None for one in found] == [False, True, False, False]
    for one, other in zip(sent, found, strict=True):
        if one is not None:
            assert other is not None
            assert other.token_ids.tolist() == one.token_ids.tolist()
            assert other.token_ids.dtype == np.int32
            assert (other.max_output_tokens, other.ignore_eos, other.sequences) == (
                one.max_output_tokens,
                one.ignore_eos,
                one.sequences,
            )
    assert unpack_prompts(pack_prompts([])) == []


@pytest.mark.parametrize(
    "head",
    [
        {"lengths": [2], "limits": [1], "exact": [False], "sequences": [1]},
        {"lengths": [1, 1], "limits": [1], "exact": [False], "sequences": [1]},
        {"lengths": [1]},
        {"lengths": None, "limits": [], "exact": [], "sequences": []},
    ],
)
def test_prompts_that_do_not_fit_together_are_refused(head):
    with pytest.raises(LinkError, match="prompts"):
        unpack_prompts(frame(head, np.array([5], dtype="<i4").tobytes()))
