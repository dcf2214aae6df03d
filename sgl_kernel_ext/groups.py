"""Which running requests share which part of their KV: the radix tree, as attention sees it.

Requests below one node of the radix tree hold that node's KV slots in the same columns of the
slot table, and no two nodes hold the same slot. So the tree's part above the running requests can
be read from the table itself, whatever the cache's own nodes look like in an SGLang release.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

IntArray = NDArray[np.int64]
# (member numbers, positions) -> KV slots, elementwise.
SlotLookup = Callable[[IntArray, IntArray], IntArray]

# A shared stretch shorter than this costs more in merging than it saves in reading.
MIN_SHARED_TOKENS = 64


@dataclass(frozen=True)
class Segment:
    """Positions [begin, end) whose KV is the same for all members (numbers into the batch)."""

    begin: int
    end: int
    members: IntArray


def shared_segments(
    lookup: SlotLookup, kv_lens: IntArray, min_shared_tokens: int = MIN_SHARED_TOKENS
) -> list[Segment]:
    """Cut the requests' KV into segments, each held by one request or shared by several.

    Args:
        lookup: the KV slot of a member's position; asked for positions below its length only.
        kv_lens: [members], at least 1.
        min_shared_tokens: shorter shared stretches are left with what follows them.

    Returns:
        Segments that cover each member's positions [0, kv_len) exactly once, parents first.
    """
    segments: list[Segment] = []
    # (members that agree on [0, position), where their unwritten segment begins, position)
    stack = [(np.arange(len(kv_lens)), 0, 0)]
    while stack:
        members, begin, position = stack.pop()
        ended = kv_lens[members] <= position
        for member in members[ended]:
            if begin < kv_lens[member]:
                segments.append(Segment(begin, int(kv_lens[member]), np.array([member])))
        members = members[~ended]
        if not len(members):
            continue
        here = lookup(members, np.full(len(members), position))
        for slot in np.unique(here):
            branch = members[here == slot]
            if len(branch) == 1:
                member = int(branch[0])
                segments.append(Segment(begin, int(kv_lens[member]), branch))
                continue
            end = _common_end(lookup, branch, kv_lens, position)
            if end - begin >= min_shared_tokens:
                segments.append(Segment(begin, end, branch))
                stack.append((branch, end, end))
            else:
                stack.append((branch, begin, end))
    return segments


def _common_end(lookup: SlotLookup, members: IntArray, kv_lens: IntArray, position: int) -> int:
    """First position after `position`, where all members agree, at which they no longer do.

    Agreement at a position implies agreement before it, so bisection finds the end.
    """
    low, high = position + 1, int(kv_lens[members].min())
    while low < high:
        middle = (low + high + 1) // 2
        slots = lookup(members, np.full(len(members), middle - 1))
        if (slots == slots[0]).all():
            low = middle
        else:
            high = middle - 1
    return low
