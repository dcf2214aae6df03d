"""SGLang's radix cache with the future written on its nodes: ``--radix-cache-backend blendserve``.

A planned request carries who needs each of its prefixes next (``runtime/plan_tag.py``). When its KV
enters the tree, the nodes on its path are told; eviction takes the leaf whose next use is farthest
(``runtime/eviction_order.py``). All else is SGLang's: matching, locks, splitting and freeing.

The base is ``RadixCache``, which keeps its nodes in Python in every supported release; the tree
that SGLang has used for itself since 0.5.19 keeps them out of reach. It knows full attention only,
so other models keep SGLang's own cache.
"""

from __future__ import annotations

import logging
import time
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

from sglang.srt.mem_cache.base_prefix_cache import EvictParams, EvictResult
from sglang.srt.mem_cache.radix_cache import RadixCache
from sglang.srt.mem_cache.registry import (
    default_radix_cache_factory,
    get_radix_cache_factory,
    register_radix_cache_backend,
)

from blendserve.config import load_settings
from blendserve.planner import CostModel, NextUse, Side
from blendserve.policy.kv_account import MIN_SHARED_TOKENS
from blendserve.runtime.device import cost_model_of
from blendserve.runtime.eviction_order import NEVER, EvictionOrder, NodeFuture
from blendserve.runtime.plan_tag import PLAN_ATTRIBUTE, PlanTag, UseTag
from blendserve.runtime.started_prompts import namespace_of

logger = logging.getLogger(__name__)

BACKEND = "blendserve"
# A node is cut no finer than this when only a part of it must go: every cut costs two small copies.
_TRIM_TOKENS = 128
# Policies whose key of a node can fall while it stands in the order, or is not kept by RadixCache.
_UNORDERED_POLICIES = frozenset({"mru", "tlru"})


@dataclass(frozen=True)
class NodeAnnotation:
    """A node of the tree as the planner would see it.

    Attributes:
        start, end: prompt positions that it covers, in tokens.
        compute_seconds: what a hit on it saves.
        kv_bytes: what it holds.
        density: compute_seconds over the seconds in which one decode step reads kv_bytes.
        next_use: number of the next planned request that needs it, NEVER if none does, None if it
            is not planned.
        distance: expected number of requests until it is used again.
    """

    start: int
    end: int
    compute_seconds: float
    kv_bytes: float
    density: float
    next_use: float | None
    distance: float


class BlendRadixCache(RadixCache):  # type: ignore[misc]
    """A radix cache that evicts what is needed last.

    Args:
        params: SGLang's.
        cost_model: seconds of compute and of memory traffic, for the annotations.

    Attributes:
        evicted_tokens: by what was known of them: "never", "planned", "online".
        on_planned_eviction: called with the first tokens of a path of which a part was evicted that
            planned requests need yet, and with their namespace.
    """

    evictable_leaves: set[Any]

    def __init__(self, params: Any, cost_model: CostModel) -> None:
        self._cost_model = cost_model
        self._inserted: list[Any] | None = None
        self._let_go: list[Any] = []  # Meanwhile.
        self._own_eviction = False
        self.evicted_tokens: Counter[str] = Counter()
        self.on_planned_eviction: Callable[[list[int], str], object] | None = None
        super().__init__(params)

    def reset(self) -> None:
        super().reset()
        self.root_node.blend_future = NodeFuture()
        self._order = EvictionOrder(self.evictable_leaves, self.eviction_strategy.get_priority)

    # -- what enters the tree is told its future -----------------------------------------------

    # SGLang's names for this differ by release.

    def cache_unfinished_req(self, req: Any, *args: Any, **kwargs: Any) -> None:
        """After a chunk and a prompt, up to 0.5.21."""
        self._enter(super().cache_unfinished_req, req, *args, **kwargs)

    def cache_finished_req(self, req: Any, *args: Any, **kwargs: Any) -> None:
        """At the end, up to 0.5.20."""
        self._order.ticks += 1
        self._enter(super().cache_finished_req, req, *args, **kwargs)

    def insert_req(self, req: Any, *args: Any, **kwargs: Any) -> None:
        """At the end, 0.5.21."""
        self._order.ticks += 1
        self._enter(super().insert_req, req, *args, **kwargs)

    def checkpoint(self, req: Any, *args: Any, **kwargs: Any) -> None:
        """After a chunk, a prompt and at the end, from 0.5.22 on."""
        self._order.ticks += bool(req.finished())
        self._enter(super().checkpoint, req, *args, **kwargs)

    def _enter(self, enter: Callable[..., None], req: Any, *args: Any, **kwargs: Any) -> None:
        """Let SGLang enter a request into the tree, then write its future on the path."""
        inserted: list[Any] = []
        self._inserted = inserted
        try:
            enter(req, *args, **kwargs)
        finally:
            self._inserted = None
            if inserted:
                # SGLang inserts the whole path first; a second insertion only cuts it in two.
                self._learn(inserted[0], use_tag(req))
            # What it let go of without an insertion, as of a request that lost its memory.
            for node in self._let_go:
                _future(node)
                self._queue(node)
            self._let_go.clear()

    def insert(self, params: Any) -> Any:
        result = super().insert(params)
        node = result.last_device_node
        if node is not None and self._inserted is not None:
            self._inserted.append(node)
        elif node is not None:
            self._learn(node, None)
        return result

    def _learn(self, node: Any, tag: UseTag | None) -> None:
        if tag is None:
            for on_path in self._path(node):
                future = _future(on_path)
                future.used_at, future.online = self._order.ticks, True
                self._queue(on_path)
            return
        self._order.advance(tag.job, tag.side, tag.due, tag.since)
        corners = self._corners(tag.next_uses)
        end = sum(len(on_path.key) for on_path in self._path(node))
        due, side = NEVER, tag.side
        while node is not self.root_node:
            while corners and corners[-1][0] >= end:
                _, due, side = corners.pop()
            start = end - len(node.key)
            if corners and corners[-1][0] > start:
                # The front part is needed sooner than the rest, which may go before it.
                self._split_node(node.key, node, corners[-1][0] - start)
                start = corners[-1][0]
            future = _future(node)
            future.used_at = self._order.ticks
            self._order.learn(future, due, self._order.scan_end(tag.job, side), tag.due)
            self._queue(node)
            node, end = node.parent, start

    def _corners(self, uses: tuple[NextUse, ...]) -> list[tuple[int, float, Side]]:
        """(cached positions, due, side), where only whole pages can be shared."""
        corners: list[tuple[int, float, Side]] = []
        for use in uses:
            # With EAGLE a position is a pair of neighbouring tokens.
            positions = use.prefix_tokens - int(self.is_eagle)
            positions = positions // self.page_size * self.page_size
            if positions > (corners[-1][0] if corners else 0):
                corners.append((positions, use.due, use.side))
        return corners

    def _path(self, node: Any) -> Iterator[Any]:
        """A node and its ancestors, without the root."""
        while node is not self.root_node:
            yield node
            node = node.parent

    def _queue(self, node: Any) -> None:
        if node in self.evictable_leaves:
            self._order.add(node)

    def _update_leaf_status(self, node: Any) -> None:
        super()._update_leaf_status(node)
        # What is being inserted is queued once its future is known.
        if self._inserted is not None:
            self._let_go.append(node)
        elif hasattr(node, "blend_future"):
            self._queue(node)

    def _split_node(self, key: Any, child: Any, split_len: int) -> Any:
        front = super()._split_node(key, child, split_len)
        front.blend_future = _future(child).copy()
        return front

    # -- eviction ------------------------------------------------------------------------------

    def evict(self, params: Any) -> Any:
        if self.disable:
            return EvictResult()
        started = time.perf_counter()
        evicted = 0
        while evicted < params.num_tokens:
            leaf = self._order.first()
            if leaf is None:
                break
            evicted += self._evict_leaf(leaf, params.num_tokens - evicted)
        self.update_eviction_metrics(evicted, started)
        return EvictResult(num_tokens_evicted=evicted)

    def _evict_leaf(self, leaf: Any, wanted: int) -> int:
        """Evict a leaf, or its end if the rest may stay; returns the number of tokens."""
        known = _kind(leaf.blend_future)
        kept = (len(leaf.key) - max(wanted, _TRIM_TOKENS)) // self.page_size * self.page_size
        if kept > 0 and known != "never":
            self._split_node(leaf.key, leaf, kept)
        size = len(leaf.key)
        # With EAGLE a position is a pair of tokens.
        if known == "planned" and self.on_planned_eviction is not None and not self.is_eagle:
            self.on_planned_eviction(self._first_tokens(leaf), namespace_of(leaf.key))
        # SGLang's own eviction, shown this one leaf, frees it and keeps its books.
        leaves, self.evictable_leaves = self.evictable_leaves, {leaf}
        self._own_eviction = True
        try:
            super().evict(EvictParams(num_tokens=size))
        finally:
            self._own_eviction = False
            leaves.discard(leaf)
            leaves |= self.evictable_leaves
            self.evictable_leaves = leaves
        self._order.forget(leaf)
        self.evicted_tokens[known] += size
        return size

    def _first_tokens(self, node: Any) -> list[int]:
        """The first tokens of the path to a node, at most MIN_SHARED_TOKENS."""
        tokens: list[int] = []
        for on_path in reversed([*self._path(node)]):
            tokens.extend(on_path.key.token_ids[: MIN_SHARED_TOKENS - len(tokens)])
            if len(tokens) >= MIN_SHARED_TOKENS:
                break
        return tokens

    def update_eviction_metrics(self, num_evicted: int, start_time: float) -> None:
        # One observation for a call of evict, as SGLang makes it, and not one for each leaf.
        if not self._own_eviction:
            super().update_eviction_metrics(num_evicted, start_time)

    # -- view ----------------------------------------------------------------------------------

    def annotation(self, node: Any) -> NodeAnnotation:
        """What is known of a node; it must not be the root."""
        end = sum(len(on_path.key) for on_path in self._path(node))
        start = end - len(node.key)
        saved = self._cost_model.prefill_seconds_saved
        compute = float(saved(end) - saved(start))
        kv_bytes = float((end - start) * self._cost_model.model.kv_bytes_per_token)
        return NodeAnnotation(
            start=start,
            end=end,
            compute_seconds=compute,
            kv_bytes=kv_bytes,
            density=compute / ((end - start) * self._cost_model.rates.context),
            next_use=node.blend_future.due,
            distance=self._order.distance(node),
        )


def _future(node: Any) -> NodeFuture:
    """A node's future. SGLang makes nodes in several places, so it is added when first needed."""
    future: NodeFuture | None = getattr(node, "blend_future", None)
    if future is None:
        future = node.blend_future = NodeFuture()
    return future


def use_tag(req: Any) -> UseTag | None:
    """What a request says about the future of its prefixes; read once."""
    try:
        tag: UseTag | None = req.blend_use_tag
    except AttributeError:
        plan = getattr(req, PLAN_ATTRIBUTE, None)
        if plan is None:
            plan = PlanTag.from_params(req.sampling_params.custom_params)
        tag = req.blend_use_tag = None if plan is None else plan.use
    return tag


def _kind(future: NodeFuture) -> str:
    if future.due is None or future.online:
        return "online"
    return "never" if future.due == NEVER else "planned"


# -- registration ------------------------------------------------------------------------------


def register() -> None:
    """Make ``--radix-cache-backend blendserve`` known to SGLang in this process."""
    if get_radix_cache_factory(BACKEND) is None:
        register_radix_cache_backend(BACKEND, create_radix_cache)


def create_radix_cache(ctx: Any) -> Any:
    """SGLang's factory protocol: our cache, or SGLang's own where ours is not complete."""
    reason = unsuitable(ctx)
    if reason is not None:
        logger.warning("blendserve: %s, so SGLang's own radix cache is used", reason)
        return default_radix_cache_factory(ctx)
    return BlendRadixCache(
        ctx.params, cost_model_of(ctx.model_config, ctx.tp_size, load_settings())
    )


def unsuitable(ctx: Any) -> str | None:
    """Why our cache cannot serve this engine, or None if it can."""
    args, params = ctx.server_args, ctx.params
    policy = params.eviction_policy.lower()
    allocator = params.token_to_kv_pool_allocator
    reasons = {
        "the radix cache is switched off": ctx.disable_radix_cache,
        "the model has sliding-window attention": ctx.is_hybrid_swa,
        "the model has state-space (mamba) layers": ctx.is_hybrid_ssm,
        "the KV cache has a second level in host memory": ctx.enable_hierarchical_cache,
        "LMCache is on": getattr(args, "enable_lmcache", False),
        "FlexKV is on": getattr(args, "enable_flexkv", False),
        "an external cache linker is on": getattr(
            args, "enable_unified_cache_external_linker", False
        ),
        "sessions hold references to cached KV": params.enable_session_radix_cache,
        "prefill and decode run on separate engines": (
            getattr(args, "disaggregation_mode", "null") != "null"
        ),
        "KV pages are spread over several ranks": (getattr(allocator, "shard_size", 1) > 1),
        f"--radix-eviction-policy {policy} cannot be combined with a plan": (
            policy in _UNORDERED_POLICIES
        ),
    }
    return next((reason for reason, applies in reasons.items() if applies), None)
