"""Every change of a batch's status is one of the contract's, and each leaves its time stamp."""

from __future__ import annotations

import contextlib
import hashlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import openai
import pytest
from batch_fakes import counts_of, finish, job, results, submit, until
from batch_server import BatchServer, Clock
from openai.types import Batch

import blendserve.batch.store as store_module
from blendserve.batch import BatchService, BatchStore, RemoteExecutor
from blendserve.batch.objects import CreateBatch
from blendserve.batch.upload import Upload

# OpenAI's documentation of the batch object, as one table.
ALLOWED = {
    ("validating", "in_progress"),
    ("validating", "failed"),
    ("validating", "cancelling"),
    ("in_progress", "finalizing"),
    ("in_progress", "expired"),
    ("in_progress", "cancelling"),
    ("finalizing", "completed"),
    ("cancelling", "cancelled"),
    # Ours: its input is gone, or the server failed at it again and again.
    ("in_progress", "failed"),
    # Ours: its window closed before it was checked.
    ("validating", "expired"),
}
STAMPS = ("in_progress", "finalizing", "completed", "failed", "expired", "cancelling", "cancelled")


@pytest.fixture
def seen(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[tuple[str, str]]]:
    """All changes of status, as they are written; none may be outside of the table."""
    changes: list[tuple[str, str]] = []
    assign = store_module._assign

    def watched(row: Any, values: dict[str, Any]) -> None:
        before = row.status
        assign(row, values)
        if row.status != before:
            changes.append((before, row.status))

    monkeypatch.setattr(store_module, "_assign", watched)
    yield changes
    assert set(changes) <= ALLOWED


def stamped(batch: Batch) -> set[str]:
    return {name for name in STAMPS if getattr(batch, f"{name}_at") is not None}


def check_order(batch: Batch) -> None:
    times = [batch.created_at, batch.in_progress_at, batch.finalizing_at, batch.completed_at]
    known = [time for time in times if time is not None]
    assert known == sorted(known)


def complete(server: BatchServer, _: Clock) -> tuple[Batch, set[str]]:
    batch = finish(server.client, submit(server.client, job(3)).id)
    return batch, {"in_progress", "finalizing", "completed"}


def fail(server: BatchServer, _: Clock) -> tuple[Batch, set[str]]:
    return finish(server.client, submit(server.client, b"{\n").id), {"failed"}


def cancel_while_it_runs(server: BatchServer, _: Clock) -> tuple[Batch, set[str]]:
    server.executor.gate = 2
    batch = submit(server.client, job(8))
    until(
        lambda: server.client.batches.retrieve(batch.id),
        lambda current: counts_of(current).completed >= 2,
    )
    server.client.batches.cancel(batch.id)
    return finish(server.client, batch.id), {"in_progress", "cancelling", "cancelled"}


def cancel_while_it_is_validated(server: BatchServer, _: Clock) -> tuple[Batch, set[str]]:
    server.executor.slow_check_seconds = 0.01
    batch = submit(server.client, job(300))
    server.client.batches.cancel(batch.id)
    server.executor.slow_check_seconds = 0.0
    ended = finish(server.client, batch.id)
    assert counts_of(ended).total == 0
    return ended, {"cancelling", "cancelled"}


def expire(server: BatchServer, clock: Clock) -> tuple[Batch, set[str]]:
    server.executor.gate = 2
    batch = submit(server.client, job(8), completion_window="30m")
    until(
        lambda: server.client.batches.retrieve(batch.id),
        lambda current: counts_of(current).completed >= 2,
    )
    clock.seconds += 1_801
    server.service.nudge()
    return finish(server.client, batch.id), {"in_progress", "expired"}


@pytest.mark.parametrize(
    "course", [complete, fail, cancel_while_it_runs, cancel_while_it_is_validated, expire]
)
def test_each_course_has_its_changes_and_its_time_stamps(
    server: BatchServer,
    clock: Clock,
    seen: list[tuple[str, str]],
    course: Callable[[BatchServer, Clock], tuple[Batch, set[str]]],
) -> None:
    batch, expected = course(server, clock)
    assert stamped(batch) == expected
    check_order(batch)
    assert seen[-1][1] == batch.status
    refusal = pytest.raises(openai.ConflictError)
    with refusal if batch.status != "cancelled" else contextlib.nullcontext():
        server.client.batches.cancel(batch.id)


def test_a_busy_engine_is_asked_again_and_its_answer_counts_once(server: BatchServer) -> None:
    batch = finish(server.client, submit(server.client, job(6, {2: "busy"})).id)
    assert (batch.status, counts_of(batch).completed) == ("completed", 6)
    server.executor.busy_answers = 10**6
    batch = submit(server.client, job(2, {1: "busy"}))
    until(lambda: server.service.progress(batch.id), lambda progress: progress.retried > 0)
    server.client.batches.cancel(batch.id)
    finish(server.client, batch.id)


def test_answers_of_an_earlier_batch_are_used_again_if_asked_for(server: BatchServer) -> None:
    first = finish(server.client, submit(server.client, job(10, {3: "fail"})).id)
    server.executor.computed.clear()
    changed = job(12, {3: "fail", 5: "another prompt"})
    batch = submit(server.client, changed, extra_body={"reuse_results": True})
    batch = finish(server.client, batch.id)
    assert batch.status == "completed"
    # The failed line, the changed one and the new ones; nothing else.
    assert sorted(server.executor.computed) == ["r10", "r11", "r3", "r5"]
    outputs = results(server.client, batch.output_file_id)
    assert len(outputs) == 11
    earlier = results(server.client, first.output_file_id)
    assert outputs["r0"]["response"] == earlier["r0"]["response"]
    assert outputs["r0"]["id"] != earlier["r0"]["id"]
    assert outputs["r5"]["response"] != earlier["r5"]["response"]

    server.executor.computed.clear()
    finish(server.client, submit(server.client, job(10)).id)
    assert len(server.executor.computed) == 10

    # By another engine, everything is computed.
    server.executor.computed.clear()
    server.executor.fingerprint = "fake-model/float16"
    batch = submit(server.client, job(10), extra_body={"reuse_results": True})
    finish(server.client, batch.id)
    assert len(server.executor.computed) == 10


def test_an_engine_without_the_endpoint_fails_the_batch(server: BatchServer) -> None:
    with pytest.raises(openai.BadRequestError) as refused:
        submit(server.client, job(1), endpoint="/v1/responses")
    assert refused.value.code == "invalid_endpoint"


def test_empty_metadata_is_metadata(server: BatchServer) -> None:
    batch = submit(server.client, job(1), metadata={})
    assert server.client.batches.retrieve(batch.id).metadata == {}
    assert finish(server.client, batch.id).status == "completed"


def test_a_batch_made_before_the_engine_is_known_waits_for_it(tmp_path: Path) -> None:
    store = BatchStore(tmp_path)
    service = BatchService(store, RemoteExecutor())
    with store.directory.draft() as draft:
        draft.file.write(job(1))
        digest = hashlib.sha256(job(1)).hexdigest()
        upload = Upload({"purpose": "batch"}, "a.jsonl", len(job(1)), digest)
        file = service.add_upload(upload, draft)
    request = CreateBatch(input_file_id=file.id, endpoint="/v1/responses", completion_window="1h")
    assert service.create(request).status == "validating"
    store.close()
