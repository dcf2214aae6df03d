"""Several batches at once: the nearest window first, and what befalls one leaves others alone."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable, Iterator, Sequence
from pathlib import Path

import pytest
from batch_fakes import (
    FakeExecutor,
    all_ids,
    counts_of,
    finish,
    job,
    prompt_of,
    results,
    submit,
    until,
)
from batch_server import BatchServer

from blendserve.batch import BatchLimits, EngineUnavailable, LineResult, LineSource

AT_ONCE = 2


@pytest.fixture
def server(tmp_path: Path, executor: FakeExecutor) -> Iterator[BatchServer]:
    with BatchServer(tmp_path, executor, BatchLimits(max_running=AT_ONCE)) as running:
        yield running


def ids(count: int) -> list[str]:
    return sorted(f"r{i}" for i in range(count))


def until_validated(server: BatchServer, batch_id: str) -> None:
    until(lambda: server.service.progress(batch_id), lambda seen: seen.total > 0)


def until_done(server: BatchServer, batch_id: str, lines: int) -> None:
    until(lambda: server.service.progress(batch_id), lambda seen: seen.done >= lines)


def test_as_many_run_at_once_as_are_allowed_and_the_rest_after_them(
    server: BatchServer, executor: FakeExecutor
) -> None:
    executor.gate = 1
    made = [submit(server.client, job(8)).id for _ in range(4)]
    until(lambda: executor.running, lambda running: running == set(made[:AT_ONCE]))
    waiting = [server.service.progress(batch_id).phase for batch_id in made[AT_ONCE:]]
    assert set(waiting) == {"waiting"}
    executor.gate = None
    for batch_id in made:
        batch = finish(server.client, batch_id)
        assert (batch.status, all_ids(server.client, batch)) == ("completed", ids(8))
    # Each was given to the engine once, and the first ones first.
    assert sorted(executor.began) == sorted(made)
    assert set(executor.began[:AT_ONCE]) == set(made[:AT_ONCE])


def test_of_those_that_wait_the_nearest_window_goes_first(tmp_path: Path) -> None:
    executor = FakeExecutor()
    executor.gate = 0
    with BatchServer(tmp_path, executor, BatchLimits(max_running=1)) as server:
        running = submit(server.client, job(4), completion_window="4h").id
        until(lambda: executor.running, lambda seen: seen == {running})
        windows = ("24h", "7d", "3h")
        made = {w: submit(server.client, job(4), completion_window=w).id for w in windows}
        for batch_id in made.values():
            until_validated(server, batch_id)
        executor.gate = None
        for batch_id in (running, *made.values()):
            assert finish(server.client, batch_id).status == "completed"
    assert executor.began == [running, made["3h"], made["24h"], made["7d"]]


def test_the_most_patient_batch_makes_room_for_one_with_clearly_less_time(
    server: BatchServer, executor: FakeExecutor
) -> None:
    executor.gate = 4
    patient = submit(server.client, job(8), completion_window="7d").id
    until_done(server, patient, 4)
    other = submit(server.client, job(8), completion_window="24h").id
    until_done(server, other, 4)
    hasty = submit(server.client, job(8), completion_window="30m").id
    until(lambda: executor.running, lambda running: running == {other, hasty})
    assert server.service.progress(patient).phase == "waiting"
    executor.gate = None
    for batch_id in (hasty, other, patient):
        batch = finish(server.client, batch_id)
        assert (batch.status, all_ids(server.client, batch)) == ("completed", ids(8))
    # What was done before it made room was not done again.
    assert len(executor.computed) == 3 * 8
    assert executor.began == [patient, other, hasty, patient]


def test_cancelling_one_leaves_the_other_running(
    server: BatchServer, executor: FakeExecutor
) -> None:
    executor.gate = 2
    cancelled, other = (submit(server.client, job(8)).id for _ in range(2))
    for batch_id in (cancelled, other):
        until_done(server, batch_id, 2)
    server.client.batches.cancel(cancelled)
    ended = finish(server.client, cancelled)
    assert (ended.status, all_ids(server.client, ended)) == ("cancelled", ids(8))
    assert executor.running == {other}
    executor.gate = None
    batch = finish(server.client, other)
    assert (batch.status, counts_of(batch).completed) == ("completed", 8)
    assert executor.began.count(other) == 1


def test_one_that_expires_leaves_the_other_running(
    server: BatchServer, executor: FakeExecutor
) -> None:
    executor.gate = 2
    late = submit(server.client, job(8), completion_window="30m").id
    other = submit(server.client, job(8)).id
    until(lambda: executor.running, lambda running: len(running) == 2)
    server.clock.seconds += 1_801
    server.service.nudge()
    ended = finish(server.client, late)
    assert (ended.status, all_ids(server.client, ended)) == ("expired", ids(8))
    executor.gate = None
    assert finish(server.client, other).status == "completed"
    assert executor.began.count(other) == 1


def test_after_a_restart_each_goes_on_with_what_it_has_left(tmp_path: Path) -> None:
    first, second = FakeExecutor(), FakeExecutor()
    first.gate = 4
    with BatchServer(tmp_path, first) as server:
        made = [submit(server.client, job(12)).id for _ in range(3)]
        for batch_id in made:
            until_done(server, batch_id, 4)
    with BatchServer(tmp_path, second) as server:
        for batch_id in made:
            batch = finish(server.client, batch_id)
            assert (batch.status, all_ids(server.client, batch)) == ("completed", ids(12))
    assert len(second.computed) == 3 * 8


class OneEngine(FakeExecutor):
    """All jobs die with it: `die` ends it once it runs, and other lines take longer than that."""

    def __init__(self) -> None:
        super().__init__()
        self.deaths = 0

    async def run(
        self,
        job_id: str,
        lines: LineSource,
        pending: Sequence[int],
        on_start: Callable[[int], None],
        deadline: float | None = None,
    ) -> AsyncIterator[LineResult]:
        for index in pending:
            on_start(index)
        deaths = self.deaths
        deadly = any(prompt_of(lines.read(index)) == "die" for index in pending)
        for _ in range(5 if deadly else 20):
            await asyncio.sleep(0.01)
            if self.deaths > deaths:
                raise EngineUnavailable("the engine died")
        if deadly:
            self.deaths += 1
            raise EngineUnavailable("the engine died")
        for index in pending:
            result = self._answer(lines.read(index))
            assert result is not None
            yield result


@pytest.mark.parametrize("windows", [("24h", "7d"), ("7d", "24h")])
def test_who_ran_beside_a_deadly_line_of_another_batch_is_not_blamed(
    tmp_path: Path, windows: tuple[str, str]
) -> None:
    executor = OneEngine()
    with BatchServer(tmp_path, executor) as server:
        deadly = submit(server.client, job(1, {0: "die"}), completion_window=windows[0])
        beside = submit(server.client, job(1), completion_window=windows[1])

        def both_ended() -> bool:
            server.service.engine_recovered()
            batches = [server.client.batches.retrieve(batch.id) for batch in (deadly, beside)]
            return all(batch.status == "completed" for batch in batches)

        until(both_ended, bool)
        deadly = server.client.batches.retrieve(deadly.id)
        beside = server.client.batches.retrieve(beside.id)
        assert counts_of(beside).completed == 1
        [error] = results(server.client, deadly.error_file_id).values()
        assert error["error"]["code"] == "engine_crashed"
    assert executor.deaths == 2
