"""Follow a batch of a server, over the unmodified OpenAI SDK."""

from __future__ import annotations

import time
from collections.abc import Mapping

import httpx
from openai import OpenAI
from openai.types import Batch
from rich.console import Console

from blendserve.cli.display import BatchDisplay
from blendserve.cli.figures import FigureKeeper

ENDED = frozenset({"completed", "failed", "expired", "cancelled"})
_POLL_SECONDS = 0.5
_NO_COUNTS = {"total": 0, "completed": 0, "failed": 0}


def follow(base_url: str, batch_id: str, console: Console, headers: Mapping[str, str]) -> Batch:
    """Show a batch of a server until it has ended, and return it as it then is.

    Raises:
        openai.APIError: the server does not answer any more.
    """
    with _client(base_url, headers) as http:
        return follow_with(openai_client(base_url, headers), http, batch_id, console)


def follow_with(client: OpenAI, http: httpx.Client, batch_id: str, console: Console) -> Batch:
    """The same with clients of one's own; `http` is for the server's routes beside OpenAI's."""
    keeper = FigureKeeper()
    with BatchDisplay(console) as display:
        while True:
            batch = client.batches.retrieve(batch_id)
            try:
                status = http.get("/blendserve/status").raise_for_status().json()
            except httpx.HTTPError:
                # The next retrieve tells whether the server is gone, after its own retries; one of
                # another kind has no such route.
                status = {}
            counts = batch.request_counts
            shown = _NO_COUNTS if counts is None else counts.model_dump()
            note = getattr(batch, "note", None)
            display.update(batch.status, shown, keeper.update(status, batch_id), note)
            if batch.status in ENDED:
                return batch
            time.sleep(_POLL_SECONDS)


def openai_client(base_url: str, headers: Mapping[str, str]) -> OpenAI:
    """The unmodified SDK, pointed at a server of ours."""
    url = f"{base_url}/v1"
    return OpenAI(base_url=url, api_key="unused", http_client=_client(url, headers))


def _client(base_url: str, headers: Mapping[str, str]) -> httpx.Client:
    # The server is on this machine: no proxy of the environment's is on the way.
    return httpx.Client(base_url=base_url, headers=dict(headers), trust_env=False)
