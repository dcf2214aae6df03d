"""What the KV pool already holds of a waiting request's prompt, without asking the radix tree.

The tree is asked once by SGLang, when the request is built into a batch. To choose among heads it
is enough to compare a prompt with those that started last: the plan brings prompts with a common
prefix one after the other.
"""

from __future__ import annotations

from collections import OrderedDict
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from blendserve.planner import Side
from blendserve.policy.kv_account import MIN_SHARED_TOKENS

# Comparisons that a waiting prompt remembers: the latest of each side, and one that runs.
_COMPARED = 3
# Prompts remembered, one for each beginning and side; far more than two scanners touch at a time.
_REMEMBERED = 512


def namespace_of(holder: Any) -> str:
    """What SGLang's radix cache keeps apart whatever the tokens are (cache salt, adapter), of a
    request or of a node's key; "" for most."""
    # The salt has a field of its own from 0.5.21 on.
    parts = (getattr(holder, "extra_key", None), getattr(holder, "cache_salt", None))
    return "\0".join(part or "" for part in parts) if any(parts) else ""


def beginning_of(tokens: NDArray[np.int64], namespace: str = "") -> bytes:
    """What prompts that are compared have in common; empty for one too short."""
    if len(tokens) < MIN_SHARED_TOKENS:
        return b""
    return tokens[:MIN_SHARED_TOKENS].tobytes() + namespace.encode("utf-8", "surrogatepass")


class Prompt:
    """The prompt of a waiting request, and what it was last compared with.

    Args:
        tokens: int64 [prompt_tokens].
        namespace: see `namespace_of`; prompts of two share nothing.
    """

    __slots__ = ("beginning", "compared", "namespace", "tokens")

    def __init__(self, tokens: NDArray[np.int64], namespace: str = "") -> None:
        self.tokens = tokens
        self.namespace = namespace
        # Only prompts that begin alike are compared; one too short to share begins like nobody.
        self.beginning = beginning_of(tokens, namespace)
        self.compared: list[tuple[StartedPrompt, int]] = []

    def common_with(self, started: StartedPrompt) -> int:
        """Length of the prefix in common with a prompt that has started; compared once."""
        if started.prompt.namespace != self.namespace:
            return 0
        for other, common in self.compared:
            if other is started:
                return common
        common = _common_prefix(self.tokens, started.prompt.tokens)
        self.compared = [*self.compared[-_COMPARED + 1 :], (started, common)]
        return common


@dataclass(slots=True, eq=False)
class StartedPrompt:
    """A prompt that has been given to the engine.

    Attributes:
        rid: its request.
        prompt: the prompt.
        cached_tokens: what was there when it started; the rest is shareable once it is prefilled.
        prefilled: whether all of it is in the KV pool.
    """

    rid: str
    prompt: Prompt
    cached_tokens: int
    prefilled: bool = False

    def ready(self, common: int) -> int:
        """Of so many tokens at its beginning, those in the KV pool."""
        return common if self.prefilled else min(common, self.cached_tokens)


class SharedPrefix(NamedTuple):
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


_NOTHING_SHARED = SharedPrefix()


class StartedPrompts:
    """The prompts that started last, by side and beginning."""

    def __init__(self) -> None:
        self._latest: OrderedDict[tuple[Side, bytes], StartedPrompt] = OrderedDict()
        # In the order of their start, all of them and by beginning.
        self._running: dict[str, StartedPrompt] = {}
        self._alike: dict[bytes, dict[str, StartedPrompt]] = {}

    def shared(self, prompt: Prompt) -> SharedPrefix:
        """Compare a waiting prompt with the last one of each side that begins as it does, and with
        the last of those that run: its own prefix is the longest that is locked.

        Tokens are compared once for each pair of prompts; to ask again costs next to nothing.
        """
        cached = about_to_come = 0
        # Its last token is always computed: its logits give the first output token.
        most = len(prompt.tokens) - 1
        for side in Side:
            started = self._latest.get((side, prompt.beginning))
            if started is None:
                continue
            common = min(prompt.common_with(started), most)
            cached = max(cached, started.ready(common))
            if not started.prefilled:
                about_to_come = max(about_to_come, common)
        holder = self._holder(prompt)
        locked = 0
        if holder is not None:
            locked = holder.ready(min(prompt.common_with(holder), most))
            cached = max(cached, locked)
        if not (cached or about_to_come):
            return _NOTHING_SHARED
        return SharedPrefix(
            cached,
            locked,
            holder.rid if holder is not None and locked else None,
            about_to_come - cached >= MIN_SHARED_TOKENS,
        )

    def _holder(self, prompt: Prompt) -> StartedPrompt | None:
        """The last to start of those that run and begin alike; else of all, because a job often
        has a few tokens in common (a system prompt, a first token)."""
        alike = self._alike.get(prompt.beginning) or self._running
        return next(reversed(alike.values()), None)

    def start(self, rid: str, side: Side, prompt: Prompt, cached_tokens: int) -> None:
        """A request has been offered to the engine."""
        started = self._running[rid] = StartedPrompt(rid, prompt, cached_tokens)
        self._alike.setdefault(prompt.beginning, {})[rid] = started
        prompt.compared = []  # It waits no longer, and must not keep its predecessors alive.
        if prompt.beginning:
            key = (side, prompt.beginning)
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

    def forget_ended(self, beginning: bytes | None = None) -> None:
        """What no running request holds is not in the cache any more: of the prompts that begin
        so, or of all."""
        keys = list(self._latest) if beginning is None else [(side, beginning) for side in Side]
        for key in keys:
            started = self._latest.get(key)
            if started is not None and started.rid not in self._running:
                del self._latest[key]

    def end(self, rid: str) -> None:
        """A request has ended; what it computed stays in the cache, for the time being."""
        started = self._running.pop(rid, None)
        if started is None:
            return
        alike = self._alike[started.prompt.beginning]
        del alike[rid]
        if not alike:
            del self._alike[started.prompt.beginning]
        if not started.prefilled:
            # Aborted or refused before its prompt was computed: it must hold up nobody.
            self._forget(started)

    def _forget(self, started: StartedPrompt) -> None:
        for side in Side:
            key = (side, started.prompt.beginning)
            if self._latest.get(key) is started:
                del self._latest[key]


def _common_prefix(a: NDArray[np.int64], b: NDArray[np.int64]) -> int:
    """Length of the common prefix of two token sequences."""
    n = min(len(a), len(b))
    different = a[:n] != b[:n]
    first = int(different.argmax()) if n else 0
    return first if n and different[first] else n
