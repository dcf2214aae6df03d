"""Which side's next request may start: the decision that the runtime and the simulator share.

Pure: what is free and what is next go in, a side comes out. No clock, no I/O, no state.
"""

from __future__ import annotations

import math

from .dual_scanner import Side, partition_memory
from .kv_account import Candidate, KVAccount


class Admission:
    """Decides whose head starts next (BlendServe, section 5.3)."""

    def choose(
        self,
        left: Candidate | None,
        right: Candidate | None,
        kv: KVAccount,
        target_density: float,
    ) -> Side | None:
        """The side whose head should start now, None when none can.

        While the target density lies between those of the two heads, each side has its partition
        of the memory. The side with the larger unused fraction goes first, and a side whose
        partition is used up waits, even if memory is free: the other side's next request is only a
        moment away (its prefix is being computed, or its memory is being given back), and would
        find its memory, and the cached prefixes in it, gone.

        With both heads on one side of the target, or one side exhausted, no division can hit it.
        Then all memory is open to both, and the head with the larger cached part goes first, so
        that a group of requests that has begun is finished before its prefix is evicted.

        When nothing runs, the smaller unblocked head starts even if its estimate exceeds the
        memory: waiting could not make room.
        """
        heads = [head for head in (left, right) if head is not None]
        if left is not None and right is not None and left.density > target_density > right.density:
            shares = partition_memory(kv.total_tokens, target_density, left.density, right.density)
            unused = {
                Side.LEFT: unused_fraction(shares[0], kv.left_tokens),
                Side.RIGHT: unused_fraction(shares[1], kv.right_tokens),
            }
            heads = [head for head in heads if unused[head.side] > 0]
            heads.sort(key=lambda head: -unused[head.side])
        else:
            heads.sort(key=lambda head: head.uncached_fraction)
        for head in heads:
            if not head.blocked and kv.fits(head):
                return head.side
        startable = [head for head in (left, right) if head is not None and not head.blocked]
        if kv.idle and startable:
            return min(
                startable, key=lambda head: head.private_tokens + head.estimated_output_tokens
            ).side
        return None


def unused_fraction(share: float, used: float) -> float:
    """Unused part of a partition as a fraction of it: 1 when empty, 0 when full, negative beyond;
    -inf for a side that is given no memory."""
    return (share - used) / share if share > 0 else -math.inf
