"""How much KV memory the running requests will hold, step by step, as far as one can tell."""

from __future__ import annotations

import heapq
import math
from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from blendserve.planner.prefix_tree import Floats

# Steps that share one figure, the expected demand at their end, in a pool of an 80 GB device.
BIN_STEPS = 256
# Room for wrong estimates, in standard deviations of the demand: outgrowing memory costs a
# retraction, which computes everything anew; memory kept in vain is only lent a little later.
DEVIATIONS = 2.5
# A request beyond all lengths that were expected of it goes on for this part of what it has done.
OVERDUE_PART = 0.5
# Steps of a job's end that were not reckoned with wait for weights, and cost several times what
# compute costs that is left over then. So something is taken to run so many times as likely.
TAIL_CAUTION = 2.0
_ROWS = 6


@dataclass(slots=True)
class _Running:
    """base: KV tokens held alone at the start, less the step of the start; so it holds base + t at
    step t. ends: steps at which it may end, ascending and equally likely, of those still ahead when
    it was last looked at. last: step that it cannot outlive. look: number of its latest entry in
    the queue of those to be looked at again."""

    started: int
    base: float
    lengths: Sequence[float]
    last: float
    ends: Sequence[float] = ()
    look: int = 0


class MemoryForecast:
    """Expected KV tokens of the running requests in each bin of so many steps.

    A request that may end after any of k equally likely lengths counts in each bin with the part of
    them that it has not ended by then. So a few long requests that start together are not taken to
    reach full length together, and memory is lent on what is likely to be there. Once the bin of a
    length is over and the request is not, the others become likelier; `advance` sees to it.

    Bin k is of the steps above k times its width. It stands for its last step, but each request in
    it for its own end: the demand is never below a count step by step, and above it by less than a
    bin of growth of each request.

    Three sums per bin say all: of the possible ends in it, how likely they are, and their
    likelihood times what the request holds less the step, and times what it holds at its end. The
    demand in a bin is the third, and from all later bins the second plus the first times the step.
    So a request that comes or goes touches as many bins as it has lengths. The variance is had in
    the same way: with p the chance that a request still runs, p - p^2 in place of p, of squares.

    Mutable, no clock: all times are step numbers, which must not decrease from call to call.

    Args:
        bin_steps: width of a bin.
        deviations: how many standard deviations of it are added to the demand, the lengths of
            different requests taken as independent; may be changed at any time.
    """

    def __init__(self, bin_steps: int = BIN_STEPS, deviations: float = 0.0) -> None:
        self._width, self.deviations = bin_steps, deviations
        self._running: dict[Hashable, _Running] = {}
        # When to look again: bin, number of the entry, request.
        self._due: list[tuple[int, int, Hashable]] = []
        self._looks = 0
        # Bin of the latest step seen, of the first column of the sums, behind the last used one.
        self._first = self._origin = self._stop = 0
        self._keep(np.zeros((_ROWS, 512)))
        self._base = self._ends = 0.0
        # Counted, though it has not started: who is asked about most often starts next.
        self._asked: _Running | None = None

    def __len__(self) -> int:
        return len(self._running)

    def add(
        self,
        request: Hashable,
        now: int,
        private_tokens: float,
        lengths: Sequence[float],
        longest: float = np.inf,
    ) -> None:
        """A request starts that holds private_tokens now and one more after every step, and ends
        after one of these numbers of steps, ascending, each as likely as the others, and never
        after more than `longest`."""
        running = _Running(now, private_tokens - now, lengths, now + longest)
        self._running[request] = running
        self._base += running.base
        asked, self._asked = self._asked, None
        if asked is not None and (asked.started, asked.base, asked.lengths) == (
            now,
            running.base,
            lengths,
        ):
            running.ends = asked.ends
            self._await(request, running)
            return
        if asked is not None:
            self._count(asked, -1.0)
        self._expect(request, running, now)

    def update(self, now: int, lengths_of: Callable[[Any], Sequence[float]]) -> None:
        """More is known: the lengths of running requests, from their starts, are these."""
        for request in self._running:
            self.revise(request, now, lengths_of(request))

    def revise(self, request: Hashable, now: int, lengths: Sequence[float]) -> None:
        """The same of one running request."""
        running = self._running[request]
        self._count(running, -1.0)
        running.lengths = lengths
        self._expect(request, running, now)

    def hold(self, request: Hashable, tokens: float) -> None:
        """A running request holds so many tokens more alone, or less."""
        running = self._running[request]
        self._count(running, -1.0)
        running.base += tokens
        self._base += tokens
        self._count(running, +1.0)

    def remove(self, request: Hashable) -> None:
        """A request ended, or lost its memory."""
        self._forget_asked()
        running = self._running.pop(request)
        if not self._running:
            # Also rids the sums of what floating-point differences have left in them.
            self._due.clear()
            self._sums[:] = 0.0
            self._origin, self._stop = self._first, self._first
            self._base = self._ends = 0.0
            return
        self._base -= running.base
        self._count(running, -1.0)

    def advance(self, now: int) -> None:
        """Look again at the requests that have outlived the bin of one of their lengths."""
        self._forget_asked()
        self._first, due = now // self._width, self._due
        while due and due[0][0] < self._first:
            _, look, request = heapq.heappop(due)
            running = self._running.get(request)
            if running is not None and running.look == look:
                self._count(running, -1.0)
                self._expect(request, running, now)

    def fits(self, now: int, private_tokens: float, lengths: Sequence[float], limit: float) -> bool:
        """Whether the demand stays within the limit for as long as one more request may run."""
        return self.peak_tokens_with(now, private_tokens, lengths) <= limit

    def peak_tokens_with(self, now: int, private_tokens: float, lengths: Sequence[float]) -> float:
        """The most that is expected to be held at once for as long as one more request may run."""
        self._forget_asked()
        more = _Running(now, private_tokens - now, lengths, np.inf)
        more.ends = [now + max(length, 1.0) for length in lengths]
        self._count(more, +1.0)
        self._asked = more
        span = math.ceil(more.ends[-1] / self._width) - now // self._width
        return float(self._demand(now)[:span].max())

    def peak_tokens(self, now: int, steps: float = np.inf) -> float:
        """The most that is expected to be held at once from now on, or for so many steps, one at
        least."""
        self._forget_asked()
        if not self._running:
            return 0.0
        demand = self._demand(now)
        steps = min(max(steps, 1.0), len(demand) * self._width)
        span = math.ceil((now + steps) / self._width)
        return float(demand[: span - now // self._width].max())

    def held_tokens(self, now: int) -> float:
        """What the running requests hold now, each alone."""
        return self._base + len(self._running) * now

    def remaining_tokens(self, now: int) -> float:
        """Output tokens that they are expected to produce yet."""
        self._forget_asked()
        return max(self._ends - len(self._running) * now, 0.0)

    def profile(self, now: int) -> tuple[Floats, Floats]:
        """(tokens, alive) per bin from now on, until nothing is expected to run: the demand, its
        room included, and how likely it is, with caution, that anything runs at all. A request that
        still runs then holds at least what it has produced since now, so demand over that bounds
        how many there are."""
        self._forget_asked()
        tokens = self._demand(now) if self._running else np.empty(0)
        last = np.flatnonzero(tokens > 1.0)
        tokens = tokens[: int(last[-1]) + 1 if len(last) else 0]
        since = self._bin_ends(now // self._width, len(tokens)) - now
        return tokens, np.minimum(TAIL_CAUTION * tokens / since, 1.0)

    def _expect(self, request: Hashable, running: _Running, now: int) -> None:
        started = running.started
        # Compared as a sum: a length may be longer than what is done by less than the sum can show,
        # and an end that is not after now would be looked at again for ever.
        ends: list[float] = [end for length in running.lengths if (end := started + length) > now]
        if not ends:
            done = now - started
            ends = [min(now + OVERDUE_PART * done + 1.0, max(running.last, now + 1.0))]
        running.ends = ends
        self._count(running, +1.0)
        self._await(request, running)

    def _await(self, request: Hashable, running: _Running) -> None:
        self._looks += 1
        running.look = self._looks
        first = math.ceil(running.ends[0] / self._width) - 1
        heapq.heappush(self._due, (first, self._looks, request))

    def _forget_asked(self) -> None:
        if self._asked is not None:
            self._count(self._asked, -1.0)
            self._asked = None

    def _count(self, running: _Running, sign: float) -> None:
        base, ends, width = running.base, running.ends, self._width
        last = math.ceil(ends[-1] / width) - 1
        if last >= self._stop:
            self._reach(last)
        count = len(ends)
        part = sign / count
        origin = self._origin
        held, alive, bases, spreads, spread_bases, spread_squares = self._rows
        for ended, end in enumerate(ends):
            at = math.ceil(end / width) - 1 - origin
            held[at] += part * (base + end)
            alive[at] += part
            bases[at] += part * base
            self._ends += part * end
            if count > 1:
                # What p - p^2 loses when p goes down by a part, from (count - ended) parts.
                spread = part * (1.0 - (2.0 * (count - ended) - 1.0) / count)
                spreads[at] += spread
                spread_bases[at] += spread * base
                spread_squares[at] += spread * base * base

    def _demand(self, now: int) -> Floats:
        """Per bin from now on."""
        first = now // self._width
        sums = self._sums[:, first - self._origin : self._stop - self._origin]
        times = self._bin_ends(first, sums.shape[1])
        used = sums[1:3] if not self.deviations else sums[1:]
        later = used[:, ::-1].cumsum(axis=1)[:, ::-1] - used
        expected: Floats = sums[0] + later[0] * times + later[1]
        if not self.deviations:
            return expected
        variance = (later[2] * times + 2.0 * later[3]) * times + later[4]
        room: Floats = self.deviations * np.sqrt(np.maximum(variance, 0.0))
        return expected + room

    def _bin_ends(self, first: int, bins: int) -> Floats:
        return np.arange(first + 1.0, first + bins + 1.0) * self._width

    def _reach(self, last: int) -> None:
        """Have a column for this bin."""
        self._stop = last + 1
        if last - self._origin >= self._sums.shape[1]:
            # What is past has been counted out.
            kept = self._sums[:, self._first - self._origin :]
            self._origin = self._first
            sums = np.zeros((_ROWS, 2 * (last + 1 - self._origin)))
            sums[:, : kept.shape[1]] = kept[:, : sums.shape[1]]
            self._keep(sums)

    def _keep(self, sums: Floats) -> None:
        self._sums = sums
        # The same memory: one element of it is had three times as fast as from an array.
        self._rows: list[Any] = [memoryview(row) for row in sums]
