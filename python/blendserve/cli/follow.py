"""Live progress of a batch on a terminal: lines, token rates, hit rate and time left."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Mapping
from dataclasses import dataclass
from types import TracebackType
from typing import Any

import httpx
from openai import OpenAI
from openai.types import Batch
from rich.console import Console
from rich.progress import BarColumn, Progress, SpinnerColumn, TextColumn, TimeElapsedColumn

ENDED = frozenset({"completed", "failed", "expired", "cancelled"})
_POLL_SECONDS = 0.5
_RATE_WINDOW_SECONDS = 10.0


@dataclass(frozen=True)
class _Sample:
    at: float
    prefill_tokens: int
    decode_tokens: int


class BatchDisplay:
    """A progress line that is fed with what the server says.

    Args:
        console: where to draw; a plain line every few seconds if it is no terminal.
    """

    def __init__(self, console: Console) -> None:
        self._samples: deque[_Sample] = deque()
        self._work: deque[tuple[float, float]] = deque()
        self._progress = Progress(
            SpinnerColumn(),
            TextColumn("{task.description}"),
            BarColumn(bar_width=24),
            TextColumn("{task.completed:.0f}/{task.total:.0f} done, {task.fields[failed]} failed"),
            TextColumn("{task.fields[rates]}"),
            TimeElapsedColumn(),
            TextColumn("{task.fields[eta]}"),
            console=console,
        )
        self._task = self._progress.add_task("validating", total=1, failed=0, rates="", eta="")
        self._console = console
        self._printed_at = 0.0

    def __enter__(self) -> BatchDisplay:
        if self._console.is_terminal:
            self._progress.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._progress.stop()

    def update(self, batch: Batch, status: Mapping[str, Any]) -> None:
        """Show one answer of ``GET /v1/batches/{id}`` and one of ``GET /blendserve/status``."""
        now = time.monotonic()
        counts = batch.request_counts
        total = counts.total if counts else 0
        failed = counts.failed if counts else 0
        done = (counts.completed if counts else 0) + failed
        rates = self._rates(now, status.get("schedulers", []))
        eta = self._eta(now, next(iter(status.get("jobs", [])), None))
        self._progress.update(
            self._task,
            description=batch.status,
            total=max(total, 1),
            completed=done,
            failed=failed,
            rates=rates,
            eta=eta,
        )
        if not self._console.is_terminal and now - self._printed_at >= 5:
            self._printed_at = now
            self._console.print(
                f"{batch.status}: {done}/{total} done, {failed} failed  {rates}  {eta}".rstrip(),
                soft_wrap=True,
            )

    def _rates(self, now: float, schedulers: list[dict[str, Any]]) -> str:
        """Prefill and decode tokens/s over the last seconds, and the prefix hit rate so far."""
        latest = _Sample(
            now,
            sum(scheduler["prefill_tokens"] for scheduler in schedulers),
            sum(scheduler["decode_tokens"] for scheduler in schedulers),
        )
        self._samples.append(latest)
        while latest.at - self._samples[0].at > _RATE_WINDOW_SECONDS:
            self._samples.popleft()
        first = self._samples[0]
        seconds = latest.at - first.at
        if not seconds:
            return ""
        prefill = (latest.prefill_tokens - first.prefill_tokens) / seconds
        decode = (latest.decode_tokens - first.decode_tokens) / seconds
        prompt = sum(scheduler["prompt_tokens"] for scheduler in schedulers)
        cached = sum(scheduler["cached_tokens"] for scheduler in schedulers)
        hits = f", {cached / prompt:.0%} prefix hits" if prompt else ""
        return f"prefill {prefill:.0f} tok/s, decode {decode:.0f} tok/s{hits}"

    def _eta(self, now: float, job: Mapping[str, Any] | None) -> str:
        """Time left, from the token work that is left and the pace of the answers so far."""
        if job is None:
            return ""
        self._work.append((now, job["done_work_tokens"]))
        started, before = self._work[0]
        pace = (job["done_work_tokens"] - before) / (now - started) if now > started else 0.0
        if pace <= 0:
            return "ETA --"
        left = max(job["total_work_tokens"] - job["done_work_tokens"], 0.0) / pace
        return f"ETA {left:.0f} s"


def follow(base_url: str, batch_id: str, console: Console, headers: Mapping[str, str]) -> Batch:
    """Show a batch until it has ended, and return it as it then is.

    Raises:
        openai.APIError: the server does not answer any more.
    """
    client = openai_client(base_url, headers)
    with BatchDisplay(console) as display, httpx.Client(base_url=base_url, headers=headers) as http:
        while True:
            batch = client.batches.retrieve(batch_id)
            try:
                status = http.get("/blendserve/status").raise_for_status().json()
            except httpx.TransportError:
                # The next retrieve tells whether the server is gone, after its own retries.
                status = {}
            display.update(batch, status)
            if batch.status in ENDED:
                return batch
            time.sleep(_POLL_SECONDS)


def openai_client(base_url: str, headers: Mapping[str, str]) -> OpenAI:
    """The unmodified SDK, pointed at a server of ours."""
    return OpenAI(base_url=f"{base_url}/v1", api_key="unused", default_headers=dict(headers))
