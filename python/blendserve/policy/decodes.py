"""How far the running requests have come."""

from __future__ import annotations

from collections.abc import Hashable
from dataclasses import dataclass


@dataclass(slots=True)
class _Decode:
    """guessed: see `Candidate`. before: those that it
    had when it started, less the step from which it decodes, once it does."""

    guessed: bool
    before: int
    context: int = 0
    decodes: bool = False


class Decodes:
    """Contexts and output tokens of the running requests.

    All that decode grow by one token with every step, so none is touched while they grow.

    Mutable, without a clock.

    Attributes:
        guessed: how many of them there are whose lengths are guesses.
    """

    def __init__(self) -> None:
        self._running: dict[Hashable, _Decode] = {}
        self._steps = self._decoding = 0
        self.guessed = 0
        self._contexts = 0  # Of the decoding ones, less the steps so far.

    def __len__(self) -> int:
        return len(self._running)

    @property
    def context_tokens(self) -> int:
        """Sum of the contexts of the decoding requests."""
        return self._contexts + self._decoding * self._steps

    def start(self, request: Hashable, done_tokens: int, guessed: bool) -> None:
        """A request starts that has done_tokens of output from before it lost its memory."""
        self._running[request] = _Decode(guessed, done_tokens)
        self.guessed += guessed

    def prefilled(self, request: Hashable, context_tokens: int, done_tokens: int) -> None:
        """It decodes from the next step on, with so many tokens in the KV pool and of output."""
        decode = self._running[request]
        decode.before = done_tokens - self._steps
        decode.context = context_tokens - self._steps
        decode.decodes = True
        self._decoding += 1
        self._contexts += decode.context

    def revise(self, request: Hashable, guessed: bool) -> None:
        """Other lengths are expected of it now."""
        decode = self._running[request]
        self.guessed += guessed - decode.guessed
        decode.guessed = guessed

    def step(self, steps: int = 1) -> None:
        """All that decode have so many more tokens."""
        self._steps += steps

    def end(self, request: Hashable) -> None:
        """It has ended, or lost its memory."""
        decode = self._running.pop(request)
        self.guessed -= decode.guessed
        if decode.decodes:
            self._decoding -= 1
            self._contexts -= decode.context

    def done_tokens(self, request: Hashable) -> int:
        """Output tokens of a running request so far."""
        decode = self._running[request]
        return decode.before + self._steps if decode.decodes else decode.before

    def longest_guessed(self) -> int:
        """Output tokens so far of the longest one whose length is a guess."""
        done = [self.done_tokens(key) for key, one in self._running.items() if one.guessed]
        return max(done, default=0)
