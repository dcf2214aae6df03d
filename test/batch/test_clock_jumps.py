"""A clock that jumps ends nothing early, keeps nothing open for long, and turns no life round."""

from __future__ import annotations

from pathlib import Path

import pytest
from batch_fakes import FakeExecutor, all_ids, counts_of, finish, job, submit, until
from batch_server import BatchServer

import blendserve.batch.worker as worker_module

DAY_AND_AN_HOUR = 25 * 3_600


def test_a_window_that_a_jump_has_closed_is_seen_without_a_hint(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Nobody wakes the publisher, whose own clock does not jump."""
    assert worker_module._MAX_PAUSE_SECONDS <= 60
    monkeypatch.setattr(worker_module, "_MAX_PAUSE_SECONDS", 0.05)
    executor = FakeExecutor()
    executor.gate = 4
    with BatchServer(tmp_path, executor) as server:
        batch = submit(server.client, job(12))
        until(lambda: server.service.progress(batch.id).done, lambda done: done >= 4)
        server.clock.seconds += DAY_AND_AN_HOUR
        ended = finish(server.client, batch.id)
        assert ended.status == "expired"
        assert counts_of(ended).completed >= 4
        assert all_ids(server.client, ended) == sorted(f"r{i}" for i in range(12))


def test_a_clock_that_is_put_back_hurts_nothing(tmp_path: Path) -> None:
    executor = FakeExecutor()
    executor.gate = 4
    with BatchServer(tmp_path, executor) as server:
        batch = submit(server.client, job(12))
        until(lambda: server.service.progress(batch.id).done, lambda done: done >= 4)
        server.clock.seconds -= DAY_AND_AN_HOUR
        server.service.nudge()
        executor.gate = None
        ended = finish(server.client, batch.id)
        assert (ended.status, counts_of(ended).completed) == ("completed", 12)
        stamps = [ended.created_at, ended.in_progress_at, ended.finalizing_at, ended.completed_at]
        assert None not in stamps
        assert stamps == sorted(stamps)  # type: ignore[type-var]
        # And a new one is as good as ever.
        later = finish(server.client, submit(server.client, job(2)).id)
        assert later.status == "completed"
