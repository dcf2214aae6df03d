"""The time left of a job, by its predicted course and by how fast it follows it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

# So far beyond its course a job is no longer where that says: answers are longer than expected.
_OVERRUN = 1.02


class CurveClock:
    """Of one job. Fed with looks at the server's status, in order.

    The course says for how many of its own seconds the work done so far stands, and how many are
    left. How many of the clock's one of them takes is measured over the whole run: counters go in
    jumps, and the course itself, predicted anew, has the slow end. What is in flight counts: of a
    job that has the server to itself by the schedulers' counters, which go on smoothly; else by
    what the engine tells of each line now and then.
    """

    def __init__(self) -> None:
        self._curve: int | None = None
        self._offset = 0.0
        self._at, self._now = 0.0, 0.0
        self._passed = self._course = 0.0

    def seconds_left(
        self, now: float, job: Mapping[str, Any], counters: tuple[int, int] | None
    ) -> float | None:
        """None where there is nothing to tell by.

        Args:
            now: seconds.
            job: of GET /blendserve/status.
            counters: tokens of prompts and of answers that the schedulers have computed, if all
                of them are this job's.
        """
        curve = job.get("curve")
        if not curve:
            return None
        own = _work(curve, _computed(job))
        before = (job["curve_prefill_tokens"], job["curve_output_tokens"])
        work = own - _work(curve, before)
        if counters is not None:
            counted = _work(curve, counters)
            if self._curve != job["curves"]:
                self._offset = counted - work
            work = counted - self._offset
        whole, all_work = float(curve["seconds"][-1]), float(curve["work"][-1])
        at = float(np.interp(work, curve["work"], curve["seconds"]))
        if self._curve == job["curves"]:
            # Between two predictions nobody knows how far the course of the one went.
            self._passed += now - self._now
            self._course += max(at - self._at, 0.0)
        self._curve, self._now, self._at = job["curves"], now, at
        if self._course <= 0 or work > _OVERRUN * all_work:
            return None
        return (whole - at) * self._passed / self._course


def _work(curve: Mapping[str, Any], tokens: tuple[int, int]) -> float:
    prefill, output = curve["token_work"]
    return float(prefill * tokens[0] + output * tokens[1])


def _computed(job: Mapping[str, Any]) -> tuple[int, int]:
    """Tokens of prompts and of answers of the job, answered or in flight."""
    prefill = job["answered_prompt_tokens"] - job["answered_cached_tokens"]
    return (
        prefill + job["flight_prefill_tokens"],
        job["answered_output_tokens"] + job["flight_output_tokens"],
    )
