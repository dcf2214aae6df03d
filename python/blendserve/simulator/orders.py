"""Schedulers that start requests in one fixed order, with the memory test that all share."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable

import numpy as np
from numpy.typing import NDArray

from blendserve.planner import PrefixTree, StepPace
from blendserve.planner.step_pace import FULL_PART
from blendserve.policy import MemoryForecast, rest_density
from blendserve.policy.kv_account import MIN_SHARED_TOKENS
from blendserve.policy.memory_forecast import BIN_STEPS, DEVIATIONS
from blendserve.policy.pacing import PACE_STEPS, context_to_pace

from .engine import Engine
from .lengths import LengthBook

Ints = NDArray[np.int64]
Floats = NDArray[np.float64]

# Tokens of a step, decodes included: what NanoFlow runs Llama-3.1-8B with on an A100.
CHUNK_TOKENS = 2_048
# Decode-only steps after which a request that found no memory is looked at again.
PATIENCE_STEPS = 8


class MemoryTest:
    """Whether memory lasts if one more request starts, given what runs and will yet grow, by what
    is known of lengths. All policies have the same."""

    def __init__(self, book: LengthBook) -> None:
        self._book = book
        self.forecast = MemoryForecast(deviations=DEVIATIONS)

    def fits(
        self, engine: Engine, request: int, private_tokens: int, reserve_tokens: float = 0.0
    ) -> bool:
        cache, forecast = engine.cache, self.forecast
        if private_tokens > cache.capacity - cache.locked:
            return False
        forecast.advance(engine.now)
        limit = cache.capacity - cache.locked_shared - reserve_tokens
        return forecast.fits(engine.now, private_tokens, self._rest(engine, request), limit)

    def started(self, engine: Engine, request: int, own_tokens: int) -> None:
        self.forecast.add(request, engine.now, own_tokens, self._rest(engine, request))

    def ended(self, engine: Engine, request: int) -> None:
        self.forecast.remove(request)

    def learnt(self, engine: Engine) -> None:
        """The book knows more than when the running requests started."""
        self.forecast.update(engine.now, lambda request: self._rest(engine, request))

    def _rest(self, engine: Engine, request: int) -> list[float]:
        return self._book.rest(request, engine.generated.get(request, 0))


class OrderScheduler:
    """One queue in a given order; its head starts as soon as memory lasts."""

    def __init__(
        self, order: Iterable[int], book: LengthBook, chunk_tokens: int = CHUNK_TOKENS
    ) -> None:
        self._waiting = deque(order)
        self._chunk = chunk_tokens
        self._memory = MemoryTest(book)

    def prefill_budget(self, engine: Engine) -> int:
        return engine.prefill_room(self._chunk)

    def patience(self, engine: Engine) -> int:
        return PATIENCE_STEPS if self._waiting else 1 << 30

    def pick(self, engine: Engine) -> int | None:
        if not self._waiting:
            return None
        request = self._waiting[0]
        _, _, private, filling = engine.demand(request)
        if filling >= MIN_SHARED_TOKENS:
            return None
        if not engine.idle and not self._memory.fits(engine, request, private):
            return None
        return self._waiting.popleft()

    def started(self, engine: Engine, request: int, own_tokens: int) -> None:
        self._memory.started(engine, request, own_tokens)

    def prefilled(self, engine: Engine, request: int, context_tokens: int, done: int) -> None:
        """It was counted on when it started."""

    def ended(self, engine: Engine, request: int) -> None:
        self._memory.ended(engine, request)

    def retracted(self, engine: Engine, request: int) -> None:
        self._memory.ended(engine, request)
        self._waiting.appendleft(request)


class PacedOrderScheduler(OrderScheduler):
    """The same, but with the prefill of each step paced as ours is.

    work: (2, n) compute (after sharing) and memory seconds of each request, by request index.
    """

    def __init__(
        self, order: Iterable[int], book: LengthBook, pace: StepPace, work: Floats
    ) -> None:
        super().__init__(order, book, pace.chunk_tokens)
        self._pace, self._work = pace, work
        self._left = work.sum(axis=1)
        self._density, self._look_due = 0.0, 0

    def prefill_budget(self, engine: Engine) -> int:
        if not engine.mixed:
            return self._chunk
        if engine.totals.steps >= self._look_due:
            self._look_due = engine.totals.steps + PACE_STEPS
            self._look_ahead(engine)
        context = context_to_pace(engine.reads, engine.capacity, bool(self._waiting))
        return self._pace.prefill_tokens(self._density, context, engine.decoding)

    def started(self, engine: Engine, request: int, own_tokens: int) -> None:
        super().started(engine, request, own_tokens)
        self._left -= self._work[:, request]

    def retracted(self, engine: Engine, request: int) -> None:
        super().retracted(engine, request)
        self._left += self._work[:, request]

    def _look_ahead(self, engine: Engine) -> None:
        pace, forecast = self._pace, self._memory.forecast
        forecast.advance(engine.now)
        tokens, alive = forecast.profile(engine.now)
        more = engine.prefill_backlog + forecast.remaining_tokens(engine.now)
        self._density = rest_density(
            max(float(self._left[0]), 0.0) + more * pace.token_seconds,
            max(float(self._left[1]), 0.0),
            tokens * pace.context_seconds,
            alive * BIN_STEPS,
            pace.floor_seconds,
            FULL_PART * engine.capacity * pace.context_seconds,
        )


def sorted_depth_first(tree: PrefixTree, above: Floats, below: Floats) -> Ints:
    """Requests in a depth-first order in which the children of every node, leaves among them, stand
    by above / below of all requests under them, the largest first.

    above, below: (n,) in leaf order, below not negative.
    """
    ratio = _ratio(above, below)
    node_ratio = _ratio(tree.subtree_sum(above), tree.subtree_sum(below))
    children: list[list[tuple[float, int, int]]] = [[] for _ in range(tree.num_nodes)]
    for node in range(1, tree.num_nodes):
        children[tree.parent[node]].append((-node_ratio[node], int(tree.first[node]), node))
    for leaf, parent in enumerate(tree.leaf_parent.tolist()):
        children[parent].append((-ratio[leaf], leaf, -1))
    found: list[int] = []
    stack: list[tuple[float, int, int]] = [(0.0, 0, 0)]
    while stack:
        _, leaf, node = stack.pop()
        if node < 0:
            found.append(leaf)
        else:
            stack.extend(sorted(children[node], reverse=True))
    return np.asarray(tree.requests[np.array(found, dtype=np.int64)])


def _ratio(above: Floats, below: Floats) -> Floats:
    out = np.full(len(above), np.inf)
    np.divide(above, below, out=out, where=below > 0)
    return out
