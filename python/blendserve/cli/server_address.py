"""A server that speaks OpenAI's API, as the commands that are its clients reach it."""

from __future__ import annotations

import ipaddress
from types import TracebackType
from urllib.parse import urlsplit

import httpx
from openai import OpenAI

_TIMEOUT_SECONDS = 60.0


class Server:
    """Use as a context.

    Args:
        url: with or without /v1 at its end.
        api_key: for a server that asks for one.

    Raises:
        ValueError: it is no http address.
    """

    def __init__(self, url: str, api_key: str) -> None:
        self.root = url.rstrip("/").removesuffix("/v1")
        host = _host(self.root)
        if not host:
            raise ValueError(f"--url {url}: give an address like http://127.0.0.1:30000")
        # A proxy of the environment's is not on the way to this very machine.
        through_proxy = not _is_loopback(host)
        self.http = httpx.Client(
            base_url=self.root,
            headers={"Authorization": f"Bearer {api_key}"},
            trust_env=through_proxy,
            timeout=_TIMEOUT_SECONDS,
        )
        self.client = OpenAI(
            base_url=f"{self.root}/v1",
            api_key=api_key,
            http_client=httpx.Client(trust_env=through_proxy, timeout=_TIMEOUT_SECONDS),
        )

    def __enter__(self) -> Server:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.http.close()
        self.client.close()


def _host(url: str) -> str | None:
    """None where it is no http address."""
    try:
        parts = urlsplit(url)
    except ValueError:
        return None
    return parts.hostname if parts.scheme in ("http", "https") else None


def _is_loopback(host: str) -> bool:
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"
