"""One central plan into k sub-plans for data-parallel replicas (BlendServe, section 5.5).

All get the same compute and the same memory seconds, so the same time and the same density. The
plan is carved as the two scanners walk it: each replica gets a run of requests from the compute
end and a run from the memory end, and what its cuts part is all the sharing that is lost. What
single large requests leave uneven is then evened out by moving and swapping requests.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray

from .annotation import amortised_compute
from .cost_model import CostModel, density
from .media import EncoderWork
from .plan import Plan
from .prefix_tree import Floats, Ints, PrefixTree
from .transform import CommonPrefix

# A cut may stand this part of a replica's share off the even division, to save a shared prefix.
CUT_SLACK = 0.0025
# Sums closer together than this (in parts of a replica's time) are left as they are.
BALANCE_TOLERANCE = 0.002
# Part of the plan's shared tokens that moves and swaps may cost together.
MOVE_BUDGET = 0.004
# Where times or densities are further apart than this, another division is tried that deals out
# the large requests, those of at least this part of a replica's time, first. It is taken if it is
# more even, its times are no further apart than before or than this, and it loses little sharing.
COARSE = 0.01
LARGE_REQUEST = 0.02
MAX_LOST_SHARING = 0.01
# Moves and swaps looked at per step: the largest requests of either replica and some of the rest,
# and pairs of the very largest, which alone can even out a few large requests.
_CANDIDATES = 192
_PAIRED = 12
_STEPS_PER_REPLICA = 60
_ROUNDS = 8


@dataclass(frozen=True, eq=False)
class Partition:
    """k sub-plans; together they hold every request of the plan once, each in the plan's order.

    plans: one per replica. `order` has the job's request indices; sharing, sums and densities are
        those within the replica.
    seconds: (k,) max(compute, memory) of each, its time with perfect overlap.
    lost_sharing: part of the plan's shared tokens that no replica shares any more.
    """

    plans: list[Plan]
    seconds: Floats
    lost_sharing: float

    @property
    def imbalance(self) -> float:
        """(longest - shortest) / mean of the replicas' seconds; 0 for a job without work."""
        mean = float(self.seconds.mean())
        return float(self.seconds.max() - self.seconds.min()) / mean if mean > 0 else 0.0

    @property
    def density_spread(self) -> float:
        """(highest - lowest) / mean of the replicas' densities; inf where only some have one."""
        densities = np.array([plan.target_density for plan in self.plans])
        finite = densities[np.isfinite(densities)]
        if not len(finite) or not finite.mean() > 0:
            return 0.0
        if len(finite) < len(densities):
            return math.inf
        return float((finite.max() - finite.min()) / finite.mean())


def partition(plan: Plan, replicas: int, cost_model: CostModel) -> Partition:
    """Divides a plan among replicas. Deterministic. Raises ValueError for replicas < 1.

    With fewer requests than replicas some sub-plans are empty; and no division is even when a
    single request takes longer than a replica's share.
    """
    if replicas < 1:
        raise ValueError(f"replicas must be at least 1, not {replicas}")
    sums = _Sums.of(plan, cost_model)
    found = _divide(plan, sums, replicas, _carve(plan, replicas, np.full(len(plan.order), -1)))
    if max(found.imbalance, found.density_spread) > COARSE:
        other = _divide(plan, sums, replicas, _carve(plan, replicas, _deal_large(plan, replicas)))
        if (
            other.lost_sharing <= max(found.lost_sharing, MAX_LOST_SHARING)
            and other.imbalance <= max(found.imbalance, COARSE)
            and max(other.imbalance, other.density_spread)
            < max(found.imbalance, found.density_spread)
        ):
            return other
    return found


def _divide(plan: Plan, sums: _Sums, replicas: int, owner: Ints) -> Partition:
    """Evens out a first division (n,) and counts what comes of it."""
    if replicas > 1:
        owner = _even_out(plan, sums, owner, replicas)
    plans = [_sub_plan(plan, sums, np.flatnonzero(owner == k)) for k in range(replicas)]
    shared = int(plan.shared_with_previous.sum())
    kept = sum(int(sub.shared_with_previous.sum()) for sub in plans)
    seconds = [max(sub.compute_seconds.sum(), sub.memory_seconds.sum()) for sub in plans]
    return Partition(
        plans=plans,
        seconds=np.array(seconds),
        lost_sharing=1.0 - kept / shared if shared else 0.0,
    )


def _deal_large(plan: Plan, replicas: int) -> Ints:
    """(n,) replica of the requests that are large next to a replica's share, -1 for the others:
    the largest first, each to the replica that has least so far."""
    work = plan.compute_seconds + plan.memory_seconds
    dealt = np.full(len(work), -1, dtype=np.int64)
    load = np.zeros(replicas)
    for at in np.argsort(-work, kind="stable").tolist():
        if work[at] < LARGE_REQUEST * work.sum() / replicas:
            break
        dealt[at] = int(np.argmin(load))
        load[dealt[at]] += work[at]
    return dealt


def _carve(plan: Plan, replicas: int, dealt: Ints) -> Ints:
    """(n,) replica of each position, by two cursors that move towards each other.

    dealt: (n,) replicas of requests that have one already, -1 for those to divide. After j
    replicas, both cursors have together passed what is left of j / k of the compute and of the
    memory seconds. For every place of the left cursor the compute fixes that of the right one; the
    pair whose memory is nearest is taken, and both then move a little to where least is shared.
    """
    n = len(plan.order)
    free = dealt < 0
    compute = np.concatenate(([0.0], np.cumsum(np.where(free, plan.compute_seconds, 0.0))))
    memory = np.concatenate(([0.0], np.cumsum(np.where(free, plan.memory_seconds, 0.0))))
    wanted = []  # What each replica still has to get: compute, memory.
    for sums in (plan.compute_seconds, plan.memory_seconds):
        has = np.bincount(dealt[~free], sums[~free], minlength=replicas)
        wanted.append(np.maximum(sums.sum() / replicas - has, 0.0))
    owner = np.full(n, replicas - 1, dtype=np.int64)
    # Positions low .. high - 1 are not given away yet.
    low, high = 0, n
    slack = CUT_SLACK * max(plan.compute_seconds.sum(), plan.memory_seconds.sum()) / replicas
    shared = np.append(plan.shared_with_previous, 0)
    for j in range(replicas - 1):
        rest_compute, rest_memory = (float(sums[j + 1 :].sum()) for sums in wanted)
        lefts = np.arange(low, high + 1)
        above = np.clip(np.searchsorted(compute, compute[lefts] + rest_compute), lefts, high)
        below = np.maximum(above - 1, lefts)
        pairs = np.concatenate((lefts, lefts)), np.concatenate((above, below))
        off_compute = compute[pairs[1]] - compute[pairs[0]] - rest_compute
        off_memory = memory[pairs[1]] - memory[pairs[0]] - rest_memory
        best = int(np.argmin(off_compute**2 + off_memory**2))
        left, right = int(pairs[0][best]), int(pairs[1][best])
        left = _cheapest_cut(shared, compute, memory, left, low, right, slack)
        right = _cheapest_cut(shared, compute, memory, right, left, high, slack)
        owner[low:left] = j
        owner[right:high] = j
        low, high = left, right
    return np.where(free, owner, dealt)


def _cheapest_cut(
    shared: Ints, compute: Floats, memory: Floats, cut: int, low: int, high: int, slack: float
) -> int:
    """The cut in low .. high that parts the shortest prefix, among those that shift at most
    `slack` seconds of compute and of memory; the nearest of equals."""
    first, last = low, high
    for sums in (compute, memory):
        first = max(first, int(np.searchsorted(sums, sums[cut] - slack, side="left")))
        last = min(last, int(np.searchsorted(sums, sums[cut] + slack, side="right")) - 1)
    if not first <= cut <= last:
        return cut
    cuts = np.arange(first, last + 1)
    return int(cuts[np.lexsort((np.abs(cuts - cut), shared[cuts]))[0]])


@dataclass(frozen=True, eq=False)
class _Sums:
    """Of each position of the plan: the request, its unshared costs, its leaf of the tree; and how
    prefixes compare."""

    request: Ints
    compute: Floats
    memory: Floats
    length: Ints
    leaf: Ints
    common: CommonPrefix
    cost_model: CostModel
    encoder: EncoderWork

    @staticmethod
    def of(plan: Plan, cost_model: CostModel) -> _Sums:
        tree = plan.tree
        leaf_of = np.empty(tree.num_leaves, dtype=np.int64)
        leaf_of[tree.requests] = np.arange(tree.num_leaves)
        leaf = leaf_of[plan.order]
        length = tree.length[leaf]
        output = plan.estimated_output_tokens[plan.order]
        return _Sums(
            request=plan.order,
            compute=plan.encoder.compute_seconds(cost_model, plan.order, length, output),
            memory=cost_model.memory_seconds(length, output),
            length=length,
            leaf=leaf,
            common=CommonPrefix(tree.shared),
            cost_model=cost_model,
            encoder=plan.encoder,
        )

    def saved(self, positions: Ints, cached: Ints) -> Floats:
        """Compute that the requests at these positions save by so many cached tokens."""
        return self.encoder.saved_seconds(self.cost_model, self.request[positions], cached)

    def shared(self, positions: Ints) -> Ints:
        """Tokens in common with the predecessor, within these positions."""
        return self.common.along(self.leaf[positions])


def _even_out(plan: Plan, sums: _Sums, owner: Ints, replicas: int) -> Ints:
    """Moves and swaps requests between replicas while that evens out their sums.

    Every step looks at the replica that is furthest off and at each of the others, and takes the
    move or swap after which the two are nearest to their shares. A moved request is taken to find
    nothing of its prefix at its new place, and is not moved again before the figures have been
    counted anew; only requests whose prefixes are short enough for the budget are looked at.
    """
    owner = owner.copy()
    budget = MOVE_BUDGET * float(plan.shared_with_previous.sum())
    for _ in range(_ROUNDS):
        spent = _even_out_once(sums, owner, replicas, budget)
        if spent is None:
            break
        budget -= spent
    return owner


def _even_out_once(sums: _Sums, owner: Ints, replicas: int, budget: float) -> float | None:
    """Changes `owner` in place; the prefix tokens that it cost, None if nothing was moved."""
    compute, prefix = np.zeros(replicas), np.zeros(len(owner), dtype=np.int64)
    for k in range(replicas):
        at = np.flatnonzero(owner == k)
        shared = sums.shared(at)
        compute[k] = (sums.compute[at] - sums.saved(at, shared)).sum()
        prefix[at] = np.maximum(shared, np.append(shared, 0)[1:])
    tail = sums.compute - sums.saved(np.arange(len(owner)), prefix)
    memory = np.bincount(owner, sums.memory, minlength=replicas)
    scale = max(float(compute.mean()), float(memory.mean()))
    settled = np.zeros(len(owner), dtype=bool)
    spent: float | None = None
    for _ in range(_STEPS_PER_REPLICA * replicas if scale > 0 else 0):
        off = np.stack((compute - compute.mean(), memory - memory.mean())) / scale  # [2, k]
        if float(np.abs(off).max()) <= BALANCE_TOLERANCE:
            break
        # Two at most from either side.
        movable = ~settled & (4 * prefix <= budget - (spent or 0.0))
        step = None
        by_distance = [int(k) for k in np.argsort(-(off**2).sum(axis=0), kind="stable")]
        for first in by_distance:
            found = []
            for candidate in range(replicas):
                if candidate != first:
                    pair = (first, candidate)
                    exchange = _best_exchange(sums, owner, movable, tail, off, scale, pair)
                    found += [(*exchange, *pair)] if exchange else []
            if found:
                step = max(found)
                break
        if step is None:
            break
        _, forth, back, worst, other = step
        for bundle, source, target in ((forth, worst, other), (back, other, worst)):
            for moved in bundle:
                owner[moved] = target
                settled[moved] = True
                compute[source] -= tail[moved]
                compute[target] += sums.compute[moved]
                memory[source] -= sums.memory[moved]
                memory[target] += sums.memory[moved]
                spent = (spent or 0.0) + float(prefix[moved])
    return spent


def _best_exchange(
    sums: _Sums,
    owner: Ints,
    movable: NDArray[np.bool_],
    tail: Floats,
    off: Floats,
    scale: float,
    pair: tuple[int, int],
) -> tuple[float, tuple[int, ...], tuple[int, ...]] | None:
    """(gain, positions from the first replica of the pair, positions from the second), up to two
    of each; None without a gain."""
    sides = []
    for replica in pair:
        at = np.flatnonzero((owner == replica) & movable)
        at = at[np.argsort(-(tail[at] + sums.memory[at]), kind="stable")]
        one, other = np.triu_indices(min(len(at), _PAIRED), k=1)
        pairs = np.stack((at[one], at[other]))
        if len(at) > _CANDIDATES:
            # By weight, at equal distances: large ones to come near, small ones to come nearer.
            at = at[np.unique(np.geomspace(1, len(at), _CANDIDATES).astype(np.int64) - 1)]
        nothing = np.full(len(at) + 1, -1)
        singles = np.stack((np.append(at, -1), nothing))
        sides.append(np.concatenate((singles, pairs), axis=1))  # [2, options], -1: no request
    forth, back = sides

    def cost(values: Floats, at: Ints) -> Floats:
        return np.asarray(np.where(at >= 0, values[at], 0.0).sum(axis=0) / scale)

    # Deviations after the exchange, [forth, back].
    first, second = pair
    before = float((off[:, pair] ** 2).sum())
    after = np.zeros((forth.shape[1], back.shape[1]))
    for row, own, away in ((0, tail, sums.compute), (1, sums.memory, sums.memory)):
        after += (off[row, first] - cost(own, forth)[:, None] + cost(away, back)[None, :]) ** 2
        after += (off[row, second] + cost(away, forth)[:, None] - cost(own, back)[None, :]) ** 2
    i, j = np.unravel_index(int(np.argmin(after)), after.shape)
    gain = before - float(after[i, j])
    if gain <= 1e-12:
        return None
    taken, given = (
        [int(at) for at in side[:, k] if at >= 0] for side, k in ((forth, i), (back, j))
    )
    return gain, tuple(taken), tuple(given)


def _sub_plan(plan: Plan, sums: _Sums, at: Ints) -> Plan:
    """The plan of the requests at these positions, in the same order, with their own figures."""
    order = plan.order[at]
    shared = sums.shared(at)
    planned = PrefixTree.from_lcp(order, sums.length[at], shared)
    saved = sums.encoder.saved(sums.cost_model)
    compute = amortised_compute(planned, sums.compute[at], saved)
    memory = sums.memory[at]
    rho = density(compute, memory)
    request_density = np.full_like(plan.request_density, np.nan)
    request_density[order] = rho
    prompt_tokens = int(sums.length[at].sum())
    best = int(sums.common.along(np.sort(sums.leaf[at])).sum())
    return replace(
        plan,
        order=order,
        density=rho,
        shared_with_previous=shared,
        compute_seconds=compute,
        memory_seconds=memory,
        request_density=request_density,
        sample=plan.sample[np.isin(plan.sample, order)],
        target_density=float(density(compute.sum(), memory.sum())),
        prompt_tokens=prompt_tokens,
        unique_tokens=prompt_tokens - best,
        sharing_best=best / prompt_tokens if prompt_tokens else 0.0,
        sharing_planned=planned.sharing_ratio,
    )
