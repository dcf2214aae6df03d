"""A coordinator's ``GET /metrics``: what one server has, by engine, and the engines themselves."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from blendserve.runtime.cluster import Cluster
from blendserve.runtime.dispatcher import DispatchView
from blendserve.runtime.feedback import SchedulerReport
from blendserve.runtime.job_view import JobView
from blendserve.runtime.metrics import Metrics

CONTENT_TYPE = "text/plain; version=0.0.4; charset=utf-8"
_STATES = ("connecting", "up", "lost", "refused")


class ClusterMetrics:
    """Series for Prometheus, made when they are asked for. ImportError: prometheus_client, which
    comes with SGLang, is not on this machine."""

    def __init__(
        self,
        cluster: Cluster,
        jobs: Callable[[], Sequence[JobView]],
        dispatch: Callable[[], DispatchView],
    ) -> None:
        import prometheus_client

        self._client = prometheus_client
        self._cluster, self._jobs, self._dispatch = cluster, jobs, dispatch
        self._registry = prometheus_client.CollectorRegistry()
        self._series = Metrics(self._registry, ("engine", "dp_rank"))

        def gauge(name: str, text: str, labels: tuple[str, ...]) -> prometheus_client.Gauge:
            return prometheus_client.Gauge(
                f"blendserve_{name}", text, labels, registry=self._registry
            )

        self._engines = gauge("engines", "Engines by state.", ("state",))
        self._in_flight = gauge("engine_lines_in_flight", "Lines an engine has.", ("engine",))
        self._answered = gauge("engine_lines_answered", "Lines it has answered.", ("engine",))
        self._losses = gauge("engine_losses", "Times that it was dropped.", ("engine",))

    def text(self) -> bytes:
        """The present values, in Prometheus's text format."""
        views = self._cluster.views()
        reports: dict[tuple[str, ...], SchedulerReport] = {
            (member.address.url, str(rank)): report
            for member in self._cluster.members
            for rank, report in member.reports.items()
        }
        self._series.update(reports, self._jobs(), self._dispatch())
        for state in _STATES:
            self._engines.labels(state).set(sum(view.state == state for view in views))
        for view in views:
            self._in_flight.labels(view.url).set(view.in_flight)
            self._answered.labels(view.url).set(view.answered)
            self._losses.labels(view.url).set(view.losses)
        return bytes(self._client.generate_latest(self._registry))
