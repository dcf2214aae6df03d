"""Webhooks at the end of batches: OpenAI's events, signed by the Standard Webhooks scheme.

An event is sent until its receiver answers 2xx, so it may come more than once; its webhook-id is
the same each time. Addresses come from the operator, or from a batch's metadata if the operator has
allowed their host, so no client can make this server ask a host of the client's choice.
"""

from __future__ import annotations

import asyncio
import base64
import binascii
import contextlib
import hashlib
import hmac
import logging
import random
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

import httpx
import orjson

from blendserve.batch.errors import bad_request, reason_of
from blendserve.batch.outbox import Notice
from blendserve.batch.store import BatchStore

logger = logging.getLogger(__name__)

METADATA_KEY = "blendserve_webhook_url"
_SECRET_PREFIX = "whsec_"
_LEAST_SECRET_BYTES = 24
_TIMEOUT_SECONDS = 15.0
# Doubled from try to try, up to an hour, for three days: as OpenAI does.
_FIRST_PAUSE_SECONDS, _LONGEST_PAUSE_SECONDS = 5, 3_600
_GIVE_UP_SECONDS = 72 * 3_600
_GONE = 410
# How long at most an event waits that nobody has announced: one whose next try is due.
_LOOK_SECONDS = 1.0
_PORTS = {"http": 80, "https": 443}


class WebhookError(ValueError):
    """A setting that cannot be used; says what to do."""


@dataclass(frozen=True)
class Webhooks:
    """What the operator allows.

    Attributes:
        secret: key of the signatures; empty: no webhooks at all.
        url: told of every batch; empty: only those of metadata.
        hosts: `host` or `host:port` that metadata may name.
    """

    secret: bytes = b""
    url: str = ""
    hosts: frozenset[str] = frozenset()

    @classmethod
    def of(cls, url: str, secret_file: str, hosts: str) -> Webhooks:
        """From settings. Raises WebhookError."""
        named = frozenset(filter(None, (host.strip().lower() for host in hosts.split(","))))
        if not url and not named:
            return cls()
        if not secret_file:
            raise WebhookError(
                "webhooks are signed: name a file with their secret with --webhook-secret-file. "
                'One is made by: echo "whsec_$(openssl rand -base64 32)" > FILE'
            )
        if url:
            _address(url)
        return cls(_secret(Path(secret_file)), url, named)

    def wanted_by(self, metadata: Mapping[str, str] | None) -> str | None:
        """The address that a batch names. ApiError 400 for one that it may not."""
        given = (metadata or {}).get(METADATA_KEY)
        if given is None:
            return None
        param = f"metadata.{METADATA_KEY}"
        try:
            host, port = _address(given)
        except WebhookError as error:
            raise bad_request(str(error), code="invalid_value", param=param) from error
        if host not in self.hosts and f"{host}:{port}" not in self.hosts:
            allowed = ", ".join(sorted(self.hosts)) or "none"
            raise bad_request(
                f"This server sends no webhooks to {host[:80]!r} (allowed: {allowed}); its "
                "operator can allow the host with --webhook-hosts.",
                code="webhook_host_not_allowed",
                param=param,
            )
        return given


def signed_headers(secret: bytes, event_id: str, timestamp: int, body: bytes) -> dict[str, str]:
    """The three headers of the Standard Webhooks scheme."""
    message = b"%s.%d.%s" % (event_id.encode(), timestamp, body)
    digest = base64.b64encode(hmac.digest(secret, message, hashlib.sha256)).decode()
    return {
        "webhook-id": event_id,
        "webhook-timestamp": str(timestamp),
        "webhook-signature": f"v1,{digest}",
    }


class WebhookSender:
    """Sends what waits in the outbox, one after the other, as long as it runs.

    `clock` gives unix seconds. What fails waits in the outbox, so nothing is lost over a restart.
    """

    def __init__(self, store: BatchStore, webhooks: Webhooks, clock: Callable[[], float]) -> None:
        self._store = store
        self._webhooks = webhooks
        self._clock = clock
        self._task: asyncio.Task[None] | None = None

    def start(self) -> None:
        if self._webhooks.secret:
            self._task = asyncio.create_task(self._run())

    async def stop(self) -> None:
        if self._task is not None:
            self._task.cancel()
            await asyncio.wait([self._task])
            self._task = None

    async def _run(self) -> None:
        # No proxy of the environment's: it would ask in this server's place, and know no list.
        async with httpx.AsyncClient(
            timeout=_TIMEOUT_SECONDS, follow_redirects=False, trust_env=False
        ) as client:
            while True:
                sent = False
                try:
                    sent = await self._send_next(client)
                except Exception as error:
                    # A full disk, a locked database: the events are still there.
                    logger.error("webhooks wait: %s", reason_of(error))
                if not sent:
                    await asyncio.sleep(_LOOK_SECONDS)

    async def _send_next(self, client: httpx.AsyncClient) -> bool:
        """Tries one that is due; False if none is."""
        outbox, now = self._store.outbox, int(self._clock())
        notice = await asyncio.to_thread(outbox.next_notice, now)
        if notice is None:
            return False
        failure = await self._deliver(client, notice, now)
        if failure is None:
            await asyncio.to_thread(outbox.done, notice.batch_id)
        elif failure == str(_GONE) or now - notice.ended_at > _GIVE_UP_SECONDS:
            logger.error("the webhook of %s is given up: %s", notice.batch_id, failure)
            await asyncio.to_thread(outbox.done, notice.batch_id)
        else:
            pause = pause_seconds(notice.attempts)
            logger.warning(
                "the webhook of %s is tried again in %d s: %s", notice.batch_id, pause, failure
            )
            await asyncio.to_thread(outbox.again, notice.batch_id, now + pause)
        return True

    async def _deliver(self, client: httpx.AsyncClient, notice: Notice, now: int) -> str | None:
        """What was wrong; None if the receiver has it."""
        url = self._webhooks.url if notice.url is None else notice.url
        if notice.url is not None:
            try:
                # The list may be another one than when the batch was made.
                self._webhooks.wanted_by({METADATA_KEY: url})
            except Exception as error:
                return str(error)
        if not url:
            return "no address is set any more"
        event_id = f"evt_{notice.batch_id.removeprefix('batch_')}"
        body = orjson.dumps(
            {
                "id": event_id,
                "object": "event",
                "created_at": notice.ended_at,
                "type": f"batch.{notice.status}",
                "data": {"id": notice.batch_id},
            }
        )
        headers = signed_headers(self._webhooks.secret, event_id, now, body)
        headers["Content-Type"] = "application/json"
        try:
            async with (
                asyncio.timeout(_TIMEOUT_SECONDS),
                # Not read: whatever a receiver says beyond its status is of no use here.
                client.stream("POST", url, content=body, headers=headers) as answer,
            ):
                return None if answer.is_success else str(answer.status_code)
        except (httpx.HTTPError, httpx.InvalidURL, TimeoutError) as error:
            return type(error).__name__


def pause_seconds(attempts: int) -> int:
    """Before the next try, after so many that failed: some more or less, so that receivers that
    come back do not meet all events at once."""
    longest = min(_FIRST_PAUSE_SECONDS << min(attempts, 20), _LONGEST_PAUSE_SECONDS)
    return max(1, round(longest * random.uniform(0.8, 1.2)))


def _address(url: str) -> tuple[str, int]:
    """Host and port of a webhook's address."""
    found = None
    with contextlib.suppress(httpx.InvalidURL):
        found = httpx.URL(url)
    if found is None or found.scheme not in _PORTS or not found.host or found.userinfo:
        raise WebhookError(
            f"{url[:200]!r} is no address for webhooks; give https://host/path, without a user"
        )
    return found.host.lower(), found.port or _PORTS[found.scheme]


def _secret(path: Path) -> bytes:
    try:
        text = path.read_text(encoding="utf-8").strip()
    except (OSError, UnicodeDecodeError) as error:
        raise WebhookError(f"--webhook-secret-file {path}: {error}") from error
    secret = b""
    with contextlib.suppress(binascii.Error, ValueError):
        secret = base64.b64decode(text.removeprefix(_SECRET_PREFIX), validate=True)
    if not text.startswith(_SECRET_PREFIX) or len(secret) < _LEAST_SECRET_BYTES:
        raise WebhookError(
            f"--webhook-secret-file {path}: it must hold whsec_ and at least {_LEAST_SECRET_BYTES} "
            "bytes in base64"
        )
    return secret
