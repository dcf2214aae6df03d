"""What a running job's counters say: token rates, prefix hits, time left, share of the bound."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from blendserve.cli.curve_clock import CurveClock

_RATE_WINDOW_SECONDS = 10.0


@dataclass(frozen=True)
class Figures:
    """One look at a job; None for what is not known (yet).

    prefill_tokens_per_second, decode_tokens_per_second: over the last seconds.
    prefix_hit_rate: part of the admitted prompt tokens that came out of the cache.
    eta_seconds: by the predicted course of what is left, at the pace so far; without one, of the
        token work that is left.
    share_of_bound: how near the pace so far is to the least time that the plan allows, up to 1.
    """

    prefill_tokens_per_second: float | None = None
    decode_tokens_per_second: float | None = None
    prefix_hit_rate: float | None = None
    eta_seconds: float | None = None
    share_of_bound: float | None = None

    def as_text(self) -> str:
        """One line for a terminal; empty before there is anything to tell."""
        parts = []
        if self.prefill_tokens_per_second is not None:
            parts.append(f"prefill {self.prefill_tokens_per_second:.0f} tok/s")
        if self.decode_tokens_per_second is not None:
            parts.append(f"decode {self.decode_tokens_per_second:.0f} tok/s")
        if self.prefix_hit_rate is not None:
            parts.append(f"{self.prefix_hit_rate:.0%} prefix hits")
        if self.share_of_bound is not None:
            parts.append(f"{self.share_of_bound:.0%} of the bound")
        return ", ".join(parts)


@dataclass(frozen=True)
class _Sample:
    at: float
    prefill_tokens: int
    decode_tokens: int


class FigureKeeper:
    """Turns counters that only grow, looked at now and then, into figures."""

    def __init__(self) -> None:
        self._samples: deque[_Sample] = deque()
        self._work: tuple[str, float, float] | None = None
        self._clock = CurveClock()

    def update(self, status: Mapping[str, Any], job_id: str, now: float | None = None) -> Figures:
        """Take in one answer of GET /blendserve/status. now: seconds of any clock that goes on
        steadily; this process's by default."""
        now = time.monotonic() if now is None else now
        schedulers = status.get("schedulers", [])
        prefill, decode = self._rates(now, schedulers)
        prompt = sum(scheduler["prompt_tokens"] for scheduler in schedulers)
        cached = sum(scheduler["cached_tokens"] for scheduler in schedulers)
        job = next((job for job in status.get("jobs", []) if job["job_id"] == job_id), None)
        # Its own only where nothing else runs; online requests are few beside a batch.
        alone = len(status.get("jobs", [])) == 1 and schedulers
        latest = self._samples[-1]
        counters = (latest.prefill_tokens, latest.decode_tokens) if alone else None
        eta, share = self._pace(now, job, counters) if job is not None else (None, None)
        return Figures(prefill, decode, cached / prompt if prompt else None, eta, share)

    def _rates(
        self, now: float, schedulers: list[dict[str, Any]]
    ) -> tuple[float, float] | tuple[None, None]:
        latest = _Sample(
            now,
            sum(scheduler["prefill_tokens"] for scheduler in schedulers),
            sum(scheduler["decode_tokens"] for scheduler in schedulers),
        )
        if self._samples and latest.prefill_tokens < self._samples[-1].prefill_tokens:
            self._samples.clear()  # Another engine, which counts from zero.
        self._samples.append(latest)
        while latest.at - self._samples[0].at > _RATE_WINDOW_SECONDS:
            self._samples.popleft()
        first = self._samples[0]
        seconds = latest.at - first.at
        if not seconds:
            return None, None
        return (
            (latest.prefill_tokens - first.prefill_tokens) / seconds,
            (latest.decode_tokens - first.decode_tokens) / seconds,
        )

    def _pace(
        self, now: float, job: Mapping[str, Any], counters: tuple[int, int] | None
    ) -> tuple[float | None, float | None]:
        done, total = job.get("done_work_tokens", 0.0), job.get("total_work_tokens", 0.0)
        if self._work is None or self._work[0] != job["job_id"] or done < self._work[2]:
            self._work = (job["job_id"], now, done)
            self._clock = CurveClock()
        _, started, before = self._work
        by_curve = self._clock.seconds_left(now, job, counters)
        elapsed, work = now - started, done - before
        if elapsed <= 0 or work <= 0 or total <= 0:
            return by_curve, None
        # Beyond all that was expected nobody knows how much is left.
        left = (total - done) * elapsed / work if done < total else None
        share = job.get("bound_seconds", 0.0) * work / total / elapsed
        # A bound that the run beats is none: the device was measured wrongly, or the lengths of
        # what is left are not what was expected.
        return left if by_curve is None else by_curve, share if 0 < share <= 1 else None
