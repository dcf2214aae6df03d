"""What the KV pool already holds of a waiting request's prompt, without asking the radix tree.

The tree is asked once by SGLang, when the request is built into a batch. To choose among heads it
is enough to compare a prompt with those that started last: the plan brings prompts with a common
prefix one after the other.
"""

from __future__ import annotations

from collections import OrderedDict
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from blendserve.planner import Side

# A shared prefix shorter than this is cheaper computed twice than waited for.
MIN_SHARED_TOKENS = 16
# Prompts remembered, one for each beginning and side; far more than two scanners touch at a time.
_REMEMBERED = 512


@dataclass(slots=True, eq=False)
class StartedPrompt:
    """A prompt that has been given to the engine.

    Attributes:
        rid: its request.
        tokens: int64 [prompt_tokens].
        cached_tokens: what was there when it started; the rest is shareable once it is prefilled.
        prefilled, running: its state.
    """

    rid: str
    tokens: NDArray[np.int64]
    cached_tokens: int
    prefilled: bool = False
    running: bool = True


@dataclass(frozen=True, slots=True)
class SharedPrefix:
    """What a prompt shares with those that started before it.

    Attributes:
        cached_tokens: tokens that need not be computed again.
        locked_tokens: those that a running request holds.
        holder: that request's id; None if nobody does.
        blocked: a request that is being prefilled now is about to bring more of it.
    """

    cached_tokens: int = 0
    locked_tokens: int = 0
    holder: str | None = None
    blocked: bool = False


class StartedPrompts:
    """The prompts that started last, by side and beginning. All methods are O(prompt tokens)."""

    def __init__(self) -> None:
        self._latest: OrderedDict[tuple[Side, bytes], StartedPrompt] = OrderedDict()
        self._running: dict[str, StartedPrompt] = {}

    def shared(self, tokens: NDArray[np.int64]) -> SharedPrefix:
        """Compare a waiting prompt with the last one of each side that begins as it does."""
        if len(tokens) < MIN_SHARED_TOKENS:
            return SharedPrefix()
        found = []
        for side in Side:
            started = self._latest.get((side, _beginning(tokens)))
            if started is not None:
                found.append((_common_prefix(tokens, started.tokens), started))
        if not found:
            return SharedPrefix()
        # Its last token is always computed: its logits give the first output token.
        most = len(tokens) - 1
        cached = max(
            min(common, most if started.prefilled else started.cached_tokens, most)
            for common, started in found
        )
        locked, holder = max(
            ((common, started.rid) for common, started in found if started.running),
            default=(0, None),
        )
        return SharedPrefix(
            cached_tokens=cached,
            locked_tokens=min(locked, cached),
            holder=holder,
            blocked=any(
                not started.prefilled and common - cached >= MIN_SHARED_TOKENS
                for common, started in found
            ),
        )

    def start(self, rid: str, side: Side, tokens: NDArray[np.int64], cached_tokens: int) -> None:
        """A request has been offered to the engine."""
        started = self._running[rid] = StartedPrompt(rid, tokens, cached_tokens)
        if len(tokens) >= MIN_SHARED_TOKENS:
            key = (side, _beginning(tokens))
            self._latest[key] = started
            self._latest.move_to_end(key)
            if len(self._latest) > _REMEMBERED:
                self._latest.popitem(last=False)

    def prefilled(self, rid: str) -> bool:
        """Its prompt is in the KV pool. False if that was known, or the request is not."""
        started = self._running.get(rid)
        if started is None or started.prefilled:
            return False
        started.prefilled = True
        return True

    def end(self, rid: str) -> None:
        """A request has ended; what it computed stays in the cache, for the time being."""
        started = self._running.pop(rid, None)
        if started is None:
            return
        started.running = False
        if not started.prefilled:
            # Aborted or refused before its prompt was computed: it must hold up nobody.
            self._forget(started)

    def _forget(self, started: StartedPrompt) -> None:
        if len(started.tokens) >= MIN_SHARED_TOKENS:
            for side in Side:
                key = (side, _beginning(started.tokens))
                if self._latest.get(key) is started:
                    del self._latest[key]


def _beginning(tokens: NDArray[np.int64]) -> bytes:
    return tokens[:MIN_SHARED_TOKENS].tobytes()


def _common_prefix(a: NDArray[np.int64], b: NDArray[np.int64]) -> int:
    """Length of the common prefix of two token sequences."""
    n = min(len(a), len(b))
    different = a[:n] != b[:n]
    first = int(different.argmax()) if n else 0
    return first if n and different[first] else n
