"""Who holds how much of the KV pool, per side, and whether memory lasts if one more starts."""

from __future__ import annotations

import math
from collections.abc import Hashable
from dataclasses import dataclass

from .dual_scanner import Side
from .kv_forecast import KVForecast
from .prefix_tree import Floats

# Room beside the expected growth, where lengths are estimates. They can all be off together, as
# the mean of a subtree is: this part of every estimate. And each can be off by itself: this many
# standard deviations of their sum. Outgrowing memory costs a retraction, which computes everything
# anew; memory kept in vain is only lent a little later.
_COMMON_ERROR = 0.5
_DEVIATIONS = 2.0
# A request that has outlived its estimate goes on for this part of what it has produced.
_OVERDUE_PART = 0.5


# Made for every head at every decision: not frozen, which would double the time to make one.
@dataclass(slots=True)
class Candidate:
    """The request at the head of one side; token counts.

    Attributes:
        side: the side that it is the head of.
        prompt_tokens: what must be in the KV pool before it decodes (for a request that lost its
            memory: its output so far included).
        uncached_tokens: those that must be computed.
        estimated_output_tokens: expected output, of what is still to come.
        density: of the plan, at this request.
        blocked: it shares a prefix with a request that is being prefilled now; started at once it
            would compute that prefix a second time.
        locked_prefix_tokens: the part of its prompt that running requests hold in the KV pool, so
            that it takes nothing from the free tokens. 0 is the safe value.
        newly_shared_tokens: those of them that only one running request has held so far. They no
            longer come free when that one ends.
        output_deviation: standard deviation of the estimate; 0 where the length is known.
        max_output_tokens: the most that it may still produce.
    """

    side: Side
    prompt_tokens: int
    uncached_tokens: int
    estimated_output_tokens: float
    density: float
    blocked: bool = False
    locked_prefix_tokens: int = 0
    newly_shared_tokens: float = 0.0
    output_deviation: float = 0.0
    max_output_tokens: float = math.inf

    @property
    def uncached_fraction(self) -> float:
        """Part of the prompt that must be computed; 0 for an empty prompt."""
        return self.uncached_tokens / self.prompt_tokens if self.prompt_tokens else 0.0

    @property
    def private_tokens(self) -> int:
        """Prompt tokens that it takes from the free ones as soon as it starts."""
        return self.prompt_tokens - self.locked_prefix_tokens

    @property
    def reserved_output_tokens(self) -> float:
        """Output tokens to keep memory for: the estimate, and room where it is one."""
        margin = 1.0 + _COMMON_ERROR if self.output_deviation > 0.0 else 1.0
        return min(max(self.estimated_output_tokens * margin, 1.0), self.max_output_tokens)


@dataclass(slots=True)
class _Booking:
    side: Side
    private_tokens: float
    booked_tokens: float
    deviation: float
    reserved_tokens: float
    """Output tokens that memory has been reserved for so far."""
    left_to_limit: float
    """Output tokens that it may still produce beyond those that memory is reserved for."""


class KVAccount:
    """The KV pool as the batch requests use it: the state on which `Admission` decides.

    Args:
        total_tokens: size of the pool.

    Attributes:
        free_tokens: free and evictable tokens now, less what is kept for others; the owner of the
            pool sets it before it asks.
        left_tokens, right_tokens: memory booked per side: of each running request its private
            prompt tokens and half of its expected output, its mean over its life.
        running: requests on each side's account.
    """

    def __init__(self, total_tokens: int) -> None:
        self.total_tokens = total_tokens
        self.free_tokens = float(total_tokens)
        self.left_tokens = 0.0
        self.right_tokens = 0.0
        self.running: dict[Side, int] = dict.fromkeys(Side, 0)
        self._forecast = KVForecast(_DEVIATIONS)
        self._bookings: dict[Hashable, _Booking] = {}

    def __len__(self) -> int:
        return len(self._bookings)

    def __contains__(self, key: Hashable) -> bool:
        return key in self._bookings

    @property
    def idle(self) -> bool:
        return not self._bookings

    def fits(self, candidate: Candidate, reserve_tokens: float = 0.0) -> bool:
        """Whether the pool, less a reserve, lasts until all have ended, if this one starts too."""
        growth = self._forecast.peak_tokens_with(
            candidate.reserved_output_tokens, candidate.private_tokens, candidate.output_deviation
        )
        needed = candidate.private_tokens + candidate.newly_shared_tokens + growth
        # What is booked and yet not taken will not be given back either: prefixes that are shared
        # without our knowledge.
        overbooked = self._forecast.held_tokens() - (self.total_tokens - self.free_tokens)
        return needed + max(overbooked, 0.0) <= self.free_tokens - reserve_tokens

    def growth_tokens(self) -> float:
        """Free tokens that the running requests need at the most until all have ended."""
        return self._forecast.peak_tokens()

    def remaining_tokens(self) -> float:
        """Output tokens that the running requests are expected to produce yet."""
        return self._forecast.remaining_tokens()

    def profile(self) -> tuple[Floats, int]:
        """(tokens, steps): what the running requests alone will hold at the end of each of the next
        stretches of so many decode steps."""
        return self._forecast.profile()

    def start(self, key: Hashable, candidate: Candidate) -> None:
        """Book a request that starts now; takes its prompt from `free_tokens`."""
        reserved = candidate.reserved_output_tokens
        self._forecast.add(key, reserved, candidate.private_tokens, candidate.output_deviation)
        booking = _Booking(
            candidate.side,
            candidate.private_tokens,
            account_tokens(candidate.private_tokens, reserved),
            candidate.output_deviation,
            reserved,
            candidate.max_output_tokens - reserved,
        )
        self._bookings[key] = booking
        self._book(booking.side, booking.booked_tokens, +1)
        self.free_tokens -= candidate.private_tokens

    def held_alone(self, key: Hashable, tokens: int) -> float:
        """What a request holds alone of its prompt, beyond so many tokens."""
        booking = self._bookings.get(key)
        return 0.0 if booking is None else max(booking.private_tokens - tokens, 0.0)

    def share(self, key: Hashable, tokens: int) -> None:
        """Another request has come to hold all but `tokens` of what this one's prompt holds, so
        that the rest does not come free when this one ends."""
        shared = self.held_alone(key, tokens)
        if shared:
            self._forecast.hold(key, -shared)
            self._bookings[key].private_tokens = tokens

    def revise(
        self, key: Hashable, done_tokens: int, output_tokens: float, deviation: float
    ) -> bool:
        """A running request that has produced done_tokens is expected to produce output_tokens in
        all, known to so much. False for one that is not running."""
        booking = self._bookings.get(key)
        if booking is None:
            return False
        limit = booking.reserved_tokens + booking.left_to_limit
        left = max(output_tokens - done_tokens, deviation, 1.0) * (1.0 + _COMMON_ERROR)
        left = max(min(left, limit - done_tokens), 1.0)
        self._forecast.add(key, left, self._forecast.held_by(key), deviation)
        booking.deviation = deviation
        booking.reserved_tokens = done_tokens + left
        booking.left_to_limit = max(limit - booking.reserved_tokens, 0.0)
        before = booking.booked_tokens
        booking.booked_tokens = account_tokens(booking.private_tokens, booking.reserved_tokens)
        self._book(booking.side, booking.booked_tokens - before, 0)
        return True

    def end(self, key: Hashable) -> bool:
        """A request has ended or lost its memory; False for one that was not running."""
        booking = self._bookings.pop(key, None)
        if booking is None:
            return False
        self._forecast.end(key)
        self._book(booking.side, -booking.booked_tokens, -1)
        if not self._bookings:
            self.left_tokens = self.right_tokens = 0.0
        return True

    def decode_step(self) -> bool:
        """Every running request has produced a token. True if one has outlived its estimate.

        Such a request is a long decode after all: it counts on the right from now on, and memory
        is reserved for as much more as the estimate was uncertain, or for half of what it has
        produced: the longer something runs, the longer it is likely to go on.
        """
        overdue = self._forecast.advance()
        for key, held_tokens in overdue.items():
            booking = self._bookings[key]
            self._book(booking.side, -booking.booked_tokens, -1)
            more = max(booking.deviation, _OVERDUE_PART * booking.reserved_tokens, 1.0)
            more = min(more, max(booking.left_to_limit, 1.0))
            booking.reserved_tokens += more
            booking.left_to_limit -= more
            booking.side = Side.RIGHT
            booking.booked_tokens += more / 2
            self._book(booking.side, booking.booked_tokens, +1)
            self._forecast.add(key, more, held_tokens, booking.deviation)
        return bool(overdue)

    def _book(self, side: Side, tokens: float, requests: int) -> None:
        self.running[side] += requests
        if side is Side.LEFT:
            self.left_tokens += tokens
        else:
            self.right_tokens += tokens


def account_tokens(private_tokens: float, output_tokens: float) -> float:
    """p + d / 2: the memory that a request holds on average over its life.

    Of a prefix that several running requests share, only the first of them counts the tokens.
    """
    return private_tokens + output_tokens / 2
