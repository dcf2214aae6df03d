"""Which side's next request may start: the decision that the runtime and the simulator share.

Pure: what is free and what is next go in, a side comes out. No clock, no I/O, no state.
"""

from __future__ import annotations

import math
from typing import Protocol

from blendserve.planner.dual_scanner import Side, partition_memory

from .kv_account import Candidate

# Least and largest part of the memory that is kept from the memory side while the compute side has
# requests. The least is for the spread of lengths around what is expected: where long decodes take
# more than their part, no prefill starts beside them, and memory a fifth empty costs nothing as
# long as steps carry more than the weight read.
LEFT_RESERVE = (0.2, 0.5)


class KVView(Protocol):
    """The KV pool as a decision sees it: `KVAccount`, or the simulator's own.

    total_tokens: size. others_tokens: what others than the job hold of it.
    left_tokens, right_tokens: memory booked per side. idle: nothing of a job runs.
    """

    @property
    def total_tokens(self) -> int: ...

    @property
    def others_tokens(self) -> float: ...

    @property
    def left_tokens(self) -> float: ...

    @property
    def right_tokens(self) -> float: ...

    @property
    def idle(self) -> bool: ...

    def fits(self, candidate: Candidate, reserve_tokens: float = 0.0) -> bool:
        """Whether the pool, less a reserve, lasts until all have ended, if this one starts too."""
        ...


class Admission:
    """Decides whose head starts next (BlendServe, section 5.3)."""

    def choose(
        self,
        left: Candidate | None,
        right: Candidate | None,
        kv: KVView,
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
        alone = _startable_alone(left, right, kv)
        return (
            min(alone, key=lambda head: head.private_tokens + head.estimated_output_tokens).side
            if alone
            else None
        )


class PacedAdmission:
    """Decides whose head starts next where every step's prefill is paced (`planner.pacing`).

    With a pace, the compute side cannot run ahead: it starts no more than a step can carry. So
    memory need not be kept from it by a partition, and the memory side may start whenever its
    growth fits beside what the compute side needs in flight.
    """

    def choose(
        self,
        left: Candidate | None,
        right: Candidate | None,
        kv: KVView,
        target_density: float,
    ) -> Side | None:
        """The side whose head should start now, None when none can; asked only while the step has
        prefill budget left.

        A right head of less than the target density goes first, if memory lasts with the left
        partition kept free. A denser one has no part in filling the memory, and waits until the
        left side is exhausted. When nothing runs, a head starts even if its estimate does not fit.
        """
        if right is not None and (left is None or right.density < target_density):
            reserve = 0.0
            if left is not None and left.density > right.density:
                share = partition_memory(
                    kv.total_tokens, target_density, left.density, right.density
                )[0]
                low, high = (part * kv.total_tokens for part in LEFT_RESERVE)
                reserve = min(max(share, low), high)
            if not right.blocked and kv.fits(right, reserve):
                return Side.RIGHT
        if left is not None and not left.blocked and kv.fits(left):
            return Side.LEFT
        alone = _startable_alone(left, right, kv)
        return alone[0].side if alone else None


def may_start_alone(head: Candidate, kv: KVView) -> bool:
    """Whether a head may start even if its estimate exceeds the memory: nothing of a job runs, so
    waiting could not make room, if not others than the job hold what it lacks."""
    room = kv.total_tokens - kv.others_tokens
    return kv.idle and (not kv.others_tokens or head.private_tokens < room)


def _startable_alone(
    left: Candidate | None, right: Candidate | None, kv: KVView
) -> list[Candidate]:
    heads = [head for head in (left, right) if head is not None and not head.blocked]
    return [head for head in heads if may_start_alone(head, kv)]


def unused_fraction(share: float, used: float) -> float:
    """Unused part of a partition as a fraction of it: 1 when empty, 0 when full, negative beyond;
    -inf for a side that is given no memory."""
    return (share - used) / share if share > 0 else -math.inf
