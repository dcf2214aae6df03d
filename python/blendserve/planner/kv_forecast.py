"""The KV memory that running requests will still take and give back, kept up to date cheaply.

All running requests decode in step, so time is counted in decode steps. A request that is expected
to produce r more tokens ends r steps from now; until then it takes one token per step, and then it
gives back everything that it holds. What the pool must still provide is the largest sum of these at
any time to come.
"""

from __future__ import annotations

import math
from collections.abc import Hashable
from dataclasses import dataclass

import numpy as np

from .prefix_tree import Floats

_BUCKETS = 256


@dataclass(slots=True)
class _Entry:
    """One running request.

    end: decode step at which it is expected to end.
    held: KV tokens that it holds, less the clock; so it holds `held + clock` at any time, and the
        entry need not be touched while it grows.
    """

    end: float
    held: float
    variance: float


class KVForecast:
    """Expected demand for KV tokens over the decode steps to come.

    Ends are kept in buckets of equal width. Within one, nobody gives memory back before all have
    grown to their end, so the peak is never below the exact one; it is above by at most one
    bucket's worth of growth. The width doubles when a request ends beyond the last bucket. Every
    method costs O(buckets) at the most, whatever the number of requests.

    With T the end of a bucket, the demand within it is the growth of those that end in it, plus
    T - clock for each that ends later, less what each that ended before holds now. The clock is
    the same part, -clock, of every running request's share; what is left changes only when a
    request comes or goes, and is what `_demand` keeps.

    Deterministic, without clock or I/O of its own.

    Args:
        deviations: how many standard deviations of the sum of all remaining tokens are added to
            the peak, errors taken as independent.
    """

    def __init__(self, deviations: float = 0.0) -> None:
        self._deviations = deviations
        self._entries: dict[Hashable, _Entry] = {}
        self._reset()

    def _reset(self) -> None:
        self._clock = 0
        self._width = 1
        # Bucket k holds the ends in ((first + k) width, (first + k + 1) width].
        self._first = 0
        self._ends = np.arange(1.0, _BUCKETS + 1)
        self._demand = np.zeros(_BUCKETS)
        self._members: list[dict[Hashable, None]] = [{} for _ in range(_BUCKETS)]
        self._held = 0.0
        self._last_steps = 0.0  # Sum over the requests of the step at which each ends.
        self._variance = 0.0

    def __len__(self) -> int:
        return len(self._entries)

    def add(
        self, key: Hashable, remaining_tokens: float, held_tokens: float, deviation: float = 0.0
    ) -> None:
        """A request starts, or is estimated anew under the same key.

        Args:
            key: the request.
            remaining_tokens: output tokens that it is expected to produce yet; below 1 counts as 1.
            held_tokens: KV tokens that it holds now, alone, and gives back at its end.
            deviation: standard deviation of remaining_tokens.
        """
        if key in self._entries:
            self.end(key)
        end = self._reach(remaining_tokens)
        entry = _Entry(end, held_tokens - self._clock, deviation * deviation)
        self._entries[key] = entry
        self._members[self._bucket(end)][key] = None
        self._count(entry)

    def end(self, key: Hashable) -> None:
        """A request has ended, or lost its memory. An unknown key is no error: it never started."""
        entry = self._entries.pop(key, None)
        if entry is None:
            return
        if not self._entries:
            # Also rids the sums of what floating-point differences have left in them.
            self._reset()
            return
        bucket = self._bucket(entry.end)
        del self._members[bucket][key]
        demand = self._demand
        if bucket:
            before = demand[:bucket]
            np.subtract(before, self._ends[:bucket], out=before)
        demand[bucket] -= entry.end
        after = demand[bucket + 1 :]
        np.add(after, entry.held, out=after)
        self._held -= entry.held
        self._last_steps -= entry.end
        self._variance = max(self._variance - entry.variance, 0.0)

    def _count(self, entry: _Entry) -> None:
        bucket = self._bucket(entry.end)
        demand = self._demand
        if bucket:
            before = demand[:bucket]
            np.add(before, self._ends[:bucket], out=before)
        demand[bucket] += entry.end
        after = demand[bucket + 1 :]
        np.subtract(after, entry.held, out=after)
        self._held += entry.held
        self._last_steps += entry.end
        self._variance += entry.variance

    def hold(self, key: Hashable, tokens: float) -> None:
        """Change what a request alone holds by `tokens`, as when another comes to share it."""
        entry = self._entries.get(key)
        if entry is not None:
            entry.held += tokens
            self._held += tokens
            self._demand[self._bucket(entry.end) + 1 :] -= tokens

    def advance(self) -> dict[Hashable, float]:
        """One decode step has passed.

        Returns:
            Who was expected to end by now and has not, with the KV tokens that it holds. They are
            no longer part of the forecast, until `add` gives them a new end.
        """
        if not self._entries:
            return {}
        self._clock += 1
        if self._clock < (self._first + 1) * self._width:
            return {}
        overdue = {key: self._entries[key].held + self._clock for key in self._members[0]}
        for key in overdue:
            self.end(key)
        if self._entries:
            # The first bucket is empty now. Behind the last one, everyone has ended.
            self._demand[:-1] = self._demand[1:]
            self._demand[-1] = -self._held
            self._members.append(self._members.pop(0))
            self._ends += self._width
            self._first += 1
        return overdue

    def held_by(self, key: Hashable) -> float:
        """KV tokens that one of them gives back at its end, as of now. Raises KeyError."""
        return self._entries[key].held + self._clock

    def held_tokens(self) -> float:
        """KV tokens that the running requests give back at their ends, as of now."""
        return self._held + len(self._entries) * self._clock

    def remaining_tokens(self) -> float:
        """Output tokens that the running requests are expected to produce yet, all together."""
        return max(self._last_steps - len(self._entries) * self._clock, 0.0)

    def profile(self) -> tuple[Floats, int]:
        """(tokens, steps): what the running requests will hold at the end of each of the next
        stretches of so many steps, until the last one has ended."""
        tokens = np.maximum(self._held + self._demand, 0.0) if self._entries else np.empty(0)
        alive = np.flatnonzero(tokens > 0.5)
        return tokens[: alive[-1] + 1 if len(alive) else 0], self._width

    def peak_tokens(self) -> float:
        """The most free tokens that the running requests will take at any time from now on."""
        if not self._entries:
            return 0.0
        return self._above(float(self._demand.max()), len(self._entries), self._variance)

    def peak_tokens_with(
        self, remaining_tokens: float, held_tokens: float, deviation: float = 0.0
    ) -> float:
        """`peak_tokens` if one more request started now. Its held_tokens are not part of it."""
        end = self._reach(remaining_tokens)
        bucket = self._bucket(end)
        demand = self._demand
        peak = float(demand[bucket]) + end
        if bucket:
            peak = max(peak, float((demand[:bucket] + self._ends[:bucket]).max()))
        if bucket + 1 < _BUCKETS:
            peak = max(peak, float(demand[bucket + 1 :].max()) - (held_tokens - self._clock))
        return self._above(peak, len(self._entries) + 1, self._variance + deviation * deviation)

    def _above(self, demand: float, requests: int, variance: float) -> float:
        return max(demand - requests * self._clock, 0.0) + self._deviations * math.sqrt(variance)

    def _bucket(self, end: float) -> int:
        return max(math.ceil(end / self._width) - 1 - self._first, 0)

    def _reach(self, remaining_tokens: float) -> float:
        """The step at which a request with that much left ends, brought within the buckets."""
        end = self._clock + max(remaining_tokens, 1.0)
        while end > (self._first + _BUCKETS) * self._width:
            self._widen()
        return end

    def _widen(self) -> None:
        """Make the buckets twice as wide."""
        self._width *= 2
        self._first //= 2
        self._ends = (np.arange(_BUCKETS) + self._first + 1.0) * self._width
        self._members = [{} for _ in range(_BUCKETS)]
        self._demand[:] = 0.0
        self._held = self._last_steps = self._variance = 0.0
        for key, entry in self._entries.items():
            self._members[self._bucket(entry.end)][key] = None
            self._count(entry)
