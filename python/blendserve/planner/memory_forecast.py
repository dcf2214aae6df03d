"""How much KV memory the running requests will hold, step by step, as far as one can tell."""

from __future__ import annotations

import heapq
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

from .prefix_tree import Floats

# Steps that share one figure: the expected demand at their end.
BIN_STEPS = 256
# A request beyond all lengths that were expected of it goes on for this part of what it has done.
OVERDUE_PART = 0.5
# Steps of a job's end that were not reckoned with wait for weights, and cost several times what
# compute costs that is left over then. So something is taken to run so many times as likely.
TAIL_CAUTION = 2.0


@dataclass
class _Running:
    started: int
    private_tokens: float
    lengths: tuple[float, ...]
    ends: tuple[float, ...] = ()
    # Of a short request: its tokens, counted in the bin it started in and the next one.
    short_tokens: float = 0.0


class MemoryForecast:
    """Expected KV tokens of the running requests in each bin of BIN_STEPS steps from now on.

    A request that may end after any of k equally likely lengths counts in each bin with the part of
    them that it has not ended by then. So a few long requests that start together are not taken to
    reach full length together, and memory is lent on what is likely to be there. When one outlives
    a length, the others become likelier; `advance` sees to it.

    Mutable, no clock: all times are step numbers, which must not decrease from call to call.
    """

    def __init__(self) -> None:
        self._demand: Floats = np.zeros(4_096)
        self._times: Floats = _bin_ends(4_096)
        self._running: dict[int, _Running] = {}
        self._outlived: list[tuple[int, int, int]] = []  # step, request, started

    def __len__(self) -> int:
        return len(self._running)

    def add(self, request: int, now: int, private_tokens: float, lengths: Sequence[float]) -> None:
        """A request starts that holds private_tokens now and one more after every step, and ends
        after one of these numbers of steps, ascending, each as likely as the others."""
        running = _Running(now, private_tokens, tuple(lengths))
        self._running[request] = running
        if lengths[-1] >= BIN_STEPS:
            self._expect(request, running, now)
            return
        # Nearly all of these end before their bin or the next one does; no look at each outcome.
        running.short_tokens = private_tokens + sum(lengths) / len(lengths)
        self._count_short(running, running.short_tokens)
        heapq.heappush(self._outlived, (now + BIN_STEPS, request, now))

    def update(self, now: int, lengths_of: Callable[[int], Sequence[float]]) -> None:
        """More is known: the lengths of running requests, from their starts, are these."""
        for request, running in self._running.items():
            if running.short_tokens and now - running.started < BIN_STEPS:
                continue
            self._discount(running, now)
            running.lengths = tuple(lengths_of(request))
            self._expect(request, running, now)

    def remove(self, request: int, now: int) -> None:
        """A request ended, or lost its memory."""
        running = self._running.pop(request)
        if not self._running:
            self._demand[:] = 0.0
            return
        self._discount(running, now)

    def advance(self, now: int) -> None:
        """Look again at the requests that have outlived a length by now."""
        outlived = self._outlived
        while outlived and outlived[0][0] <= now:
            _, request, started = heapq.heappop(outlived)
            running = self._running.get(request)
            if running is not None and running.started == started:
                self._discount(running, now)
                self._expect(request, running, now)

    def fits(self, now: int, private_tokens: float, lengths: Sequence[float], limit: float) -> bool:
        """Whether the demand stays within the limit for as long as one more request may run."""
        first = now // BIN_STEPS
        ends = [now + length for length in lengths]
        last = int(ends[-1]) // BIN_STEPS
        if last >= len(self._demand):
            self._extend(last)
        base = private_tokens - now
        part = 1.0 / len(ends)
        if last == first:
            more = base + sum(ends) * part
            return bool(self._demand[first] + more <= limit)
        total = self._demand[first : last + 1].copy()
        times = self._times
        for end in ends:
            at = int(end) // BIN_STEPS
            if at > first:
                total[: at - first] += part * (base + times[first:at])
            total[at - first] += part * (base + end)
        return bool(total.max() <= limit)

    def profile(self, now: int) -> tuple[Floats, Floats]:
        """(tokens, alive) per bin from now on, until nothing is expected to run: the demand, and
        how likely it is, with caution, that anything runs at all. A request that still runs then
        holds at least what it has produced since now, so demand over that bounds how many there
        are."""
        first = now // BIN_STEPS
        tokens = self._demand[first:]
        last = np.flatnonzero(tokens > 1.0)
        tokens = tokens[: int(last[-1]) + 1 if len(last) else 0].copy()
        since = self._times[first : first + len(tokens)] - now
        return tokens, np.minimum(TAIL_CAUTION * tokens / since, 1.0)

    def _expect(self, request: int, running: _Running, now: int) -> None:
        done = now - running.started
        lengths = [length for length in running.lengths if length > done]
        if not lengths:
            lengths = [done * (1.0 + OVERDUE_PART) + 1.0]
        running.ends = tuple(running.started + length for length in lengths)
        last = int(running.ends[-1]) // BIN_STEPS
        if last >= len(self._demand):
            self._extend(last)
        self._count(running, now, 1.0)
        heapq.heappush(self._outlived, (int(running.ends[0]) + 1, request, running.started))

    def _discount(self, running: _Running, now: int) -> None:
        if running.short_tokens:
            self._count_short(running, -running.short_tokens)
            running.short_tokens = 0.0
        else:
            self._count(running, now, -1.0)

    def _count_short(self, running: _Running, tokens: float) -> None:
        at = running.started // BIN_STEPS
        if at + 1 >= len(self._demand):
            self._extend(at + 1)
        self._demand[at] += tokens
        self._demand[at + 1] += tokens

    def _count(self, running: _Running, now: int, sign: float) -> None:
        first = now // BIN_STEPS
        base = running.private_tokens - running.started
        part = sign / len(running.ends)
        demand, times = self._demand, self._times
        for end in running.ends:
            at = int(end) // BIN_STEPS
            if at < first:
                continue
            if at > first:
                demand[first:at] += part * (base + times[first:at])
            demand[at] += part * (base + end)

    def _extend(self, last: int) -> None:
        size = max(2 * len(self._demand), last + 1)
        self._demand = np.concatenate((self._demand, np.zeros(size - len(self._demand))))
        self._times = _bin_ends(size)


def _bin_ends(bins: int) -> Floats:
    return (np.arange(bins, dtype=np.float64) + 1.0) * BIN_STEPS
