"""API keys: who may come in, and as whom."""

from __future__ import annotations

import hashlib
import hmac
import logging
import re
import secrets
import stat
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from starlette.datastructures import Headers
from starlette.responses import JSONResponse
from starlette.types import ASGIApp, Receive, Scope, Send
from starlette.websockets import WebSocketClose

from blendserve.batch.api import TENANT_SCOPE_KEY
from blendserve.batch.errors import error_response
from blendserve.batch.health import HEALTH_PATHS
from blendserve.batch.page import PAGE_PATHS

logger = logging.getLogger(__name__)

ADMIN_SCOPE_KEY = "blendserve.admin"

_NAME = re.compile(r"[A-Za-z0-9._-]{1,64}\Z")
_MIN_KEY_CHARS = 16
# As with SGLang's own --api-key: probes carry none. The page holds no data; it asks for a key.
_OPEN_PATHS = frozenset(
    {"/health", "/health_generate", "/metrics", "/metrics/", *PAGE_PATHS, *HEALTH_PATHS}
)


class KeyFileError(ValueError):
    """A file of API keys that cannot be used; names the file, the line and the remedy."""


@dataclass(frozen=True)
class Holder:
    """Whose key it is. An admin may also use the routes that steer the engine."""

    tenant: str
    admin: bool


class ApiKeys:
    """The keys of a server, held as digests. Empty: everybody may come in, as one tenant.

    Args:
        holders: by key.
    """

    def __init__(self, holders: Mapping[str, Holder]) -> None:
        self._holders = {_digest(key): holder for key, holder in holders.items()}
        self._secret = secrets.token_bytes(32)

    @classmethod
    def read(cls, path: Path) -> ApiKeys:
        """Lines `tenant key [admin]`; blank lines and those that begin with # are skipped.

        Raises:
            KeyFileError: not readable, or a line that is none.
        """
        try:
            text = path.read_text("utf-8")
            mode = path.stat().st_mode
        except (OSError, UnicodeDecodeError) as error:
            raise KeyFileError(f"{path} cannot be read as a file of API keys: {error}") from error
        if mode & (stat.S_IRWXG | stat.S_IRWXO):
            logger.warning(
                "%s holds API keys, and other users of this machine may read or change it; run: "
                "chmod 600 %s",
                *(path, path),
            )
        holders: dict[str, Holder] = {}
        for number, line in enumerate(text.splitlines(), start=1):
            words = line.split()
            if not words or line.lstrip().startswith("#"):
                continue
            place = f"{path}, line {number}"
            if len(words) not in (2, 3) or words[2:] not in ([], ["admin"]):
                raise KeyFileError(f"{place}: write `tenant key`, or `tenant key admin`")
            if not _NAME.match(words[0]):
                raise KeyFileError(f"{place}: a tenant's name has 1 to 64 of A-Z a-z 0-9 . _ -")
            if len(words[1]) < _MIN_KEY_CHARS:
                raise KeyFileError(f"{place}: a key has at least {_MIN_KEY_CHARS} characters")
            if words[1] in holders:
                raise KeyFileError(f"{place}: this key stands in the file twice")
            holders[words[1]] = Holder(words[0], admin=len(words) == 3)
        if not holders:
            raise KeyFileError(f"{path} holds no key; write lines `tenant key`")
        return cls(holders)

    def __bool__(self) -> bool:
        return bool(self._holders)

    def cache_salt(self, tenant: str) -> str:
        """Sets what the engine keeps of a tenant's prompts apart from those of others, who would
        else learn from `cached_tokens` what it prompts. "" where keys name no tenants.

        Nobody can guess it. It is another one after a restart, which empties the cache anyhow.
        """
        if not tenant:
            return ""
        return hmac.digest(self._secret, tenant.encode(), "sha256").hex()[:32]

    def holder(self, key: str) -> Holder | None:
        """Looks for a digest, so that the time it takes says nothing about any key."""
        return self._holders.get(_digest(key))


class KeyGuard:
    """ASGI middleware: 401 without a key, and the tenant's name in the scope with one.

    A websocket without a key is refused; what is no request of anybody's passes.
    """

    def __init__(self, app: ASGIApp, keys: ApiKeys) -> None:
        self._app = app
        self._keys = keys

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        kind = scope["type"]
        if kind not in ("http", "websocket") or (kind == "http" and _is_open(scope["path"])):
            await self._app(scope, receive, send)
            return
        holder: Holder | None = Holder("", admin=True)
        if self._keys:
            scheme, _, key = Headers(scope=scope).get("authorization", "").partition(" ")
            holder = self._keys.holder(key.strip()) if scheme.lower() == "bearer" else None
        if holder is None and kind == "websocket":
            await WebSocketClose()(scope, receive, send)
            return
        if holder is None:
            await _refusal()(scope, receive, send)
            return
        scope[TENANT_SCOPE_KEY] = holder.tenant
        scope[ADMIN_SCOPE_KEY] = holder.admin
        await self._app(scope, receive, send)


def _is_open(path: str) -> bool:
    # Whole paths only: a prefix would let `/metrics/../generate` in.
    return path in _OPEN_PATHS


def _refusal() -> JSONResponse:
    return error_response(
        401,
        "No valid API key was given. Send it as `Authorization: Bearer KEY`.",
        "invalid_api_key",
        headers={"WWW-Authenticate": "Bearer"},
    )


def _digest(key: str) -> bytes:
    return hashlib.sha256(key.encode()).digest()
