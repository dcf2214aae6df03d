"""A job in n parts for machines that know nothing of each other. Integers only, so that every
machine finds the same parts, in whatever order its processor adds up.

Requests are sorted by prefix and cut into short runs where little is shared; each run goes to the
part that has the least to do, by compute and by memory traffic alike.
"""

from __future__ import annotations

from itertools import pairwise

import numpy as np

from .flat_tokens import FlatTokens
from .prefix_sort import sort_prompts
from .prefix_tree import Ints

# Runs of a part: more are more even, and share less. The first that are even enough are taken, or
# those with which the largest part is smallest.
RUNS_PER_SHARD = (1, 2, 4, 8, 16, 32, 64)
# A cut may stand this part of a run before its end, to save what is shared.
_SLACK = 8
# Percent that the largest part may be above the mean.
UNEVEN_PERCENT = 3


def shards(prompts: FlatTokens, output_tokens: Ints, count: int) -> Ints:
    """(n,) the part, from 0 to count - 1, of each request. With fewer requests than parts some are
    empty.

    output_tokens: (n,) what each is expected to answer. Raises ValueError for count < 1.
    """
    if count < 1:
        raise ValueError(f"count must be at least 1, not {count}")
    n = len(prompts.lengths)
    order, shared = sort_prompts(prompts, np.arange(n))
    length, output = prompts.lengths[order].astype(np.int64), output_tokens[order].astype(np.int64)
    compute = length - shared + output
    # Tokens of KV that the decode steps read.
    memory = length * output + output * output // 2
    whole = max(int(compute.sum()), 1), max(int(memory.sum()), 1)
    if not n:
        return np.empty(0, dtype=np.int64)
    best: tuple[int, list[int], list[int]] | None = None
    for runs_per_shard in RUNS_PER_SHARD:
        cuts = _cuts(compute, memory, shared, count * runs_per_shard, whole)
        dealt, load = _dealt(compute, memory, shared, cuts, count, whole)
        largest = max(_size(*one, whole) for one in load)
        if best is None or largest < best[0]:
            best = largest, cuts, dealt
        if 100 * count * largest <= (100 + UNEVEN_PERCENT) * _size(*whole, whole):
            break
    assert best is not None
    _, cuts, dealt = best
    owner = np.empty(n, dtype=np.int64)
    for part, (low, high) in zip(dealt, pairwise(cuts), strict=True):
        owner[order[low:high]] = part
    return owner


def _dealt(
    compute: Ints,
    memory: Ints,
    shared: Ints,
    cuts: list[int],
    count: int,
    whole: tuple[int, int],
) -> tuple[list[int], list[tuple[int, int]]]:
    """The part of each run, and the sums of each part, in which a run computes what its first
    request shares with the run before."""
    sums = [
        (int(compute[low:high].sum() + shared[low]), int(memory[low:high].sum()))
        for low, high in pairwise(cuts)
    ]
    load = [(0, 0)] * count
    dealt = [0] * len(sums)
    # The largest first; of equal ones the first.
    for run in sorted(range(len(sums)), key=lambda run: -_size(*sums[run], whole)):
        work, reads = sums[run]
        least = min(range(count), key=lambda k: _size(load[k][0] + work, load[k][1] + reads, whole))
        load[least] = load[least][0] + work, load[least][1] + reads
        dealt[run] = least
    return dealt, load


def _size(compute: int, memory: int, whole: tuple[int, int]) -> int:
    """What a part is of the whole by the larger of its two sums, and a little by the other."""
    by_compute, by_memory = compute * whole[1], memory * whole[0]
    return 4 * max(by_compute, by_memory) + min(by_compute, by_memory)


def _cuts(
    compute: Ints, memory: Ints, shared: Ints, runs: int, whole: tuple[int, int]
) -> list[int]:
    """Where about so many runs of one size begin, and the end: where the least is shared."""
    limit = _size(*whole, whole) // runs
    cuts = [0]
    work = reads = 0
    for place, (c, m) in enumerate(zip(compute.tolist(), memory.tolist(), strict=True)):
        work, reads = work + c, reads + m
        if _size(work, reads, whole) < limit:
            continue
        end = place + 1
        # Near the run's end; of equal places the last.
        near = end - (end - cuts[-1]) // _SLACK
        cut = end
        if end < len(shared):
            cut -= int(np.argmin(shared[near : end + 1][::-1]))
        cuts.append(max(cut, cuts[-1] + 1))
        work, reads = int(compute[cuts[-1] : end].sum()), int(memory[cuts[-1] : end].sum())
    if cuts[-1] < len(shared):
        cuts.append(len(shared))
    return cuts
