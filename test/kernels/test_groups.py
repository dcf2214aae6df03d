"""Shared-prefix groups are the paths of a radix tree, read off the slot table."""

from __future__ import annotations

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from sgl_kernel_ext.groups import IntArray, Segment, shared_segments


def segments_of(paths: list[list[int]], minimum: int = 1) -> list[Segment]:
    def lookup(members: IntArray, positions: IntArray) -> IntArray:
        return np.array([paths[m][p] for m, p in zip(members, positions, strict=True)])

    return shared_segments(lookup, np.array([len(path) for path in paths]), minimum)


def as_tuples(segments: list[Segment]) -> set[tuple[int, int, tuple[int, ...]]]:
    return {(s.begin, s.end, tuple(sorted(s.members.tolist()))) for s in segments}


def test_two_levels_of_sharing_are_two_levels_of_segments() -> None:
    system, few_shot = [1, 2, 3, 4], [5, 6, 7]
    paths = [[*system, *few_shot, 8], [*system, *few_shot, 9, 10], [*system, 11]]
    assert as_tuples(segments_of(paths)) == {
        (0, 4, (0, 1, 2)),
        (4, 7, (0, 1)),
        (7, 8, (0,)),
        (7, 9, (1,)),
        (4, 5, (2,)),
    }


def test_a_short_shared_stretch_stays_with_what_follows_it() -> None:
    paths = [[1, 2, 3, 4, 5, 6], [1, 2, 3, 4, 5, 7], [1, 8, 9]]
    assert as_tuples(segments_of(paths, minimum=3)) == {
        (0, 5, (0, 1)),
        (5, 6, (0,)),
        (5, 6, (1,)),
        (0, 3, (2,)),
    }


def test_a_request_that_ends_inside_the_shared_stretch_is_covered() -> None:
    paths = [[1, 2, 3], [1, 2, 3, 4, 5]]
    assert as_tuples(segments_of(paths)) == {(0, 3, (0, 1)), (3, 5, (1,))}


# Paths through a random tree: each position's slot depends on all choices up to it.
def paths_of(choices: list[list[int]]) -> list[list[int]]:
    numbers: dict[tuple[int, ...], int] = {}
    return [
        [numbers.setdefault(tuple(path[: i + 1]), len(numbers)) for i in range(len(path))]
        for path in choices
    ]


@settings(deadline=None)
@given(
    st.lists(st.lists(st.integers(0, 1), min_size=1, max_size=12), min_size=1, max_size=8),
    st.integers(1, 4),
)
def test_every_position_is_covered_once_by_members_that_agree_on_it(
    choices: list[list[int]], minimum: int
) -> None:
    paths = paths_of(choices)
    covered = [[0] * len(path) for path in paths]
    for segment in segments_of(paths, minimum):
        assert len(segment.members) == 1 or segment.end - segment.begin >= minimum
        for position in range(segment.begin, segment.end):
            slots = {paths[member][position] for member in segment.members}
            assert len(slots) == 1
            for member in segment.members:
                covered[member][position] += 1
    assert all(count == 1 for path in covered for count in path)
