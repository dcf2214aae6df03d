"""Two cursors that walk a plan from its compute end and its memory end (BlendServe, section 5.3),
and how they divide the KV memory between them."""

from __future__ import annotations

import math
from collections.abc import Iterator
from enum import StrEnum

import numpy as np

from .plan import Plan

# Memory for a side whose requests do no decoding (density inf). By the formula it would get none,
# as it holds nothing from step to step; but its prompts need room while they are prefilled. A
# twentieth of the pool holds several prefill chunks on a GPU, and costs the other side little.
PREFILL_ONLY_SHARE = 0.05


class Side(StrEnum):
    """LEFT is the compute-intensive end of a plan, RIGHT the memory-intensive one."""

    LEFT = "left"
    RIGHT = "right"

    @property
    def other(self) -> Side:
        return Side.RIGHT if self is Side.LEFT else Side.LEFT


class DualScanner:
    """Which request is next on each side, and what is left of the job.

    Mutable, without clock or I/O; every method is O(1), amortised over the requests removed.
    """

    def __init__(self, plan: Plan) -> None:
        # Only what the walk needs: a plan holds the tree of the whole job, and a scanner is sent
        # from the process that plans to the one that walks.
        self._order = plan.order
        self._density = plan.density
        self._compute_seconds = plan.compute_seconds
        self._memory_seconds = plan.memory_seconds
        self._shared = plan.shared_with_previous
        n = len(plan.order)
        self._low = 0
        self._high = n - 1
        self._gone = np.zeros(n, dtype=bool)
        self._position = np.full(len(plan.request_density), -1, dtype=np.int64)
        self._position[plan.order] = np.arange(n)
        self.remaining = n
        # Differences of running sums do not drift as repeated subtraction would, and are exactly
        # zero where all items between are.
        self._compute = np.concatenate(([0.0], np.cumsum(plan.compute_seconds)))
        self._memory = np.concatenate(([0.0], np.cumsum(plan.memory_seconds)))
        # Sums over requests removed between the cursors.
        self._removed_compute = 0.0
        self._removed_memory = 0.0
        self._removed_between = 0

    @property
    def exhausted(self) -> bool:
        return self.remaining == 0

    def __contains__(self, request: int) -> bool:
        """Whether a request is in the plan and not yet gone."""
        position = int(self._position[request]) if 0 <= request < len(self._position) else -1
        return position >= 0 and not self._gone[position]

    @property
    def cursors(self) -> tuple[int, int]:
        """Positions in the plan of the two heads; crossed when nothing is left."""
        return self._low, self._high

    def head(self, side: Side) -> int | None:
        """The request that `take(side)` would return; None when nothing is left. With one request
        left it is the head of both sides."""
        if self.exhausted:
            return None
        return int(self._order[self._cursor(side)])

    def upcoming(self, side: Side) -> Iterator[int]:
        """What `take(side)` would return, again and again. Nothing may be taken while one looks."""
        step = 1 if side is Side.LEFT else -1
        at = self._cursor(side)
        while self._low <= at <= self._high:
            if not self._gone[at]:
                yield int(self._order[at])
            at += step

    def take(self, side: Side) -> int:
        """Removes and returns the head of a side. Raises IndexError when nothing is left."""
        request = self.head(side)
        if request is None:
            raise IndexError("the plan is exhausted")
        self.remove(request)
        return request

    def remove(self, request: int) -> bool:
        """Takes a request out of turn (sampled first, cancelled). False when it is not in the plan
        or already gone."""
        if request not in self:
            return False
        position = int(self._position[request])
        self._gone[position] = True
        self.remaining -= 1
        self._count_removed(position, +1)
        while self._low <= self._high and self._gone[self._low]:
            self._count_removed(self._low, -1)
            self._low += 1
        while self._low <= self._high and self._gone[self._high]:
            self._count_removed(self._high, -1)
            self._high -= 1
        return True

    def density(self, side: Side) -> float | None:
        """Compute density of the head of a side, None when nothing is left."""
        return None if self.exhausted else float(self._density[self._cursor(side)])

    def shared_tokens(self, side: Side) -> int:
        """Prompt tokens that the head of a side has in common with its neighbour in the plan that
        this side has passed; when nothing is left, those that what this side took last has in
        common with its neighbour that the other side passed."""
        at = self._low if side is Side.LEFT else self._high + (not self.exhausted)
        return int(self._shared[at]) if 0 <= at < len(self._shared) else 0

    @property
    def remaining_seconds(self) -> tuple[float, float]:
        """Seconds of compute (after sharing) and of memory traffic of what is left."""
        if self.exhausted:
            return 0.0, 0.0
        compute = self._compute[self._high + 1] - self._compute[self._low] - self._removed_compute
        memory = self._memory[self._high + 1] - self._memory[self._low] - self._removed_memory
        return max(float(compute), 0.0), max(float(memory), 0.0)

    @property
    def target_density(self) -> float:
        """Density of what is left: compute seconds (after sharing) over memory seconds. inf when
        nothing that is left decodes, or nothing is left."""
        compute, memory = self.remaining_seconds
        return compute / memory if memory > 0.0 else math.inf

    def _cursor(self, side: Side) -> int:
        return self._low if side is Side.LEFT else self._high

    def _count_removed(self, position: int, sign: int) -> None:
        self._removed_between += sign
        if self._removed_between == 0:
            self._removed_compute = self._removed_memory = 0.0
            return
        self._removed_compute += sign * float(self._compute_seconds[position])
        self._removed_memory += sign * float(self._memory_seconds[position])


def partition_memory(
    total: float, target: float, left: float | None, right: float | None
) -> tuple[float, float]:
    """(M_L, M_R) with M_L + M_R = total and M_L * left + M_R * right = total * target.

    total: KV memory in any unit, >= 0. target: density to hit. left, right: densities at the two
    scanners, None for a side with no request left. Rules for the edges:
    - one side exhausted: the other gets everything; both exhausted: halves;
    - equal densities (both inf included): halves, as any division hits the same density;
    - target outside the two densities: everything to the side nearer to it;
    - one density inf: `PREFILL_ONLY_SHARE` for that side, everything if target is inf too.
    Raises ValueError for nan or negative arguments.
    """
    for value in (total, target, left, right):
        if value is not None and not value >= 0:
            raise ValueError(f"memory and densities must not be negative or nan, not {value!r}")
    if left == right:  # Both None, both inf, or just equal.
        share = 0.5
    elif left is None or right is None:
        share = 0.0 if left is None else 1.0
    elif math.isinf(left) or math.isinf(right):
        infinite_share = 1.0 if math.isinf(target) else PREFILL_ONLY_SHARE
        share = infinite_share if math.isinf(left) else 1.0 - infinite_share
    elif math.isinf(target):
        share = 1.0 if left > right else 0.0
    else:
        share = min(1.0, max(0.0, (target - right) / (left - right)))
    left_memory = total * share
    return left_memory, total - left_memory


def account_tokens(private_tokens: float, output_tokens: float) -> float:
    """p + d / 2: the memory that a request holds on average over its life.

    Of a prefix that several running requests share, only the first of them counts the tokens.
    """
    return private_tokens + output_tokens / 2
