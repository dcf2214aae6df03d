"""A monitor on an event loop that notes how late a timer of a millisecond fires, phase by phase."""

from __future__ import annotations

import asyncio
import time
from typing import Any

import numpy as np


class StallMonitor:
    """Lags of the event loop by phase: how late a timer of a millisecond fires."""

    INTERVAL_SECONDS = 0.001

    def __init__(self) -> None:
        self.phase = "idle"
        self._lags: dict[str, list[tuple[float, float]]] = {}
        # Seconds into the phase, and milliseconds, of each time over the bar.
        self._held: dict[str, list[tuple[float, float]]] = {}
        self._since = {self.phase: time.perf_counter()}
        self._seconds: dict[str, float] = {}

    def enter(self, phase: str) -> None:
        if phase == self.phase:
            return
        now = time.perf_counter()
        self._seconds[self.phase] = (
            self._seconds.get(self.phase, 0.0) + now - self._since[self.phase]
        )
        self.phase = phase
        self._since[phase] = now

    async def run(self) -> None:
        while True:
            phase, before, computed = self.phase, time.perf_counter(), time.process_time()
            await asyncio.sleep(self.INTERVAL_SECONDS)
            lag = max(time.perf_counter() - before - self.INTERVAL_SECONDS, 0.0)
            own = min(lag, time.process_time() - computed)
            self._lags.setdefault(phase, []).append((lag, own))
            if own > 0.02:
                at = round(before - self._since[phase], 3)
                self._held.setdefault(phase, []).append((at, round(own * 1e3, 1)))

    def report(self) -> dict[str, dict[str, Any]]:
        phase = self.phase
        self.enter("")
        self.enter(phase)
        report: dict[str, dict[str, Any]] = {}
        for phase, lags in self._lags.items():
            report[phase] = {"seconds": round(self._seconds.get(phase, 0.0), 1)}
            report[phase]["samples"] = len(lags)
            report[phase]["held_at_s_for_ms"] = self._held.get(phase, [])
            for name, lag in zip(("lag", "own"), np.array(lags).T * 1e3, strict=True):
                report[phase] |= {
                    f"{name}_p50_ms": round(float(np.median(lag)), 2),
                    f"{name}_p99_ms": round(float(np.quantile(lag, 0.99)), 2),
                    f"{name}_p999_ms": round(float(np.quantile(lag, 0.999)), 2),
                    f"{name}_max_ms": round(float(lag.max()), 2),
                    f"{name}_over_20_ms": int((lag > 20).sum()),
                }
        return report
