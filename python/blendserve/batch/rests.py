"""Rests for loops of worker threads, in which the event loop gets the interpreter lock at once.

Python takes the lock from a busy thread only once the waiting one has asked for it, 5 ms after it
began to wait, and an event loop waits several times for one request.
"""

from __future__ import annotations

import time
from collections.abc import Iterable, Iterator
from typing import TypeVar

Item = TypeVar("Item")

_BURST_SECONDS = 5e-4
_REST_SECONDS = 5e-5


def with_rests(items: Iterable[Item]) -> Iterator[Item]:
    """The items, with a short sleep whenever half a millisecond has gone. Not for an event loop."""
    due = time.perf_counter() + _BURST_SECONDS
    for item in items:
        yield item
        if time.perf_counter() >= due:
            time.sleep(_REST_SECONDS)
            due = time.perf_counter() + _BURST_SECONDS
