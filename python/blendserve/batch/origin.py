"""Keeps pages of other sites out: a browser on this machine or its network would let them in."""

from __future__ import annotations

import ipaddress
import re
import socket
from collections.abc import Iterable
from urllib.parse import urlsplit

from starlette.datastructures import Headers, MutableHeaders
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from blendserve.batch.errors import error_response
from blendserve.batch.own_routes import is_own

_DEFAULT_PORTS = {"http": 80, "https": 443}
_HOST = re.compile(r"(?P<name>\[[0-9a-f:.]+\]|[a-z0-9._-]+)(?::(?P<port>[0-9]{1,5}))?\Z")
_ANY = "*"


class KnownHosts:
    """The names under which this server may be asked for in a `Host` header.

    A page of another site can make its own name lead to this machine (DNS rebinding), but then that
    name stands in the header. Loopback names, IP addresses and this machine's own name are known.

    Args:
        names: further ones; "*" for any.
    """

    def __init__(self, names: Iterable[str] = ()) -> None:
        self._names = {name.lower().rstrip(".") for name in (*names, socket.gethostname())}

    @classmethod
    def of(cls, listed: str, host: str) -> KnownHosts:
        """Of a setting, names with commas between, and the address that the server listens on."""
        return cls([host, *filter(None, map(str.strip, listed.split(",")))])

    def knows(self, name: str) -> bool:
        """`name`: lower case, without a port."""
        if _ANY in self._names or name in self._names:
            return True
        return name == "localhost" or name.endswith(".localhost") or _is_address(name)


class OriginGuard:
    """ASGI middleware: no page of another site reads or writes here.

    Refused are hosts that are not known, and what a browser says comes from a page of another
    origin, but for GET and HEAD of routes of our own, which change nothing. No answer allows a page
    of another origin to read it. Programs send no `Origin`, and are not concerned.

    Args:
        hosts: None for a server that asks for keys, which a rebound page does not have.
    """

    def __init__(self, app: ASGIApp, hosts: KnownHosts | None) -> None:
        self._app = app
        self._hosts = hosts

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] not in ("http", "websocket"):
            await self._app(scope, receive, send)
            return

        async def send_closed(message: Message) -> None:
            if message["type"] == "http.response.start":
                _close(MutableHeaders(raw=message.setdefault("headers", [])))
            await send(message)

        refusal = self._refusal(scope)
        await (refusal or self._app)(scope, receive, send_closed)

    def _refusal(self, scope: Scope) -> ASGIApp | None:
        headers = Headers(scope=scope)
        host = _split(headers.get("host", ""))
        is_known = self._hosts is None or (host is not None and self._hosts.knows(host[0]))
        if "host" in headers and not is_known:
            return error_response(
                421,
                "This server is not known under the name in the Host header. If it should be, "
                "start it with --allowed-hosts NAME.",
                "unknown_host",
            )
        is_read = scope["type"] == "http" and scope["method"] in ("GET", "HEAD")
        if _is_foreign(headers, host) and not (is_read and is_own(scope["path"])):
            return error_response(
                403,
                "Pages of other origins may not use this server. Let a server of yours ask it, or "
                "put both behind one host name.",
                "foreign_origin",
            )
        return None


def _is_foreign(headers: Headers, host: tuple[str, int | None] | None) -> bool:
    # Set by browsers only, and by no page; not sent to plain http of other machines.
    if headers.get("sec-fetch-site", "none") in ("cross-site", "same-site"):
        return True
    origin = headers.get("origin")
    if origin is None:
        return False
    try:
        parts = urlsplit(origin)
        name, port = parts.hostname, parts.port
    except ValueError:
        return True
    default = _DEFAULT_PORTS.get(parts.scheme)
    if host is None or name is None or default is None:
        return True
    # Whether a proxy in front speaks TLS is not known here: no port is the port of either scheme.
    return (name, port or default) != (host[0], host[1] or default)


def _split(host: str) -> tuple[str, int | None] | None:
    """Name in lower case and port of a `Host` header; None for what is none."""
    found = _HOST.match(host.lower())
    if found is None:
        return None
    name = found["name"].strip("[]").rstrip(".")
    return name, int(found["port"]) if found["port"] else None


def _is_address(name: str) -> bool:
    try:
        ipaddress.ip_address(name)
    except ValueError:
        return False
    return True


def _close(headers: MutableHeaders) -> None:
    for name in [name for name in headers if name.startswith("access-control-")]:
        del headers[name]
    # Nor may it be loaded as a script, a picture or the like.
    headers["cross-origin-resource-policy"] = "same-origin"
