"""How far the running requests have come."""

from __future__ import annotations

from collections.abc import Hashable
from dataclasses import dataclass


@dataclass(slots=True)
class _Decode:
    """longest: the most output tokens expected of it; 0 where that is exact. before: those that it
    had when it started, less the step from which it decodes, once it does."""

    longest: float
    before: int
    context: int = 0
    decodes: bool = False


class Decodes:
    """Contexts and output tokens of the running requests.

    All that decode grow by one token with every step, so none is touched while they grow.

    Mutable, without a clock.
    """

    def __init__(self) -> None:
        self._running: dict[Hashable, _Decode] = {}
        self._steps = self._decoding = 0
        self._contexts = 0  # Of the decoding ones, less the steps so far.

    def __len__(self) -> int:
        return len(self._running)

    @property
    def context_tokens(self) -> int:
        """Sum of the contexts of the decoding requests."""
        return self._contexts + self._decoding * self._steps

    def start(self, request: Hashable, done_tokens: int, likely: tuple[float, ...]) -> None:
        """A request starts that has done_tokens of output from before it lost its memory. likely:
        see `Candidate`, of all of its output."""
        self._running[request] = _Decode(likely[-1] if likely else 0.0, done_tokens)

    def prefilled(self, request: Hashable, context_tokens: int, done_tokens: int) -> None:
        """It decodes from the next step on, with so many tokens in the KV pool and of output."""
        decode = self._running[request]
        decode.before = done_tokens - self._steps
        decode.context = context_tokens - self._steps
        decode.decodes = True
        self._decoding += 1
        self._contexts += decode.context

    def revise(self, request: Hashable, likely: tuple[float, ...]) -> None:
        """Other lengths are expected of it now."""
        self._running[request].longest = likely[-1] if likely else 0.0

    def step(self, steps: int = 1) -> None:
        """All that decode have so many more tokens."""
        self._steps += steps

    def end(self, request: Hashable) -> None:
        """It has ended, or lost its memory."""
        decode = self._running.pop(request)
        if decode.decodes:
            self._decoding -= 1
            self._contexts -= decode.context

    def done_tokens(self, request: Hashable) -> int:
        """Output tokens of a running request so far."""
        decode = self._running[request]
        return decode.before + self._steps if decode.decodes else decode.before

    def far_beyond(self, times: float, least: int) -> list[int]:
        """Output tokens so far of those that have more than `least`, and more than so many times
        the longest of the lengths that were expected of them."""
        found = []
        for decode in self._running.values():
            done = decode.before + self._steps if decode.decodes else decode.before
            if decode.longest and done > max(times * decode.longest, least):
                found.append(done)
        return found
