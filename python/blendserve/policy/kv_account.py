"""Who holds how much of the KV pool, per side, and whether memory lasts if one more starts."""

from __future__ import annotations

import heapq
import math
from collections.abc import Hashable, Sequence
from dataclasses import dataclass

from blendserve.planner.dual_scanner import Side, account_tokens
from blendserve.planner.prefix_tree import Floats

from .memory_forecast import BIN_STEPS, DEVIATIONS, OVERDUE_PART, MemoryForecast

# Each step in which requests lose their memory shows that the estimates are worse than thought, and
# adds so many deviations of room; what it added shrinks by this part with every step.
_AFTER_RETRACTION = 1.0
_FORGETTING = 0.002
# A shared prefix shorter than this is cheaper computed twice than waited for.
MIN_SHARED_TOKENS = 16
# A request that fills the pool alone runs for so many bins of the forecast, so that a small pool
# is looked at as closely as a large one.
_POOL_BINS = 8_192


# Made for every head at every decision: not frozen, which would double the time to make one.
@dataclass(slots=True)
class Candidate:
    """A request that waits, at the head of its side or behind it; token counts.

    Attributes:
        side: the side that it waits on.
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
        likely_output_tokens: numbers of output tokens still to come, ascending and each as likely
            as the others; empty where the estimate is exact.
        max_output_tokens: the most that it may still produce.
        guessed: nothing tells yet how long it gets, and it may get long.
        prefill_steps: decode steps that the others make while its prompt is being computed.
        request: which one it is, to whoever owns the queues.
    """

    side: Side
    prompt_tokens: int
    uncached_tokens: int
    estimated_output_tokens: float
    density: float
    blocked: bool = False
    locked_prefix_tokens: int = 0
    newly_shared_tokens: float = 0.0
    likely_output_tokens: Sequence[float] = ()
    max_output_tokens: float = math.inf
    guessed: bool = False
    prefill_steps: int = 0
    request: Hashable = None

    @property
    def uncached_fraction(self) -> float:
        """Part of the prompt that must be computed; 0 for an empty prompt."""
        return self.uncached_tokens / self.prompt_tokens if self.prompt_tokens else 0.0

    @property
    def private_tokens(self) -> int:
        """Prompt tokens that it takes from the free ones as soon as it starts."""
        return self.prompt_tokens - self.locked_prefix_tokens


def candidate_of(
    request: Hashable,
    side: Side,
    density: float,
    prompt_tokens: int,
    done_tokens: int,
    output_tokens: float,
    likely_output_tokens: Sequence[float],
    limit_tokens: float,
    *,
    guessed: bool,
    cached_tokens: int,
    locked_tokens: int,
    blocked: bool,
) -> Candidate:
    """A waiting request as the policy sees it.

    Args:
        done_tokens: output of before it lost its memory: computed again with the prompt.
        output_tokens, likely_output_tokens, limit_tokens: of all its output.
        cached_tokens, locked_tokens: of the prompt and what is done, in the cache, and held there
            by what runs.
    """
    prompt, estimate, likely = prompt_tokens + done_tokens, output_tokens, likely_output_tokens
    if done_tokens:
        # One that has outlived all estimates will go on for a part of what it has produced.
        likely = tuple(tokens - done_tokens for tokens in likely if tokens > done_tokens)
        beyond = (1.0 + OVERDUE_PART) * done_tokens
        estimate = (estimate if estimate > done_tokens else beyond) - done_tokens
    return Candidate(
        side=side,
        prompt_tokens=prompt,
        uncached_tokens=prompt - cached_tokens,
        estimated_output_tokens=max(estimate, 1.0),
        density=density,
        blocked=blocked,
        locked_prefix_tokens=locked_tokens,
        likely_output_tokens=likely,
        max_output_tokens=limit_tokens - done_tokens,
        guessed=guessed,
        request=request,
    )


@dataclass(slots=True)
class _Booking:
    """started: decode step. limit: output tokens that it may produce. estimate: that it is expected
    to produce."""

    side: Side
    started: int
    private_tokens: float
    booked_tokens: float
    limit: float
    estimate: float


class KVAccount:
    """The KV pool as the batch requests use it: the state on which `Admission` decides.

    Args:
        total_tokens: size of the pool.

    Attributes:
        free_tokens: free and evictable tokens now, less what is kept for others; the owner of the
            pool sets it before it asks.
        others_tokens: what others than the job hold; need be right only while this is idle.
        left_tokens, right_tokens: memory booked per side: of each running request its private
            prompt tokens and half of its expected output, its mean over its life.
        running: requests on each side's account.
        bin_steps: decode steps that share one figure of the forecast.
    """

    def __init__(self, total_tokens: int) -> None:
        self.total_tokens = total_tokens
        self.free_tokens = float(total_tokens)
        self.others_tokens = 0.0
        self.left_tokens = 0.0
        self.right_tokens = 0.0
        self.running: dict[Side, int] = dict.fromkeys(Side, 0)
        self.bin_steps = min(max(total_tokens // _POOL_BINS, 1), BIN_STEPS)
        self._forecast = MemoryForecast(self.bin_steps, DEVIATIONS)
        self._now = 0  # Decode steps so far.
        self._retracted_at = -1
        # When a request will have outlived its estimate.
        self._overdue: list[tuple[float, Hashable]] = []
        self._bookings: dict[Hashable, _Booking] = {}

    def __len__(self) -> int:
        return len(self._bookings)

    def __contains__(self, key: Hashable) -> bool:
        return key in self._bookings

    @property
    def idle(self) -> bool:
        return not self._bookings

    @property
    def now(self) -> int:
        """Decode steps so far."""
        return self._now

    def fits(self, candidate: Candidate, reserve_tokens: float = 0.0) -> bool:
        """Whether the pool, less a reserve, is expected to last for as long as this one may run, if
        it starts too."""
        forecast = self._forecast
        held = forecast.held_tokens(self._now)
        more = candidate.private_tokens + candidate.newly_shared_tokens
        peak = forecast.peak_tokens_with(self._now, more, self._likely(candidate))
        # Whatever is expected, all go on until its prompt is computed, and for a step at least.
        steps = candidate.prefill_steps + 1.0
        growth = max(peak - held, more + steps * len(self._bookings) + 1.0)
        # What is booked and yet not taken will not be given back either: prefixes that are shared
        # without our knowledge.
        overbooked = held - (self.total_tokens - self.free_tokens)
        return growth + max(overbooked, 0.0) <= self.free_tokens - reserve_tokens

    def growth_tokens(self, steps: float = math.inf) -> float:
        """Free tokens that the running requests are expected to need within so many decode steps,
        or until all have ended."""
        forecast, now = self._forecast, self._now
        growth = forecast.peak_tokens(now, steps) - forecast.held_tokens(now)
        return max(growth, float(len(self._bookings)))

    def remaining_tokens(self) -> float:
        """Output tokens that the running requests are expected to produce yet."""
        return self._forecast.remaining_tokens(self._now)

    def profile(self) -> tuple[Floats, Floats]:
        """See `MemoryForecast.profile`; bins of `bin_steps`, from now on."""
        return self._forecast.profile(self._now)

    def start(self, key: Hashable, candidate: Candidate) -> None:
        """Book a request that starts now; takes its prompt from `free_tokens`."""
        private = candidate.private_tokens
        self._forecast.add(
            key, self._now, private, self._likely(candidate), candidate.max_output_tokens
        )
        estimate = min(max(candidate.estimated_output_tokens, 1.0), candidate.max_output_tokens)
        booked = account_tokens(private, estimate)
        self._bookings[key] = _Booking(
            candidate.side, self._now, private, booked, candidate.max_output_tokens, estimate
        )
        heapq.heappush(self._overdue, (self._now + estimate, key))
        self._book(candidate.side, booked, +1)
        self.free_tokens -= private

    def _likely(self, candidate: Candidate) -> Sequence[float]:
        # None holds more than the pool, whatever is expected of it.
        most = min(candidate.max_output_tokens, float(self.total_tokens))
        likely = candidate.likely_output_tokens or (candidate.estimated_output_tokens,)
        return [candidate.prefill_steps + min(max(tokens, 1.0), most) for tokens in likely]

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
        self, key: Hashable, done_tokens: int, output_tokens: float, likely: Sequence[float]
    ) -> bool:
        """A running request that has produced done_tokens is expected to produce output_tokens in
        all, or one of `likely` (as in a candidate). False for one that is not running."""
        booking = self._bookings.get(key)
        if booking is None:
            return False
        # It decodes since a few steps after its start.
        behind = self._now - booking.started - done_tokens
        most = min(booking.limit, float(self.total_tokens))
        lengths = [behind + min(max(x, 1.0), most) for x in likely or (output_tokens,)]
        self._forecast.revise(key, self._now, lengths)
        booking.estimate = behind + min(max(output_tokens, done_tokens + 1.0), booking.limit)
        heapq.heappush(self._overdue, (booking.started + booking.estimate, key))
        self._rebook(booking, booking.side)
        return True

    def end(self, key: Hashable) -> bool:
        """A request has ended or lost its memory; False for one that was not running."""
        booking = self._bookings.pop(key, None)
        if booking is None:
            return False
        self._forecast.remove(key)
        self._book(booking.side, -booking.booked_tokens, -1)
        if not self._bookings:
            self._overdue.clear()
            self.left_tokens = self.right_tokens = 0.0
        return True

    def retracted(self) -> None:
        """A request has lost its memory to the others."""
        if self._retracted_at != self._now:
            self._retracted_at = self._now
            self._forecast.deviations += _AFTER_RETRACTION

    def decode_step(self) -> bool:
        """Every running request has produced a token. True if more may start than before, or less.

        A request that outlives its estimate is a long decode after all: it counts on the right
        from now on, and is expected to go on for half of what it has produced: the longer
        something runs, the longer it is likely to go on.
        """
        self._now += 1
        forecast = self._forecast
        forecast.deviations -= _FORGETTING * (forecast.deviations - DEVIATIONS)
        forecast.advance(self._now)
        changed = self._now % self.bin_steps == 0
        overdue = self._overdue
        while overdue and overdue[0][0] < self._now:
            _, key = heapq.heappop(overdue)
            booking = self._bookings.get(key)
            done = 0 if booking is None else self._now - booking.started
            if booking is None or done <= booking.estimate:
                continue  # Ended, or expected to go on by now.
            booking.estimate = done * (1.0 + OVERDUE_PART) + 1.0
            heapq.heappush(overdue, (booking.started + booking.estimate, key))
            self._rebook(booking, Side.RIGHT)
            changed = True
        return changed

    def _rebook(self, booking: _Booking, side: Side) -> None:
        self._book(booking.side, -booking.booked_tokens, -1)
        booking.side = side
        output = min(booking.estimate, booking.limit)
        booking.booked_tokens = account_tokens(booking.private_tokens, output)
        self._book(side, booking.booked_tokens, +1)

    def _book(self, side: Side, tokens: float, requests: int) -> None:
        self.running[side] += requests
        if side is Side.LEFT:
            self.left_tokens += tokens
        else:
            self.right_tokens += tokens
