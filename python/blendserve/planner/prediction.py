"""What a job will take under four orders, from the cost model alone: no engine, no clock.

The assumptions, which `docs/planner.md` repeats:

- Cache. The KV pool is one LRU cache of `capacity` tokens. A request finds the longest prefix of
  its prompt that is in it, then puts its whole prompt and its output there; what has not been used
  for longest is dropped from its end. That is token-exact, but takes requests one after the other:
  memory that a long decode keeps locked is not held back.
- Time. `timeline`: what the steps of such a run cost where nothing overlaps, its tail of lone
  decodes included. The engine is the same for all orders; but for blend, whose steps are paced.
- Balance. Along an order, requests are cut into windows that each fill the pool once, counting the
  uncached prompt and half the output (p + d / 2) of each.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from .cost_model import CostModel
from .dual_scanner import account_tokens
from .plan import Plan
from .prefix_tree import Floats, Ints, PrefixTree
from .timeline import Work, run_course

# Part of the device memory that weights and KV cache get; engines leave the rest to activations.
MEMORY_FRACTION = 0.9
# Part of it for KV where there are states of linear attention, too: SGLang's
# --mamba-full-memory-ratio 0.9 gives these nine tenths of what the KV pool gets.
_KV_PART = 1 / 1.9


def kv_capacity_tokens(cost_model: CostModel) -> int:
    """Tokens of KV cache beside the weights: (0.9 x memory - weights) / KV bytes per token.

    Raises ValueError when there is no room for a single one.
    """
    model, device = cost_model.model, cost_model.hardware
    left = device.memory_bytes * MEMORY_FRACTION - model.weight_bytes
    if model.state_bytes:
        left *= _KV_PART  # The rest holds the states of linear attention.
    tokens = int(left / model.pool_bytes_per_token)
    if tokens < 1:
        raise ValueError(
            f"{model.name} takes {model.weight_bytes / 1e9:.1f} GB for its weights; "
            f"{MEMORY_FRACTION:.0%} of {device.name}'s {device.memory_bytes / 1e9:.0f} GB leaves "
            "no room for a KV cache: take more devices (tensor parallel) or a smaller model"
        )
    return tokens


def replay_cache(tree: PrefixTree, leaves: Ints, output_tokens: Floats, capacity: float) -> Ints:
    """Prompt tokens that each request finds in an LRU cache, shape (k,).

    leaves: (k,) leaf numbers in the order in which they run, each at most once. output_tokens:
    (k,) tokens that each leaves in the cache beside its prompt. Time: the sum of the path lengths.

    A cache entry is an edge of the tree with the tokens of it that are still there. A use touches
    its path from the leaf upwards, so a prefix is always younger than what continues it: eviction
    trims the far end of the oldest entry and never breaks a path.
    """
    parent, leaf_parent = tree.parent.tolist(), tree.leaf_parent.tolist()
    edge = (tree.depth - tree.depth[np.maximum(tree.parent, 0)]).tolist()
    own_tokens = (
        tree.length[leaves] - tree.depth[tree.leaf_parent[leaves]] + output_tokens
    ).tolist()
    entries: OrderedDict[int, float] = OrderedDict()  # node, or -1 - leaf, oldest first
    used = 0.0
    found = []
    for leaf, own in zip(leaves.tolist(), own_tokens, strict=True):
        node = leaf_parent[leaf]
        hit = 0.0
        entries[-1 - leaf] = own
        used += own
        while node:
            # Where a part of an edge is gone, all below it is gone too and has added nothing.
            there = entries.pop(node, 0.0)
            hit += there
            entries[node] = edge[node]
            used += edge[node] - there
            node = parent[node]
        while used > capacity:
            oldest, size = next(iter(entries.items()))
            excess = used - capacity
            if size > excess:
                entries[oldest] = size - excess
                used = capacity
            else:
                del entries[oldest]
                used -= size
        found.append(hit)
    return np.floor(np.array(found, dtype=np.float64) + 1e-6).astype(np.int64)


def dual_scan_sequence(plan: Plan) -> tuple[Ints, NDArray[np.bool_]]:
    """(order, left): the requests as the two scanners take them, and whether the left one did.

    The next request comes from the left while less of the job's compute than of its memory time
    has been taken, else from the right: so the target density, which is that of what is left, is
    kept to within one request.
    """
    compute, memory = plan.compute_seconds.tolist(), plan.memory_seconds.tolist()
    all_compute, all_memory = sum(compute), sum(memory)
    low, high = 0, len(compute) - 1
    taken_compute = taken_memory = 0.0
    positions, left = [], []
    while low <= high:
        from_left = taken_compute * all_memory <= taken_memory * all_compute
        at = low if from_left else high
        low, high = (low + 1, high) if from_left else (low, high - 1)
        taken_compute += compute[at]
        taken_memory += memory[at]
        positions.append(at)
        left.append(from_left)
    return plan.order[np.array(positions, dtype=np.int64)], np.array(left, dtype=bool)


@dataclass(frozen=True, eq=False)
class OrderPrediction:
    """One order on one replica; arrays of shape (k,) in that order.

    order: request indices. cached_tokens: of each prompt. compute_seconds: without what the cache
    saves. window: number of the pool filling that the request is part of.
    seconds: of the run. sharing: part of the prompt tokens that is found in the cache.
    tail_seconds: at the end of the run, in which few requests are left; last: these, indices, those
    that end last first.
    """

    order: Ints
    cached_tokens: Ints
    compute_seconds: Floats
    memory_seconds: Floats
    window: Ints
    seconds: float
    sharing: float
    tail_seconds: float
    last: Ints

    def window_seconds(self) -> tuple[Floats, Floats]:
        """(compute, memory) seconds of each window."""
        return (
            np.bincount(self.window, self.compute_seconds).astype(np.float64),
            np.bincount(self.window, self.memory_seconds).astype(np.float64),
        )


def predict_order(
    plan: Plan,
    order: Ints,
    cost_model: CostModel,
    capacity: float,
    left: NDArray[np.bool_] | None = None,
) -> OrderPrediction:
    """What running these requests of the plan's job in this order takes; left: see `run_course`.

    A request belongs to window floor(F / capacity), F being the sum of (p - c) + d / 2 over those
    before it, with c cached tokens each.
    """
    tree = plan.tree
    leaf = np.empty(tree.num_leaves, dtype=np.int64)
    leaf[tree.requests] = np.arange(tree.num_leaves)
    leaves = leaf[order]
    prompt, output = tree.length[leaves], plan.estimated_output_tokens[order]
    cached = replay_cache(tree, leaves, output, capacity)
    compute = plan.encoder.compute_seconds(cost_model, order, prompt, output)
    compute = compute - plan.encoder.saved_seconds(cost_model, order, cached)
    memory = cost_model.memory_seconds(prompt, output)
    held = np.asarray(account_tokens(prompt - cached, output), dtype=np.float64)  # type: ignore[arg-type]
    window = np.floor((np.cumsum(held) - held) / capacity).astype(np.int64)
    work = Work(prompt.astype(np.float64), cached.astype(np.float64), output)
    course = run_course(work, cost_model.step_costs, capacity, left)
    # Parts of steps are counted there, so that a handful of tokens would cost nothing.
    seconds = max(course.total_seconds, float(compute.sum()), float(memory.sum()))
    tail, last = course.tail()
    total = int(prompt.sum())
    return OrderPrediction(
        order=order,
        cached_tokens=cached,
        compute_seconds=compute,
        memory_seconds=memory,
        window=window,
        seconds=seconds,
        sharing=int(cached.sum()) / total if total else 0.0,
        tail_seconds=tail * seconds,
        last=order[last],
    )


@dataclass(frozen=True, eq=False)
class Prediction:
    """A job under four orders.

    *_seconds: of the slowest replica. fcfs: lines as they stand in the file. dfs: depth first
    through the prefix tree, by content. blend: the plan, scanned from both ends. bound: nothing
    is faster even where all overlaps: max(sum of compute after the best sharing, sum of memory)
    over the replicas.
    sharing_random, sharing_planned: cached part of the prompt tokens in a shuffled order and in
    the scanned plan.
    fcfs, dfs, blend: the runs themselves, one per replica.
    """

    fcfs: Sequence[OrderPrediction]
    dfs: Sequence[OrderPrediction]
    blend: Sequence[OrderPrediction]
    bound_seconds: float
    sharing_random: float
    sharing_planned: float

    @property
    def fcfs_seconds(self) -> float:
        return max(run.seconds for run in self.fcfs)

    @property
    def dfs_seconds(self) -> float:
        return max(run.seconds for run in self.dfs)

    @property
    def blend_seconds(self) -> float:
        return max(run.seconds for run in self.blend)


def predict(
    plan: Plan,
    cost_model: CostModel,
    capacity: float,
    replicas: Sequence[Plan] = (),
    seed: int = 0,
) -> Prediction:
    """Predicts the planned requests of a job.

    capacity: KV tokens of a replica, see `kv_capacity_tokens`. replicas: the sub-plans of a
    data-parallel run (`partition`); the other orders are then dealt out as is usual without a
    plan: FCFS in turns, a depth-first order in pieces of equal work (compute plus memory). seed:
    of the shuffle. Raises ValueError for capacity < 1.
    """
    if not capacity >= 1:
        raise ValueError(f"capacity must be at least one token, not {capacity}")
    sub_plans = list(replicas) or [plan]
    k = len(sub_plans)

    def run(order: Ints, left: NDArray[np.bool_] | None = None) -> OrderPrediction:
        return predict_order(plan, order, cost_model, capacity, left)

    given = np.sort(plan.order)
    planned = np.zeros(plan.tree.num_leaves, dtype=bool)
    planned[plan.order] = True
    tree = plan.tree.subset(planned[plan.tree.requests])
    output = plan.estimated_output_tokens[tree.requests]
    compute = plan.encoder.compute_seconds(cost_model, tree.requests, tree.length, output)
    compute = compute - plan.encoder.saved_seconds(cost_model, tree.requests, tree.shared)
    memory = cost_model.memory_seconds(tree.length, output)
    work = np.cumsum(compute + memory)
    cuts = np.searchsorted(work, (work[-1] if len(work) else 0.0) * np.arange(1, k) / k)
    blend = [run(*dual_scan_sequence(sub)) for sub in sub_plans]
    found = sum(int(part.cached_tokens.sum()) for part in blend)
    return Prediction(
        fcfs=[run(given[part::k]) for part in range(k)],
        dfs=[run(piece) for piece in np.split(tree.requests, cuts)],
        blend=blend,
        bound_seconds=float(max(compute.sum(), memory.sum())) / k,
        sharing_random=run(np.random.default_rng(seed).permutation(given)).sharing,
        sharing_planned=found / plan.prompt_tokens if plan.prompt_tokens else 0.0,
    )
