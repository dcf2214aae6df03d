"""Which side's next request may start: the decision that the runtime and the simulator share.

Pure: what is free and what is next go in, a side comes out. No clock, no I/O, no state.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field, replace
from typing import Protocol

import numpy as np
from numpy.typing import ArrayLike

from .dual_scanner import Side, partition_memory
from .prefix_tree import Floats

# Least and largest part of the memory that is kept from the memory side while the compute side has
# requests. The least is for the spread of lengths around what is expected: where long decodes take
# more than their part, no prefill starts beside them, and memory a fifth empty costs nothing as
# long as steps carry more than the weight read.
LEFT_RESERVE = (0.2, 0.5)


class Demand(Protocol):
    """Another way than `Growth` to tell what the running requests will take from the KV pool."""

    def fits(self, candidate: Candidate, free_tokens: float) -> bool:
        """Whether the free tokens last until all have ended, if this one starts now too."""


@dataclass(frozen=True)
class Growth:
    """What the running requests will still take from the KV pool, and give back when they end.

    remaining_tokens: (n,) output tokens that each is expected to produce yet.
    private_tokens: (n,) tokens that each holds now and no other running request does.
    """

    remaining_tokens: Floats = field(default_factory=lambda: np.empty(0))
    private_tokens: Floats = field(default_factory=lambda: np.empty(0))

    def peak_tokens(self) -> float:
        """The most free tokens that they will take at any time from now on, if nothing is added.

        All decode in step, so the demand peaks just before one of them ends: those that ended
        earlier have given back what they held, and the others have grown as far as that one.
        """
        if not len(self.remaining_tokens):
            return 0.0
        order = np.argsort(self.remaining_tokens, kind="stable")
        remaining = self.remaining_tokens[order]
        returned = np.cumsum(self.private_tokens[order]) - self.private_tokens[order]
        alive = np.arange(len(remaining), 0, -1)
        return max(float(np.max(alive * remaining - returned)), 0.0)

    def fits(self, candidate: Candidate, free_tokens: float) -> bool:
        """Whether the free tokens last until all have ended, if this one starts now too."""
        after = self.plus(candidate.estimated_output_tokens, candidate.private_tokens)
        return after.peak_tokens() <= free_tokens - candidate.private_tokens

    def plus(self, remaining_tokens: float, private_tokens: float) -> Growth:
        """The same with one more request."""
        return Growth(
            _appended(self.remaining_tokens, remaining_tokens),
            _appended(self.private_tokens, private_tokens),
        )


def _appended(values: Floats, value: float) -> Floats:
    added: ArrayLike = [value]
    return np.append(values, added)


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
    def uncached_fraction(self) -> float:
        """Part of the prompt that must be prefilled; 0 for an empty prompt."""
        return self.uncached_tokens / self.prompt_tokens if self.prompt_tokens else 0.0

    @property
    def private_tokens(self) -> int:
        """Prompt tokens that it takes from the free ones as soon as it starts."""
        return self.prompt_tokens - self.locked_prefix_tokens


@dataclass(frozen=True)
class KVState:
    """The KV pool, in tokens.

    free_tokens: free and evictable ones.
    left_tokens, right_tokens: `account_tokens` summed over the running requests of each side.
    growth: what the running requests will take of the free ones; demand: judges in its place, for
        a caller that keeps account of it from step to step.
    """

    total_tokens: int
    free_tokens: float
    left_tokens: float
    right_tokens: float
    growth: Growth = field(default_factory=Growth)
    demand: Demand | None = None

    def fits(self, candidate: Candidate, reserve_tokens: float = 0.0) -> bool:
        """Whether the pool, less a reserve, lasts until all have ended, if this one starts too."""
        demand = self.growth if self.demand is None else self.demand
        return demand.fits(candidate, self.free_tokens - reserve_tokens)

    def with_started(self, candidate: Candidate) -> KVState:
        """The pool as it is once a candidate has started."""
        booked = account_tokens(candidate.private_tokens, candidate.estimated_output_tokens)
        left = candidate.side is Side.LEFT
        return replace(
            self,
            free_tokens=self.free_tokens - candidate.private_tokens,
            left_tokens=self.left_tokens + (booked if left else 0.0),
            right_tokens=self.right_tokens + (0.0 if left else booked),
            growth=self.growth.plus(candidate.estimated_output_tokens, candidate.private_tokens),
        )

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
        kv: KVState,
        target_density: float,
        hold_right: bool = False,
    ) -> Side | None:
        """The side whose head should start now, None when none can; asked only while the step has
        prefill budget left. hold_right: enough long decodes run until more is known of them.

        A right head of less than the target density goes first, if memory lasts with the left
        partition kept free. A denser one has no part in filling the memory, and waits until the
        left side is exhausted. When nothing runs, a head starts even if its estimate does not fit.
        """
        if (
            right is not None
            and not hold_right
            and (left is None or right.density < target_density)
        ):
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
        startable = [head for head in (left, right) if head is not None and not head.blocked]
        return startable[0].side if kv.idle and startable else None


def unused_fraction(share: float, used: float) -> float:
    """Unused part of a partition as a fraction of it: 1 when empty, 0 when full, negative beyond;
    -inf for a side that is given no memory."""
    return (share - used) / share if share > 0 else -math.inf


def account_tokens(private_tokens: float, estimated_output_tokens: float) -> float:
    """p + d / 2: the memory that a request holds on average over its life.

    Of a prefix that several running requests share, only the first of them counts the tokens.
    """
    return private_tokens + estimated_output_tokens / 2


def account_side(side: Side, generated_tokens: int, estimated_output_tokens: float) -> Side:
    """The side on whose account a running request stands: one from the left that has outlived its
    estimate is a long decode after all, and counts on the right."""
    return Side.RIGHT if generated_tokens > estimated_output_tokens else side
