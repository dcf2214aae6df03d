"""One program of a run: started, held at its first request, and told to go on."""

from __future__ import annotations

import threading
from collections.abc import Callable
from concurrent.futures import Future
from contextvars import ContextVar
from dataclasses import dataclass, field
from typing import Any

running_program: ContextVar[HeldProgram | None] = ContextVar("running_program", default=None)
"""The program whose code runs. SGLang's threads for a program and its forks inherit it."""


class Stopped(RuntimeError):
    """A program that was held is not to run any more."""


@dataclass(eq=False)
class HeldProgram:
    """A program and where it stands.

    Attributes:
        endpoint: the backend whose requests it is held at.
        on_hold: called once, with what the server is to know of the first request.
        result: of the program, once it has ended.
        index: its place in the input.
    """

    index: int
    endpoint: Any
    on_hold: Callable[[HeldProgram, dict[str, Any]], None]
    result: Future[Any] = field(default_factory=Future)
    held: bool = False
    gone: bool = False
    running: bool = False
    _ticket: str | None = None
    _failure: BaseException | None = None
    _lock: threading.Lock = field(default_factory=threading.Lock)
    _go: threading.Event = field(default_factory=threading.Event)

    def go_ahead(self, data: dict[str, Any]) -> str | None:
        """Wait until this program may send requests; its ticket, None for one without a plan.

        data: SGLang's body of the request. Raises what `fail` was given.
        """
        with self._lock:
            first, self.held = not self.held, True
        if first:
            self.on_hold(self, planned_part(data))
        self._go.wait()
        if self._failure is not None:
            raise self._failure
        return self._ticket

    def go(self, ticket: str | None) -> None:
        """It may send its requests from now on."""
        self.gone, self._ticket = True, ticket
        self._go.set()

    def fail(self, error: BaseException) -> None:
        """Its requests raise from now on."""
        self.gone, self._failure = True, error
        self._go.set()


def planned_part(data: dict[str, Any]) -> dict[str, Any]:
    """What the server plans with, of a request's body; it refuses to plan what it cannot read.

    What is odd about a request is left to it alone, and must not spoil the job.
    """
    text, given = data.get("text"), data["sampling_params"]
    names = ("max_new_tokens", "ignore_eos", "n")
    params = {name: given[name] for name in names if given.get(name) is not None}
    if data.get("image_data") is not None or not _is_text(text):
        return _UNPLANNED
    if not all(isinstance(value, int) for value in params.values()):
        return _UNPLANNED
    return {"text": text, "sampling_params": params}


_UNPLANNED = {"unplanned": True}


def _is_text(text: Any) -> bool:
    """Whether it is a text that is not empty, and that UTF-8 can have."""
    if not isinstance(text, str) or not text:
        return False
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True
