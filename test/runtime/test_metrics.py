"""What GET /metrics shows of the schedulers' reports and the jobs."""

from __future__ import annotations

import math

import pytest
from prometheus_client import CollectorRegistry

from blendserve.runtime.dispatcher import DispatchView
from blendserve.runtime.feedback import SchedulerReport
from blendserve.runtime.job_view import JobView
from blendserve.runtime.metrics import Metrics

IDLE = DispatchView(
    target_density=math.inf,
    densities={"left": None, "right": None},
    queued={"left": 0, "right": 0},
    available={"left": 16, "right": 16},
    pace=1.0,
    urgent=[],
)


@pytest.fixture
def registry() -> CollectorRegistry:
    return CollectorRegistry()


def test_reports_become_gauges_and_counters_by_side_and_rank(registry):
    metrics = Metrics(registry)
    value = registry.get_sample_value
    for taken, retractions in ((5, 0), (4, 1), (9, 1)):
        report = SchedulerReport(
            dp_rank=1,
            taken={"left": taken, "right": 2},
            running={"left": taken, "right": 7},
            retractions=retractions,
            kv_free_tokens=100 - taken,
        )
        metrics.update({("1",): report}, [], IDLE)
        left = {"dp_rank": "1", "side": "left"}
        assert value("blendserve_running_requests", left) == taken
        # A retraction takes an admission back; the counter waits until it is made good.
        assert value("blendserve_admitted_requests_total", left) == max(taken, 5)
        assert value("blendserve_retractions_total", {"dp_rank": "1"}) == retractions
        assert value("blendserve_kv_free_tokens", {"dp_rank": "1"}) == 100 - taken
    assert value("blendserve_admitted_requests_total", {"dp_rank": "1", "side": "right"}) == 2


def test_jobs_are_added_up(registry):
    metrics = Metrics(registry)
    value = registry.get_sample_value
    jobs = [JobView("a", phase="running"), JobView("b", phase="running"), JobView("c")]
    for job, tokens, best, planned in ((jobs[0], 300, 0.8, 0.7), (jobs[1], 100, 0.4, 0.3)):
        job.prompt_tokens, job.best_sharing, job.planned_sharing = tokens, best, planned
        job.waiting, job.in_flight = tokens, 5
        job.total_work_tokens = tokens
        job.count_answer(prompt_tokens=50, cached_tokens=30, output_tokens=10, estimate=14.0)
        job.count_answer(prompt_tokens=50, cached_tokens=30, output_tokens=10, estimate=8.0)
        job.count_answer(prompt_tokens=50, cached_tokens=0, output_tokens=10, estimate=None)
    dispatch = DispatchView(2.5, {"left": 9.0, "right": 0.5}, {}, {}, 1.0, ["a"])
    metrics.update({}, jobs, dispatch)
    assert value("blendserve_jobs", {"phase": "running"}) == 2
    assert value("blendserve_jobs", {"phase": "reading prompts"}) == 1
    assert value("blendserve_urgent_jobs") == 1
    assert value("blendserve_lines", {"state": "waiting"}) == 400
    assert value("blendserve_lines", {"state": "in_flight"}) == 10
    assert value("blendserve_work_tokens", {"state": "total"}) == 400
    assert value("blendserve_sharing_ratio", {"kind": "best"}) == pytest.approx(0.7)
    assert value("blendserve_sharing_ratio", {"kind": "planned"}) == pytest.approx(0.6)
    assert value("blendserve_sharing_ratio", {"kind": "achieved"}) == pytest.approx(0.4)
    # Two of three were guessed, each off by 4 and by 2 tokens of 10.
    assert value("blendserve_output_estimate_error_ratio") == pytest.approx(0.3)
    assert value("blendserve_output_estimate_bias_ratio") == pytest.approx(1.1)
    assert value("blendserve_front_density", {"side": "left"}) == 9.0
    assert value("blendserve_target_density") == 2.5


def test_without_jobs_there_is_nothing_to_say(registry):
    Metrics(registry).update({}, [], IDLE)
    value = registry.get_sample_value
    assert value("blendserve_jobs", {"phase": "running"}) == 0
    assert math.isnan(value("blendserve_sharing_ratio", {"kind": "best"}))
    assert math.isnan(value("blendserve_front_density", {"side": "right"}))
