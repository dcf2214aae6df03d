"""Sorts prompts by content and counts what neighbours share, without copying them.

A radix sort from the front, many tokens at a time. Prompts that are equal so far form a group; all
groups advance together, one numpy call for all of them. A group first skips the tokens that all
its members share (most of a few-shot prompt, read once), then is sorted by the next few tokens.
"""

from __future__ import annotations

import numpy as np
from numpy.lib.stride_tricks import sliding_window_view
from numpy.typing import NDArray

from .flat_tokens import FlatTokens, Tokens

Ints = NDArray[np.int64]
Keys = NDArray[np.uint32]

SKIP_TOKENS = 64  # Compared at a time while a group stays together.
SORT_TOKENS = 8  # Compared at a time where it branches; few, as most branches show at once.
BATCH_REQUESTS = 1 << 15  # Rows gathered at a time: 8 MiB for SKIP_TOKENS, fits the cache best.


def sort_prompts(prompts: FlatTokens, order: Ints) -> tuple[Ints, Ints]:
    """(order, shared), shape (n,): the requests sorted by tokens, those with identical prompts as
    they stand in the given order, and the tokens that each has in common with the one before.

    Reads every token about twice; O(n) memory beside the tokens.
    """
    n = len(order)
    order = order.copy()
    shared = np.zeros(n, dtype=np.int64)
    begin, length = prompts.offsets[:-1], prompts.lengths
    if n < 2 or not len(prompts.tokens):
        return order, shared
    skip, width = min(SKIP_TOKENS, len(prompts.tokens)), min(SORT_TOKENS, len(prompts.tokens))
    # The positions of the order still to be settled, each group of them side by side; the group of
    # each; and the number of tokens that a group is known to share.
    place = np.arange(n)
    group = np.zeros(n, dtype=np.int64)
    depth = np.zeros(1, dtype=np.int64)
    while len(place):
        first = _starts(group)
        at, left = _rest(begin, length, order[place], depth[group])
        common = _common_with(prompts.tokens, at, left, at[first][group], skip)
        step = np.minimum.reduceat(common, first)
        depth += step
        branches = (step < skip)[group]
        together = ~branches
        chosen, where = np.flatnonzero(branches), place[branches]

        at, left = _rest(begin, length, order[where], depth[group[chosen]])
        keys = _keys(prompts.tokens, at, left, group[chosen], width)
        ranked = np.argsort(keys.view(f"S{4 * (width + 1)}").ravel(), kind="stable")
        order[where] = order[where][ranked]
        keys = keys[ranked]
        differ = keys[1:] != keys[:-1]
        same = ~differ.any(axis=1)
        column = differ.argmax(axis=1)  # 0: another group.
        column[same] = np.count_nonzero(keys[1:][same, 1:], axis=1) + 1
        ended = keys[1:, -1] == 0
        joined = same & ~ended
        settled = np.flatnonzero((column > 0) & ~joined)
        shared[where[settled + 1]] = depth[group[chosen[settled + 1]]] + column[settled] - 1

        # What is still equal goes on, beside the groups that have not branched yet.
        label = np.concatenate(([0], np.cumsum(~joined))) if len(where) else np.empty(0, np.int64)
        keep = np.bincount(label)[label] > 1 if len(where) else np.empty(0, dtype=bool)
        depth = np.concatenate((depth[group[chosen[keep]]] + width, depth[group[together]]))
        group = np.concatenate((label[keep], group[together] + n))
        place = np.concatenate((where[keep], place[together]))
        first = _starts(group)
        depth = depth[first]
        group = np.repeat(np.arange(len(first)), np.diff(np.append(first, len(group))))
    return order, shared


def _starts(group: Ints) -> Ints:
    """Where each run of equal values starts."""
    if not len(group):
        return np.empty(0, dtype=np.int64)
    return np.flatnonzero(np.concatenate(([True], group[1:] != group[:-1])))


def _rest(begin: Ints, length: Ints, requests: Ints, depth: Ints) -> tuple[Ints, Ints]:
    """Where the prompts go on after `depth` tokens, and how many tokens they have left."""
    return begin[requests] + depth, length[requests] - depth


def _rows(tokens: Tokens, at: Ints, width: int) -> Tokens:
    """(k, width) the tokens from each of `at` on; past the end of all tokens, the last one."""
    last = len(tokens) - width
    rows: Tokens = sliding_window_view(tokens, width)[np.minimum(at, last)]
    over = np.flatnonzero(at > last)
    if len(over):
        index = np.minimum(at[over, None] + np.arange(width), len(tokens) - 1)
        rows[over] = tokens[index]
    return rows


def _common_with(tokens: Tokens, at: Ints, left: Ints, other: Ints, width: int) -> Ints:
    """(k,) tokens, at most `width`, that the prompts at `at` have in common with those at `other`,
    where a prompt has no more than `left` tokens."""
    out = np.empty(len(at), dtype=np.int64)
    for low in range(0, len(at), BATCH_REQUESTS):
        part = slice(low, low + BATCH_REQUESTS)
        differ = _rows(tokens, at[part], width) != _rows(tokens, other[part], width)
        out[part] = np.where(differ.any(axis=1), differ.argmax(axis=1), width)
    return np.minimum(out, left)


def _keys(tokens: Tokens, at: Ints, left: Ints, group: Ints, width: int) -> Keys:
    """(k, width + 1) group, then tokens + 1, or 0 past the end of the prompt: big-endian, so that
    rows compare as byte strings, and a prompt comes before its continuations."""
    keys = np.empty((len(at), width + 1), dtype=">u4")
    keys[:, 0] = group
    for low in range(0, len(at), BATCH_REQUESTS):
        part = slice(low, low + BATCH_REQUESTS)
        rows = _rows(tokens, at[part], width).astype(np.uint32) + 1
        keys[part, 1:] = np.where(np.arange(width) < left[part, None], rows, 0)
    return keys
