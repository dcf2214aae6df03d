"""Schedulers that start requests in one fixed order, with the memory test that all share."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable

from blendserve.planner import MemoryForecast
from blendserve.planner.memory_forecast import DEVIATIONS

from .engine import Engine
from .lengths import LengthBook

# Tokens of a step, decodes included: what NanoFlow runs Llama-3.1-8B with on an A100.
CHUNK_TOKENS = 2_048
# A shared prefix shorter than this is cheaper computed twice than waited for (as in the runtime).
MIN_SHARED_TOKENS = 16
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

    def mean_tokens(self, engine: Engine, request: int, private_tokens: int) -> float:
        """What would be held on average while this request runs, if it started too."""
        self.forecast.advance(engine.now)
        return self.forecast.mean_tokens_with(
            engine.now, private_tokens, self._rest(engine, request)
        )

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

    def ended(self, engine: Engine, request: int) -> None:
        self._memory.ended(engine, request)

    def retracted(self, engine: Engine, request: int) -> None:
        self._memory.ended(engine, request)
        self._waiting.appendleft(request)
