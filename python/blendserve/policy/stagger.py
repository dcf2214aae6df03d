"""When a long decode may start, so that decodes do not all end together."""

from __future__ import annotations

import bisect
from collections.abc import Hashable

from .kv_account import Candidate

# Of the time that a request decodes: within this part before and after its end, no more should end
# than in even flow. A wider window lets larger groups start together, and a narrower one takes
# chance for a crowd.
WINDOW = 1 / 8
# The first ones take the time of one decode to fill the pool. That is worth it where so many times
# what a request holds at its end, and its prompt again, is left to do, in steps of a full pool.
WORTH = 2.0
# Lengths that may lie further apart than this part of their mean are not known: such requests end
# apart by themselves.
ALIKE = 0.5


class Stagger:
    """Spreads the ends of long decodes in time.

    A request with p prompt tokens of its own and d output tokens holds p + d at its end and
    p + d/2 on average. Those that start together end together, if they are of one length, so the
    pool holds total / (p + d) of them; those that start one by one hold p + d/2 each, so it holds
    up to twice as many, and each step of the engine serves as many more. Memory alone does not see
    to it: as soon as those that run would fill the pool at their ends, none fits until they have
    ended, and then all that follow start together again.

    In even flow total / ((p + d/2) d) of them start and end in each step. A request whose end would
    fall among more than that waits. Requests of different lengths end at different times by
    themselves, and do not wait.

    Mutable, without a clock: `now` is a number of decode steps.
    """

    def __init__(self) -> None:
        self._ends: list[float] = []  # Ascending, of what runs.
        self._end_of: dict[Hashable, float] = {}

    def holds(self, candidate: Candidate, total_tokens: int, now: int, rest_steps: float) -> bool:
        """Whether a request should wait, though memory may last.

        Never one that grows by less than its prompt: it gains little.

        Args:
            total_tokens: size of the KV pool.
            rest_steps: decode steps that all that has not started would take with a full pool.
        """
        tokens, private = candidate.estimated_output_tokens, candidate.private_tokens
        if tokens <= private or rest_steps <= WORTH * (2 * private + tokens):
            return False
        if not _is_known(candidate):
            return False
        end, window = now + tokens, WINDOW * tokens
        low = bisect.bisect_left(self._ends, end - window)
        high = bisect.bisect_right(self._ends, end + window)
        return (high - low) * (private + tokens / 2) * tokens > total_tokens * window

    def start(self, candidate: Candidate, now: int) -> None:
        """A request starts."""
        if not _is_known(candidate):
            return
        end = now + candidate.estimated_output_tokens
        self._end_of[candidate.request] = end
        bisect.insort(self._ends, end)

    def end(self, request: Hashable) -> None:
        """A request has ended, or lost its memory."""
        end = self._end_of.pop(request, None)
        if end is not None:
            del self._ends[bisect.bisect_left(self._ends, end)]


def _is_known(candidate: Candidate) -> bool:
    likely = candidate.likely_output_tokens
    return not likely or likely[-1] - likely[0] <= ALIKE * candidate.estimated_output_tokens
