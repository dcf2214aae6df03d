"""An engine in another process as an executor: the front process's end of the link."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import httpx
import orjson

from blendserve.batch.engine_routes import EngineInfo
from blendserve.batch.executor import (
    BatchLine,
    EngineUnavailable,
    LineError,
    LineFault,
    LineResult,
    LineSource,
)
from blendserve.batch.rests import with_rests

CACHE_SALT_HEADER = "x-blendserve-cache-salt"
"""Of what the front passes to the engine: whose KV it may share, see `ApiKeys.cache_salt`."""

# SGLang's server closes a connection that was idle for 5 s. One that this end keeps as long could
# be closed just when a request is sent on it.
_KEEPALIVE_SECONDS = 2.0


@dataclass(frozen=True)
class EngineAddress:
    """Where the engine process of the hour listens, and the key that it asks for."""

    url: str
    token: str

    @property
    def headers(self) -> dict[str, str]:
        return {"Authorization": f"Bearer {self.token}"}


def engine_client(timeout: float | None = None) -> httpx.AsyncClient:
    """A client for an engine process, which is on this machine: no proxies, and no certificates.

    To read those takes 30 ms, in which the event loop would stand still.
    """
    return httpx.AsyncClient(
        timeout=timeout,
        trust_env=False,
        verify=False,
        limits=httpx.Limits(max_connections=None, keepalive_expiry=_KEEPALIVE_SECONDS),
    )


class RemoteExecutor:
    """Runs lines in the engine process that is up, if one is (an `Executor`).

    `on_lost` is called when a stream breaks: somebody should look after the engine, and either
    start another one or say that it is up. There are no timeouts here: whether an engine hangs is
    decided in one place, by whoever watches its process. `cache_salt` gives a job's, by its id; it
    is called from a worker thread.
    """

    def __init__(
        self,
        on_lost: Callable[[], None] = lambda: None,
        cache_salt: Callable[[str], str] = lambda _: "",
    ) -> None:
        self._on_lost = on_lost
        self._cache_salt = cache_salt
        self._info: EngineInfo | None = None
        self._reason = "the engine is loading"
        self.address: EngineAddress | None = None

    def engine_up(self, address: EngineAddress, info: EngineInfo) -> None:
        """An engine answers at this address."""
        self.address, self._info = address, info

    def engine_down(self, reason: str) -> None:
        """There is none now. What the last one said of itself stays known."""
        self.address, self._reason = None, reason

    @property
    def endpoints(self) -> frozenset[str]:
        return frozenset(self._known().endpoints)

    @property
    def models(self) -> frozenset[str]:
        return frozenset(self._known().models)

    @property
    def fingerprint(self) -> str:
        return self._known().fingerprint

    def check(self, line: BatchLine) -> LineFault | None:
        """None: the engine answers a body that it cannot run as that line's own error."""
        return None

    async def run(
        self,
        job_id: str,
        lines: LineSource,
        pending: Sequence[int],
        on_start: Callable[[int], None],
        deadline: float | None = None,
    ) -> AsyncIterator[LineResult]:
        address = self.address
        if address is None:
            raise EngineUnavailable(self._reason)
        job = {
            "job_id": job_id,
            "path": str(lines.path),
            "max_line_bytes": lines.max_line_bytes,
            "pending": await asyncio.to_thread(_ranges, with_rests(pending)),
            "deadline": deadline,
        }
        salt = await asyncio.to_thread(self._cache_salt, job_id)
        headers = {**address.headers, CACHE_SALT_HEADER: salt}
        ended = False
        try:
            async with (
                engine_client() as client,
                client.stream(
                    "POST", f"{address.url}/blendserve/jobs", json=job, headers=headers
                ) as response,
            ):
                response.raise_for_status()
                async for event in _events(response):
                    if "result" in event:
                        yield _result(event["result"])
                    elif "start" in event:
                        for index in event["start"]:
                            on_start(index)
                    elif "failed" in event:
                        raise RuntimeError(f"the engine's executor raised {event['failed']}")
                    elif "lost" in event:
                        # Others are up: whoever looks finds them so, and the job goes on.
                        self._on_lost()
                        raise EngineUnavailable(event["reason"], event["lost"])
                    elif "end" in event:
                        ended = True
        except httpx.HTTPError as error:
            self._on_lost()
            raise EngineUnavailable(f"the engine ended ({type(error).__name__})") from error
        if not ended:
            self._on_lost()
            raise EngineUnavailable("the engine ended")

    def _known(self) -> EngineInfo:
        if self._info is None:
            raise EngineUnavailable(self._reason)
        return self._info


async def _events(response: httpx.Response) -> AsyncIterator[dict[str, Any]]:
    rest: list[bytes] = []
    async for block in response.aiter_raw():
        *whole, last = block.split(b"\n")
        for line in whole:
            yield orjson.loads(b"".join([*rest, line]))
            rest.clear()
        rest.append(last)


def _result(event: dict[str, Any]) -> LineResult:
    error = event["error"]
    return LineResult(**{**event, "error": error and LineError(**error)})


def _ranges(indexes: Iterable[int]) -> list[tuple[int, int]]:
    ranges: list[tuple[int, int]] = []
    for index in indexes:
        if ranges and ranges[-1][1] == index:
            ranges[-1] = (ranges[-1][0], index + 1)
        else:
            ranges.append((index, index + 1))
    return ranges
