"""A restart does what is left, whatever the last process was doing when it ended."""

from __future__ import annotations

import errno
import hashlib
import os
import sqlite3
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import openai
import pytest
from batch_fakes import (
    ENDED,
    FakeExecutor,
    all_ids,
    counts_of,
    finish,
    job,
    results,
    submit,
    until,
    usage_of,
)
from batch_server import BatchServer
from openai.types import Batch

import blendserve.batch.stages as stages_module
from blendserve.batch import BatchDirectoryError, BatchStore
from blendserve.batch.directory import BatchDirectory
from blendserve.batch.ids import derived_file_id


class Died(BaseException):
    """Stands for the end of the process at a named point."""


def run_until(batch_dir: Path, executor: FakeExecutor, data: bytes, completed: int) -> str:
    """Submits a job, waits until `completed` lines are done, and stops the server."""
    executor.gate = completed
    with BatchServer(batch_dir, executor) as server:
        batch = submit(server.client, data)
        until(
            lambda: server.client.batches.retrieve(batch.id),
            lambda seen: counts_of(seen).completed >= completed,
        )
        return batch.id


def test_a_restarted_server_does_only_what_is_left(tmp_path: Path) -> None:
    first = FakeExecutor()
    batch_id = run_until(tmp_path, first, job(30), 10)
    second = FakeExecutor()
    second.gate = 0
    with BatchServer(tmp_path, second) as server:
        seen = server.client.batches.retrieve(batch_id)
        assert (seen.status, counts_of(seen).total) == ("in_progress", 30)
        committed = counts_of(seen).completed
        assert committed >= 10
        progress = until(
            lambda: server.service.progress(batch_id), lambda seen: seen.phase == "running"
        )
        assert progress.recovered == committed
        second.gate = None
        batch = finish(server.client, batch_id)
        assert batch.status == "completed"
        assert usage_of(batch).total_tokens == 30 * 13
        assert all_ids(server.client, batch) == sorted(f"r{i}" for i in range(30))
    assert len(second.computed) == 30 - committed
    assert not list((tmp_path / "journals").iterdir())


def test_a_dead_engine_leaves_the_batch_waiting_and_the_api_alive(tmp_path: Path) -> None:
    executor = FakeExecutor(parallel=1)
    with BatchServer(tmp_path, executor) as server:
        batch = submit(server.client, job(8, {5: "crash"}))
        paused = until(
            lambda: server.service.progress(batch.id), lambda seen: seen.phase == "paused"
        )
        assert paused.note == "the engine was killed"
        assert paused.done == 5
        assert server.client.batches.retrieve(batch.id).status == "in_progress"
        assert server.client.files.content(batch.input_file_id).content
        server.service.engine_recovered()
        ended = finish(server.client, batch.id)
        assert (ended.status, counts_of(ended).completed) == ("completed", 8)
    assert sorted(executor.computed) == sorted(f"r{i}" for i in range(8))


def test_a_batch_waits_for_the_engine_that_has_begun_it(tmp_path: Path) -> None:
    batch_id = run_until(tmp_path, FakeExecutor(fingerprint="model-a/float32"), job(20), 6)
    other = FakeExecutor(fingerprint="model-b/float16")
    with BatchServer(tmp_path, other) as server:
        # It holds up nobody else, and nobody else's engine is asked for it.
        newer = finish(server.client, submit(server.client, job(3)).id)
        assert newer.status == "completed"
        assert server.client.batches.retrieve(batch_id).status == "in_progress"
        paused = server.service.progress(batch_id)
        assert (paused.phase, paused.total) == ("paused", 20)
        assert paused.done >= 6
        note = paused.note or ""
        assert "model-a/float32" in note
        assert "model-b/float16" in note
        assert "again from the same input file" in note
        assert server.http.get(f"/v1/batches/{batch_id}").json()["note"] == note
    assert other.began == [newer.id]
    own = FakeExecutor(fingerprint="model-a/float32")
    with BatchServer(tmp_path, own) as server:
        batch = finish(server.client, batch_id)
        assert (batch.status, counts_of(batch).completed) == ("completed", 20)
        assert len(own.computed) <= 14


def test_a_batch_whose_engine_does_not_come_back_expires_and_keeps_what_is_done(
    tmp_path: Path,
) -> None:
    batch_id = run_until(tmp_path, FakeExecutor(fingerprint="model-a/float32"), job(20), 6)
    other = FakeExecutor(fingerprint="model-b/float16")
    with BatchServer(tmp_path, other) as server:
        server.clock.seconds += 24 * 3_600 + 1
        server.service.nudge()
        batch = finish(server.client, batch_id)
        assert batch.status == "expired"
        assert len(results(server.client, batch.output_file_id)) >= 6
        assert all_ids(server.client, batch) == sorted(f"r{i}" for i in range(20))
    assert other.computed == []


def test_a_batch_created_while_no_service_runs_is_taken_up(tmp_path: Path) -> None:
    executor = FakeExecutor()
    executor.gate = 0
    with BatchServer(tmp_path, executor) as server:
        batch = submit(server.client, job(3))
        cancelled = submit(server.client, job(3))
        server.client.batches.cancel(cancelled.id)
    with BatchServer(tmp_path, FakeExecutor()) as server:
        assert finish(server.client, batch.id).status == "completed"
        assert finish(server.client, cancelled.id).status == "cancelled"


def die_before_the_files(patch: pytest.MonkeyPatch) -> None:
    def write_results(*_: Any, **__: Any) -> Any:
        raise Died

    patch.setattr(stages_module, "write_results", write_results)


def die_between_the_two_files(patch: pytest.MonkeyPatch) -> None:
    real = BatchDirectory.publish
    calls: list[str] = []

    def publish(self: BatchDirectory, draft: Any, sha256: str) -> None:
        # Inputs come with an upload, before any journal is there.
        if any(self.stored_journal_ids()):
            calls.append(sha256)
            if len(calls) == 2:
                raise Died
        real(self, draft, sha256)

    patch.setattr(BatchDirectory, "publish", publish)


def die_before_the_transaction(patch: pytest.MonkeyPatch) -> None:
    def conclude(*_: Any, **__: Any) -> None:
        raise Died

    patch.setattr(BatchStore, "conclude", conclude)


def die_after_the_transaction(patch: pytest.MonkeyPatch) -> None:
    real = BatchStore.conclude

    def conclude(self: BatchStore, *args: Any, **values: Any) -> None:
        real(self, *args, **values)
        raise Died

    patch.setattr(BatchStore, "conclude", conclude)


@pytest.mark.parametrize(
    "death",
    [
        die_before_the_files,
        die_between_the_two_files,
        die_before_the_transaction,
        die_after_the_transaction,
    ],
)
def test_a_death_while_publishing_is_made_good(
    tmp_path: Path, death: Callable[[pytest.MonkeyPatch], None]
) -> None:
    died = threading.Event()
    with pytest.MonkeyPatch.context() as patch:
        death(patch)
        patch.setattr(Died, "__init__", lambda self: died.set())
        server = BatchServer(tmp_path, FakeExecutor())
        server.simulated_death = (Died,)
        with server:
            batch_id = submit(server.client, job(9, {2: "fail"})).id
            assert died.wait(20)
            before = server.client.batches.retrieve(batch_id)
            assert before.status in {"finalizing", "completed"}
    executor = FakeExecutor()
    with BatchServer(tmp_path, executor) as server:
        batch = finish(server.client, batch_id)
        assert batch.status == "completed"
        assert all_ids(server.client, batch) == sorted(f"r{i}" for i in range(9))
        assert batch.output_file_id == derived_file_id(batch_id, "output")
        assert len(list(server.client.files.list(purpose="batch_output"))) == 2
    assert executor.computed == []
    assert len(list((tmp_path / "files").iterdir())) == 3
    assert not [*(tmp_path / "tmp").iterdir(), *(tmp_path / "journals").iterdir()]


def test_a_full_disk_pauses_the_batch_until_there_is_space(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real_write = os.pwrite
    full = threading.Event()

    def pwrite(descriptor: int, data: bytes, position: int) -> int:
        if full.is_set() and bytes(data[:9]) == b'{"index":':
            raise OSError(errno.ENOSPC, "No space left on device")
        return real_write(descriptor, data, position)

    monkeypatch.setattr(os, "pwrite", pwrite)
    full.set()
    with BatchServer(tmp_path, FakeExecutor()) as server:
        batch = submit(server.client, job(10))
        paused = until(
            lambda: server.service.progress(batch.id), lambda seen: seen.phase == "paused"
        )
        assert "No space left" in (paused.note or "")
        assert paused.done == 0
        full.clear()
        ended = finish(server.client, batch.id)
        assert (ended.status, counts_of(ended).completed) == ("completed", 10)


def test_a_full_disk_while_publishing_is_tried_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = os.replace
    refusals = [0]

    def replace(source: Path, target: Path) -> None:
        if target.parent.name == "files" and any((tmp_path / "journals").iterdir()):
            refusals[0] += 1
            if refusals[0] <= 3:
                raise OSError(errno.ENOSPC, "No space left on device")
        real(source, target)

    monkeypatch.setattr(os, "replace", replace)
    with BatchServer(tmp_path, FakeExecutor()) as server:
        ended = finish(server.client, submit(server.client, job(5)).id)
        assert ended.status == "completed"
        assert len(all_ids(server.client, ended)) == 5
    assert refusals[0] > 3
    assert not list((tmp_path / "tmp").iterdir())


def test_an_upload_to_a_full_disk_is_told_and_leaves_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def replace(source: Path, target: Path) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    with BatchServer(tmp_path, FakeExecutor()) as server:
        with monkeypatch.context() as patch:
            patch.setattr(os, "replace", replace)
            with pytest.raises(openai.InternalServerError) as refused:
                submit(server.client, job(3))
        assert (refused.value.status_code, refused.value.code) == (507, "storage_unavailable")
        assert list(server.client.files.list()) == []
        assert not [*(tmp_path / "tmp").iterdir(), *(tmp_path / "files").iterdir()]
        assert finish(server.client, submit(server.client, job(3)).id).status == "completed"


def test_a_reader_of_the_path_never_sees_a_partial_file(tmp_path: Path) -> None:
    executor = FakeExecutor(parallel=64)
    with BatchServer(tmp_path, executor) as server:
        batch = submit(server.client, job(400, {7: "fail"}))
        seen: set[str] = set()

        def look() -> Batch:
            for path in (tmp_path / "files").iterdir():
                assert hashlib.sha256(path.read_bytes()).hexdigest() == path.name
                seen.add(path.name)
            return server.client.batches.retrieve(batch.id)

        ended = until(look, lambda batch: batch.status in ENDED)
        look()
        assert len(results(server.client, ended.output_file_id)) == 399
    # The input, and the two that appeared.
    assert len(seen) == 3


def test_two_servers_cannot_share_a_directory(tmp_path: Path) -> None:
    first = BatchStore(tmp_path)
    with pytest.raises(BatchDirectoryError) as refused:
        BatchStore(tmp_path)
    assert str(tmp_path) in str(refused.value)
    assert f"process {os.getpid()}" in str(refused.value)
    assert "--batch-dir" in str(refused.value)
    first.close()
    BatchStore(tmp_path).close()


def test_a_database_of_another_version_is_refused(tmp_path: Path) -> None:
    BatchStore(tmp_path).close()
    with sqlite3.connect(tmp_path / "blendserve.db") as database:
        database.execute("PRAGMA user_version = 99")
    with pytest.raises(BatchDirectoryError, match="schema version 99"):
        BatchStore(tmp_path)


def test_a_damaged_database_is_named(tmp_path: Path) -> None:
    (tmp_path / "blendserve.db").write_bytes(b"not a database at all" * 100)
    with pytest.raises(BatchDirectoryError, match=r"blendserve\.db cannot be read"):
        BatchStore(tmp_path)
    (tmp_path / "blendserve.db").unlink()
    BatchStore(tmp_path).close()


def test_a_directory_that_is_a_file_is_named(tmp_path: Path) -> None:
    (tmp_path / "plain").write_text("")
    with pytest.raises(BatchDirectoryError, match="plain"):
        BatchStore(tmp_path / "plain")
