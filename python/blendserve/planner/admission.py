"""Which side's next request may start: the decision that the runtime and the simulator share.

Pure: what is free and what is next go in, a side comes out. No clock, no I/O, no state.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from .dual_scanner import Side, partition_memory


@dataclass(frozen=True)
class Candidate:
    """The request at the head of one side; token counts.

    uncached_tokens: prompt tokens that must be prefilled.
    density: of the plan, at this request.
    blocked: it shares a prefix with a request that is being prefilled now; started at once it
        would compute that prefix a second time.
    locked_prefix_tokens: the part of its prompt that running requests hold in the KV cache, so
        that it takes nothing from free_tokens. 0 is the safe value.
    """

    side: Side
    prompt_tokens: int
    uncached_tokens: int
    estimated_output_tokens: float
    density: float
    blocked: bool = False
    locked_prefix_tokens: int = 0

    @property
    def needed_tokens(self) -> float:
        """Free KV tokens that this request takes until it ends."""
        return self.prompt_tokens - self.locked_prefix_tokens + self.estimated_output_tokens


@dataclass(frozen=True)
class KVState:
    """The KV pool, in tokens.

    free_tokens: free and evictable ones, less what the caller keeps for the growth of running
        requests.
    left_tokens, right_tokens: `account_tokens` summed over the running requests of each side.
    """

    total_tokens: int
    free_tokens: float
    left_tokens: float
    right_tokens: float

    @property
    def idle(self) -> bool:
        return self.left_tokens <= 0 and self.right_tokens <= 0


class Admission:
    """Decides whose head starts next (BlendServe, section 5.3)."""

    def choose(
        self,
        left: Candidate | None,
        right: Candidate | None,
        kv: KVState,
        target_density: float,
    ) -> Side | None:
        """The side whose head should start now, None when none can.

        The side with the larger unused fraction of its memory partition goes first; if its head
        does not fit or is blocked, the other may go beyond its own partition rather than leave
        memory idle. When nothing runs, the smaller unblocked head starts even if its estimate
        exceeds the memory: waiting could not make room.
        """
        left_share, right_share = partition_memory(
            kv.total_tokens,
            target_density,
            None if left is None else left.density,
            None if right is None else right.density,
        )
        left_unused = unused_fraction(left_share, kv.left_tokens)
        right_unused = unused_fraction(right_share, kv.right_tokens)
        ranked = (left, right) if left_unused >= right_unused else (right, left)
        startable = [head for head in ranked if head is not None and not head.blocked]
        for head in startable:
            if head.needed_tokens <= kv.free_tokens:
                return head.side
        if kv.idle and startable:
            return min(startable, key=lambda head: head.needed_tokens).side
        return None


def unused_fraction(share: float, used: float) -> float:
    """Unused part of a partition as a fraction of it: 1 when empty, 0 when full, negative beyond;
    -inf for a side that is given no memory."""
    return (share - used) / share if share > 0 else -math.inf


def account_tokens(prompt_tokens: float, estimated_output_tokens: float) -> float:
    """p + d / 2: the memory that a request holds on average over its life."""
    return prompt_tokens + estimated_output_tokens / 2


def account_side(side: Side, generated_tokens: int, estimated_output_tokens: float) -> Side:
    """The side on whose account a running request stands: one from the left that has outlived its
    estimate is a long decode after all, and counts on the right."""
    return Side.RIGHT if generated_tokens > estimated_output_tokens else side
