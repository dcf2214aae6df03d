"""What the programs of a job say after their first request: lengths, learnt per call site."""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence

# Answers of a call site that are remembered, and lengths that a tag names.
_REMEMBERED = 64
_LIKELY = 8


class LaterLengths:
    """A call site is the ordinal of a request in its program, the first being 0: programs of a job
    are runs of one function. Branches blur it, and the lengths that it has are then of several.
    """

    def __init__(self) -> None:
        self._lengths: dict[int, deque[int]] = {}
        self._most_requests: int | None = None

    def answered(self, ordinal: int, output_tokens: Sequence[int]) -> None:
        """A request was answered, with so many tokens in each of its outputs."""
        seen = self._lengths.setdefault(ordinal, deque(maxlen=_REMEMBERED))
        seen.extend(output_tokens)

    def program_ended(self, requests: int) -> None:
        """A program has ended, after so many requests."""
        self._most_requests = max(self._most_requests or 0, requests)

    def goes_on(self, ordinal: int) -> bool:
        """Whether a program may send another request after this one: one has, or none has ended."""
        return self._most_requests is None or ordinal + 1 < self._most_requests

    def expected(
        self, ordinal: int, limit: int | None, ignore_eos: bool
    ) -> tuple[float, tuple[float, ...]]:
        """Expected output tokens, and lengths that are equally likely, ascending; none of them
        where the length is known.

        Before a call site has answered, all lengths up to its limit are.
        """
        if limit is not None and (ignore_eos or limit <= 1):
            return float(limit), ()
        seen = sorted(self._lengths.get(ordinal, ()))
        if not seen:
            most = float(128 if limit is None else limit)
            return most / 2, tuple(most * k / _LIKELY for k in range(1, _LIKELY + 1))
        picked = tuple(float(seen[int((k + 0.5) / _LIKELY * len(seen))]) for k in range(_LIKELY))
        return sum(seen) / len(seen), picked if picked[0] < picked[-1] else ()
