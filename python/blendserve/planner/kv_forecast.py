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

    Adding, ending and moving the clock are O(1); the peak costs O(buckets), whatever the number of
    requests. Ends are kept in buckets of equal width. Within one, nobody gives memory back before
    all have grown to their end, so the peak is never below the exact one; it is above by at most
    one bucket's worth of growth. The width doubles when a request ends beyond the last bucket.

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
        self._count = np.zeros(_BUCKETS)
        self._held = np.zeros(_BUCKETS)
        self._end_and_held = np.zeros(_BUCKETS)
        self._bucket_ends = np.arange(1.0, _BUCKETS + 1)
        self._members: list[dict[Hashable, None]] = [{} for _ in range(_BUCKETS)]
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
        self._variance += entry.variance
        bucket = self._bucket(end)
        self._members[bucket][key] = None
        self._count[bucket] += 1
        self._held[bucket] += entry.held
        self._end_and_held[bucket] += end + entry.held

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
        self._count[bucket] -= 1
        self._held[bucket] -= entry.held
        self._end_and_held[bucket] -= entry.end + entry.held
        self._variance = max(self._variance - entry.variance, 0.0)

    def hold(self, key: Hashable, tokens: float) -> None:
        """Change what a request alone holds by `tokens`, as when another comes to share it."""
        entry = self._entries.get(key)
        if entry is not None:
            entry.held += tokens
            bucket = self._bucket(entry.end)
            self._held[bucket] += tokens
            self._end_and_held[bucket] += tokens

    def advance(self) -> list[Hashable]:
        """One decode step has passed. Returns who was expected to end by now and has not.

        They count as ending at once until `add` gives them a new end.
        """
        if not self._entries:
            return []
        self._clock += 1
        if self._clock < (self._first + 1) * self._width:
            return []
        overdue = list(self._members[0])
        for sums in (self._count, self._held, self._end_and_held):
            first = sums[0]
            sums[:-1] = sums[1:]
            sums[-1] = 0.0
            sums[0] += first
        members = self._members.pop(0)
        self._members.append({})
        self._members[0].update(members)
        self._first += 1
        self._bucket_ends += self._width
        return overdue

    def peak_tokens(self) -> float:
        """The most free tokens that the running requests will take at any time from now on."""
        if not self._entries:
            return 0.0
        # With c and h the counts and what is held summed up to and including a bucket that ends at
        # T, and n all requests, the demand within it is the growth of those that end in it, plus
        # (n - c)(T - clock) for those that end later, less what those of earlier buckets hold now
        # and have returned by then. Collected by the clock, that is:
        demand = self._end_and_held - np.cumsum(self._held)
        demand += (len(self._entries) - np.cumsum(self._count)) * self._bucket_ends
        expected = max(float(demand.max()) - len(self._entries) * self._clock, 0.0)
        return expected + self._deviations * math.sqrt(self._variance)

    def peak_tokens_with(
        self, remaining_tokens: float, held_tokens: float, deviation: float = 0.0
    ) -> float:
        """`peak_tokens` if one more request started now. Its held_tokens are not part of it."""
        key = object()
        self.add(key, remaining_tokens, held_tokens, deviation)
        peak = self.peak_tokens()
        self.end(key)
        return peak

    def prolong(self, key: Hashable, remaining_tokens: float) -> None:
        """A running request will end that many steps from now, and not when it was expected to."""
        entry = self._entries[key]
        self.add(key, remaining_tokens, entry.held + self._clock, math.sqrt(entry.variance))

    def _bucket(self, end: float) -> int:
        return max(math.ceil(end / self._width) - 1 - self._first, 0)

    def _reach(self, remaining_tokens: float) -> float:
        """The step at which a request with that much left ends, brought within the buckets."""
        end = self._clock + max(remaining_tokens, 1.0)
        while end > (self._first + _BUCKETS) * self._width:
            self._widen()
        return end

    def _widen(self) -> None:
        """Merge the buckets in pairs."""
        first = self._first // 2
        merged = (np.arange(self._first, self._first + _BUCKETS) // 2) - first
        for sums in (self._count, self._held, self._end_and_held):
            sums[:] = np.bincount(merged, sums, _BUCKETS)
        members: list[dict[Hashable, None]] = [{} for _ in range(_BUCKETS)]
        for old, new in enumerate(merged):
            members[new].update(self._members[old])
        self._members = members
        self._first, self._width = first, self._width * 2
        self._bucket_ends = (np.arange(_BUCKETS) + first + 1.0) * self._width
