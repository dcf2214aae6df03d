"""Whose KV a request may share: the cache salt of the tenant that it came for.

The front process names the salt in a header of what it passes on, jobs and online requests alike.
Every request of SGLang's, whatever its route, goes through ``TokenizerManager.generate_request``,
and there the salt is put on it. The header is believed because nobody else has the engine's key.
"""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable, Mapping
from contextvars import ContextVar
from typing import Any

from starlette.datastructures import Headers

from blendserve.batch import CACHE_SALT_HEADER
from blendserve.runtime.pacing import is_batch_line

# What a client may put into ``custom_params`` never begins so.
RESERVED = "blendserve_"
# Carries the salt of a request whose class has no field for it.
SALT_PARAM = f"{RESERVED}cache_salt"

cache_salt: ContextVar[str] = ContextVar("cache_salt", default="")
"""The salt of the HTTP request that is being served; "" for what anybody may share."""


class SaltReader:
    """ASGI middleware: `cache_salt` is what the header of each request says."""

    def __init__(self, app: Any) -> None:
        self._app = app

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        if scope["type"] == "http":
            # Always set: a connection's next request may be given the context of the one before.
            cache_salt.set(Headers(scope=scope).get(CACHE_SALT_HEADER, ""))
        await self._app(scope, receive, send)


def salted(generate: Callable[..., AsyncIterator[Any]]) -> Callable[..., AsyncIterator[Any]]:
    """``generate_request`` of requests that carry their tenant's salt, and no forged plan."""

    def generate_request(obj: Any, *args: Any, **kwargs: Any) -> AsyncIterator[Any]:
        if not is_batch_line.get():
            refuse_reserved_params(obj)
        if salt := cache_salt.get():
            add_salt(obj, salt)
        return generate(obj, *args, **kwargs)

    return generate_request


def refuse_reserved_params(obj: Any) -> None:
    """Raise ValueError, which SGLang answers with 400, for ``custom_params`` that only we write:
    they would tell the scheduler to trust a plan that nobody made."""
    given = getattr(obj, "sampling_params", None)
    for params in given if isinstance(given, list) else [given]:
        custom = params.get("custom_params") if isinstance(params, Mapping) else None
        if not isinstance(custom, Mapping):
            continue
        for name in custom:
            if str(name).startswith(RESERVED):
                raise ValueError(
                    f"custom_params[{name!r}] is reserved for the server; leave it out."
                )


def add_salt(obj: Any, salt: str) -> None:
    """Put a salt on SGLang's request object, in front of one that the client gave."""
    # Releases before 0.5.21 have one field for both.
    field = next((name for name in ("cache_salt", "extra_key") if hasattr(obj, name)), None)
    if field is not None:
        given = getattr(obj, field)
        many = isinstance(given, list)
        setattr(obj, field, [_joined(salt, own) for own in given] if many else _joined(salt, given))
        return
    # An embedding request: the scheduler puts it on the request that it makes.
    params = obj.sampling_params
    own = {SALT_PARAM: salt}
    if isinstance(params, list):
        obj.sampling_params = [with_custom(one, own) for one in params]
    else:
        obj.sampling_params = with_custom(params, own)


def with_custom(params: Mapping[str, Any] | None, own: Mapping[str, Any]) -> dict[str, Any]:
    """A request's sampling parameters with these ``custom_params`` beside those that it has."""
    given = params or {}
    return {**given, "custom_params": {**(given.get("custom_params") or {}), **own}}


def take_salt(req: Any) -> None:
    """Give SGLang's scheduler-side request the salt that came in its parameters."""
    params = req.sampling_params.custom_params
    if params and (salt := params.get(SALT_PARAM)):
        req.extra_key = f"{req.extra_key or ''}/{salt}"
        rest = {key: value for key, value in params.items() if key != SALT_PARAM}
        # SGLang's own reference to the request alone is no parameter; see `plan_tag.without_tag`.
        req.sampling_params.custom_params = rest if rest.keys() - {"__req__"} else None


def _joined(salt: str, own: Any) -> str:
    if own is not None and not isinstance(own, str):
        raise ValueError("cache_salt and extra_key must be strings.")
    # Salts are of one length, so that none is the beginning of another with what a client adds.
    return f"{salt}/{own or ''}"
