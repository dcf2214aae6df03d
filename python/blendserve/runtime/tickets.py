"""Tickets: how a request of a frontend program finds its plan without knowing it.

A program that was planned is told to go on with a ticket, an id that nobody can guess, and names it
in ``custom_params`` of its requests. What it stands for stays here. A ticket that is not known, or
that another tenant was given, is no error: its program may have been forgotten with its job, as
after a restart of the engine. Its request is served as any online one.
"""

from __future__ import annotations

import secrets
from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from contextlib import aclosing
from functools import partial
from typing import Any, Protocol

from blendserve.runtime.cache_salt import cache_salt
from blendserve.runtime.pacing import is_batch_line

# Of ``custom_params``. Not one of the names that only the server may write (`cache_salt.RESERVED`).
TICKET_PARAM = "blend_ticket"


class TicketHolder(Protocol):
    """A program that was told to go on."""

    def begin(self, obj: Any) -> str:
        """A request of SGLang's came with the ticket; give it its plan. Returns a name for it."""
        ...

    def end(self, name: str, outputs: Sequence[Mapping[str, Any]], refused: bool) -> None:
        """It has ended, with the ``meta_info`` of its outputs. Called once or more; the first call
        counts.

        refused: the server answered before the scheduler had it.
        """
        ...


class Tickets:
    """The tickets of all programs that run."""

    def __init__(self) -> None:
        self._holders: dict[str, tuple[str, TicketHolder]] = {}

    def __len__(self) -> int:
        return len(self._holders)

    def issue(self, holder: TicketHolder, salt: str) -> str:
        """A new ticket for the requests that come with this tenant's salt."""
        ticket = secrets.token_urlsafe(18)
        self._holders[ticket] = (salt, holder)
        return ticket

    def withdraw(self, ticket: str) -> None:
        self._holders.pop(ticket, None)

    def find(self, ticket: str, salt: str) -> TicketHolder | None:
        """Whose ticket it is; None if it is nobody's, or another tenant's."""
        owner, holder = self._holders.get(ticket, ("", None))
        return holder if owner == salt else None


def ticketed(
    generate: Callable[..., AsyncIterator[Any]], tickets: Tickets
) -> Callable[..., AsyncIterator[Any]]:
    """SGLang's ``TokenizerManager.generate_request``, where tickets become plans."""

    def generate_request(obj: Any, *args: Any, **kwargs: Any) -> AsyncIterator[Any]:
        ticket = None if is_batch_line.get() else take_ticket(obj)
        holder = tickets.find(ticket, cache_salt.get()) if ticket is not None else None
        if holder is None:
            return generate(obj, *args, **kwargs)
        return _followed(holder, obj, partial(generate, obj, *args, **kwargs))

    return generate_request


async def _followed(
    holder: TicketHolder, obj: Any, generate: Callable[[], AsyncIterator[Any]]
) -> AsyncIterator[Any]:
    name, latest, refused = holder.begin(obj), [], False
    try:
        async with aclosing(generate()) as outputs:  # type: ignore[type-var]
            async for output in outputs:
                latest = [one["meta_info"] for one in _listed(output)]
                if all(meta.get("finish_reason") for meta in latest):
                    # SGLang's route does not ask on, so nothing else would tell in time.
                    holder.end(name, latest, False)
                yield output
    except ValueError:
        refused = not latest
        raise
    finally:
        holder.end(name, latest, refused)


def _listed(output: Any) -> list[Any]:
    return output if isinstance(output, list) else [output]


def take_ticket(obj: Any) -> str | None:
    """Take the ticket out of SGLang's request object.

    Raises ValueError, which SGLang answers with 400, for one that is no text.
    """
    given = getattr(obj, "sampling_params", None)
    if not isinstance(given, Mapping):
        return None
    custom = given.get("custom_params")
    if not isinstance(custom, Mapping) or TICKET_PARAM not in custom:
        return None
    ticket = custom[TICKET_PARAM]
    if not isinstance(ticket, str):
        raise ValueError(f"custom_params[{TICKET_PARAM!r}] must be the text that the server gave.")
    rest = {key: value for key, value in custom.items() if key != TICKET_PARAM}
    obj.sampling_params = {**given, "custom_params": rest or None}
    return ticket
