"""BlendServe's series in SGLang's ``GET /metrics``: what the reports and the job views say.

SGLang runs prometheus_client in its multiprocess mode, in which a value is a number in a file; so
the values are copied into gauges and counters now and then, and nothing is computed at a scrape.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from blendserve.planner import Side
from blendserve.runtime.dispatcher import DispatchView
from blendserve.runtime.feedback import SchedulerReport
from blendserve.runtime.job_view import JobView

# Field of `SchedulerReport`, name of the series, help. Fields by side get a label of that name.
_GAUGES = (
    ("queued", "queued_requests", "Planned requests that wait in the scheduler."),
    ("running", "running_requests", "Planned requests that hold KV memory."),
    ("account_tokens", "side_kv_tokens", "KV memory booked by a side, in tokens."),
    ("kv_total_tokens", "kv_total_tokens", "Size of the KV pool."),
    ("kv_free_tokens", "kv_free_tokens", "Free or evictable part of the KV pool."),
    ("target_density", "admitted_target_density", "Target of the request admitted last."),
)
_COUNTERS = (
    ("taken", "admitted_requests", "Planned requests that left their queue."),
    ("prefill_tokens", "prefill_tokens", "Prompt tokens computed, of all requests."),
    ("decode_tokens", "decode_tokens", "Output tokens computed, of all requests."),
    ("prompt_tokens", "prompt_tokens", "Prompt tokens of admitted planned requests."),
    ("cached_tokens", "cached_tokens", "Those of them that came out of the cache."),
    ("retractions", "retractions", "Planned requests thrown out of the running batch."),
    ("steps", "steps", "Steps of the scheduler."),
    ("compute_seconds", "step_compute_seconds", "Compute of all steps by the cost model."),
    ("memory_seconds", "step_memory_seconds", "Decode attention of all steps by the cost model."),
)


class Metrics:
    """Creates the series; import and create it only once SGLang has set prometheus_client up.

    Args:
        registry: where to register, prometheus_client's own if None.
        labels: of what tells one scheduler from another.
    """

    def __init__(self, registry: Any = None, labels: tuple[str, ...] = ("dp_rank",)) -> None:
        import prometheus_client

        self._client = prometheus_client
        self._registry = registry or prometheus_client.REGISTRY
        self._scheduler_gauges = {
            field: self._gauge(name, text, (*labels, *self._side_label(field)))
            for field, name, text in _GAUGES
        }
        self._scheduler_totals = {
            field: _Total(
                prometheus_client.Counter(
                    f"blendserve_{name}",
                    text,
                    (*labels, *self._side_label(field)),
                    registry=self._registry,
                )
            )
            for field, name, text in _COUNTERS
        }
        self._jobs = self._gauge("jobs", "Batch jobs by phase.", ("phase",))
        self._urgent = self._gauge("urgent_jobs", "Jobs that go first for their deadlines.")
        self._lines = self._gauge("lines", "Lines of running jobs.", ("state",))
        self._work = self._gauge("work_tokens", "Token work of running jobs.", ("state",))
        self._front = self._gauge("front_density", "Density at the outermost scan end.", ("side",))
        self._target = self._gauge("target_density", "Density of what is left to send.")
        self._sharing = self._gauge(
            "sharing_ratio",
            "Part of the prompt tokens of running jobs found in the cache: best (depth-first "
            "order, no eviction), planned, and achieved so far.",
            ("kind",),
        )
        self._error = self._gauge(
            "output_estimate_error_ratio",
            "Mean absolute error of estimated output lengths, over the mean length.",
        )
        self._bias = self._gauge(
            "output_estimate_bias_ratio", "Sum of estimated output lengths over the true sum."
        )

    def update(
        self,
        reports: Mapping[tuple[str, ...], SchedulerReport],
        jobs: Sequence[JobView],
        dispatch: DispatchView,
    ) -> None:
        """Copy the present values; reports by their labels' values."""
        for scheduler, report in reports.items():
            for field, gauge in self._scheduler_gauges.items():
                for labels, value in _values(scheduler, getattr(report, field)):
                    gauge.labels(*labels).set(value)
            for field, total in self._scheduler_totals.items():
                for labels, value in _values(scheduler, getattr(report, field)):
                    total.set(labels, value)
        self._update_jobs(jobs)
        self._urgent.set(len(dispatch.urgent))
        self._target.set(dispatch.target_density)
        for side in Side:
            density = dispatch.densities[side.value]
            self._front.labels(side.value).set(float("nan") if density is None else density)

    def _update_jobs(self, jobs: Sequence[JobView]) -> None:
        for phase in ("reading prompts", "planning", "running"):
            self._jobs.labels(phase).set(sum(job.phase == phase for job in jobs))
        self._lines.labels("waiting").set(sum(job.waiting for job in jobs))
        self._lines.labels("in_flight").set(sum(job.in_flight for job in jobs))
        self._work.labels("total").set(sum(job.total_work_tokens for job in jobs))
        self._work.labels("done").set(sum(job.done_work_tokens for job in jobs))
        prompts = sum(job.prompt_tokens for job in jobs)
        answered = sum(job.answered_prompt_tokens for job in jobs)
        for kind, found, of in (
            ("best", sum(job.best_sharing * job.prompt_tokens for job in jobs), prompts),
            ("planned", sum(job.planned_sharing * job.prompt_tokens for job in jobs), prompts),
            ("achieved", sum(job.answered_cached_tokens for job in jobs), answered),
        ):
            self._sharing.labels(kind).set(found / of if of else float("nan"))
        true = sum(job.estimated_lines_output_tokens for job in jobs)
        error = sum(job.estimate_error_tokens for job in jobs)
        estimated = sum(job.estimated_output_tokens for job in jobs)
        self._error.set(error / true if true else float("nan"))
        self._bias.set(estimated / true if true else float("nan"))

    def _gauge(self, name: str, text: str, labels: Sequence[str] = ()) -> Any:
        return self._client.Gauge(
            f"blendserve_{name}",
            text,
            labels,
            registry=self._registry,
            # One process writes; any other mode would add its number as a label, or a sum.
            multiprocess_mode="mostrecent",
        )

    @staticmethod
    def _side_label(field: str) -> tuple[str, ...]:
        return ("side",) if isinstance(getattr(SchedulerReport(), field), dict) else ()


class _Total:
    """A counter that follows a running total; a retraction may take a step back, which waits."""

    def __init__(self, counter: Any) -> None:
        self._counter = counter
        self._seen: dict[tuple[str, ...], float] = {}

    def set(self, labels: tuple[str, ...], value: float) -> None:
        seen = self._seen.get(labels, 0.0)
        self._counter.labels(*labels).inc(max(value - seen, 0.0))
        self._seen[labels] = max(value, seen)


def _values(scheduler: tuple[str, ...], value: Any) -> list[tuple[tuple[str, ...], float]]:
    if isinstance(value, dict):
        return [((*scheduler, side), float(number)) for side, number in value.items()]
    return [(scheduler, float(value))]
