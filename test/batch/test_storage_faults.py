"""Full, locked, damaged and vanished are different messages with different remedies."""

from __future__ import annotations

import errno
import os
import shutil
import sqlite3
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx
import pytest
from batch_fakes import CHAT, FakeExecutor, finish, job, submit, until
from batch_server import BatchServer
from sqlalchemy.exc import OperationalError

from blendserve.batch import BatchDirectoryError, BatchStore
from blendserve.batch import api as api_module
from blendserve.batch import database as database_module
from blendserve.batch.storage import DatabaseBusy, storage_fault

WAITING = 45


@contextmanager
def locked_by_another(database: Path) -> Iterator[None]:
    """What a careless backup does."""
    other = sqlite3.connect(database, isolation_level=None)
    other.execute("BEGIN IMMEDIATE")
    try:
        yield
    finally:
        other.execute("ROLLBACK")
        other.close()


def creation(file_id: str) -> dict[str, Any]:
    return {"input_file_id": file_id, "endpoint": CHAT, "completion_window": "24h"}


def test_reads_go_on_while_another_process_has_the_database_locked(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for module, name in (
        (database_module, "_TURN_SECONDS"),
        (database_module, "_BUSY_SECONDS"),
        (api_module, "_WRITER_SECONDS"),
    ):
        monkeypatch.setattr(module, name, 2.0)
    with BatchServer(tmp_path, FakeExecutor()) as server:
        batch = finish(server.client, submit(server.client, job(3)).id)
        ask = creation(batch.input_file_id)
        answers: list[httpx.Response] = []
        asked = threading.Barrier(WAITING + 1)

        def create() -> None:
            asked.wait(20)
            answers.append(httpx.post(f"{server.url}/v1/batches", json=ask, timeout=60))

        with (
            ThreadPoolExecutor(WAITING) as threads,
            locked_by_another(tmp_path / "blendserve.db"),
        ):
            creating = [threads.submit(create) for _ in range(WAITING)]
            asked.wait(20)
            # Each of these would wait behind the creates, if they had the same threads.
            seen = 0
            while len(answers) < WAITING:
                for path in (f"batches/{batch.id}", "batches", "files"):
                    assert server.http.get(f"/v1/{path}", timeout=20).status_code == 200
                    seen += not answers
            for future in creating:
                future.result()
        assert seen
        for answer in answers:
            assert answer.status_code == 503
            assert int(answer.headers["retry-after"]) > 0
            error = answer.json()["error"]
            assert error["code"] == "storage_locked"
            assert "blendserve.db locked" in error["message"]
        assert server.client.batches.create(**ask).status == "validating"


def test_a_batch_goes_on_after_the_lock(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(database_module, "_BUSY_SECONDS", 0.05)
    executor = FakeExecutor()
    executor.gate = 0
    with BatchServer(tmp_path, executor) as server:
        batch = submit(server.client, job(3))
        until(lambda: executor.running, bool)
        with locked_by_another(tmp_path / "blendserve.db"):
            executor.gate = None
            until(lambda: server.service.progress(batch.id).done, lambda done: done == 3)
        assert finish(server.client, batch.id).status == "completed"


def test_a_vanished_directory_is_named_in_the_log_and_not_called_full(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    root = tmp_path / "batches"
    with BatchServer(root, FakeExecutor()) as server:
        file = server.client.files.create(file=("a.jsonl", job(1)), purpose="batch")
        shutil.rmtree(root)
        upload = {"file": ("b.jsonl", job(2))}
        for answer in (
            server.http.post("/v1/files", files=upload, data={"purpose": "batch"}),
            # SQLite itself would go on in files that have no name any more.
            server.http.post("/v1/batches", json=creation(file.id)),
        ):
            assert answer.status_code == 500
            assert answer.json()["error"]["code"] == "storage_missing"
            assert str(root) not in answer.text
        assert f"{root / 'blendserve.db'} is not there any more" in caplog.text
        root.mkdir()
        again = server.http.post("/v1/batches", json=creation(file.id))
        assert again.json()["error"]["code"] == "storage_missing"


def test_a_database_damaged_while_it_is_used_is_called_damaged(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    with BatchServer(tmp_path, FakeExecutor()) as server:
        finish(server.client, submit(server.client, job(3)).id)
        checkpoint = sqlite3.connect(tmp_path / "blendserve.db")
        checkpoint.execute("PRAGMA wal_checkpoint(TRUNCATE)")
        checkpoint.close()
        with open(tmp_path / "blendserve.db", "r+b") as file:
            file.write(b"not a database at all" * 400)
        server.store._database.close()
        answer = server.http.get("/v1/batches")
        assert (answer.status_code, answer.json()["error"]["code"]) == (500, "storage_damaged")
        assert "damaged" in caplog.text
        assert str(tmp_path / "blendserve.db") in caplog.text


def test_an_error_that_nobody_foresaw_has_the_shape_of_all_others(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    secret = "-".join(["a", "prompt"])

    def broken(*_: Any, **__: Any) -> None:
        raise ZeroDivisionError(secret)

    with BatchServer(tmp_path, FakeExecutor()) as server:
        monkeypatch.setattr(server.service, "list", broken)
        answer = server.http.get("/v1/batches")
        assert answer.status_code == 500
        assert answer.json()["error"]["code"] == "internal_error"
    assert "ZeroDivisionError" in caplog.text
    assert secret not in caplog.text


def test_a_locked_database_at_the_start_is_not_called_damaged(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(database_module, "_BUSY_SECONDS", 0.05)
    BatchStore(tmp_path).close()
    with (
        locked_by_another(tmp_path / "blendserve.db"),
        pytest.raises(BatchDirectoryError, match="locked by another process"),
    ):
        BatchStore(tmp_path)
    BatchStore(tmp_path).close()


@pytest.mark.parametrize(
    ("error", "kind", "status"),
    [
        (OSError(errno.ENOSPC, "No space left on device"), "full", 507),
        (OSError(errno.EDQUOT, "Disk quota exceeded"), "full", 507),
        (OSError(errno.EMFILE, "Too many open files"), "handles", 503),
        (FileNotFoundError(errno.ENOENT, "No such file or directory"), "missing", 500),
        (PermissionError(errno.EACCES, "Permission denied"), "denied", 500),
        (OSError(errno.EIO, "Input/output error"), "failing", 500),
        (DatabaseBusy(), "locked", 503),
    ],
)
def test_each_cause_has_its_own_answer(
    tmp_path: Path, error: Exception, kind: str, status: int
) -> None:
    fault = storage_fault(error, tmp_path / "blendserve.db")
    assert fault is not None
    assert (fault.kind, fault.answer.status_code) == (kind, status)
    assert str(tmp_path) in fault.remedy
    assert str(tmp_path) not in fault.answer.message
    assert (fault.answer.retry_after_seconds is not None) == (status == 503)


def sqlite_error(code: int) -> OperationalError:
    error = sqlite3.OperationalError("what SQLite says")
    error.sqlite_errorcode, error.sqlite_errorname = code, "SQLITE_X"
    return OperationalError("INSERT of a prompt", {}, error)


@pytest.mark.parametrize(
    ("code", "kind"),
    [
        (sqlite3.SQLITE_FULL, "full"),
        (sqlite3.SQLITE_BUSY, "locked"),
        (sqlite3.SQLITE_BUSY_SNAPSHOT, "locked"),
        (sqlite3.SQLITE_CORRUPT, "damaged"),
        (sqlite3.SQLITE_NOTADB, "damaged"),
        (sqlite3.SQLITE_IOERR_SHMSIZE, "failing"),
        (sqlite3.SQLITE_CONSTRAINT_UNIQUE, None),
    ],
)
def test_each_code_of_sqlite_has_its_kind(tmp_path: Path, code: int, kind: str | None) -> None:
    database = tmp_path / "blendserve.db"
    database.touch()
    fault = storage_fault(sqlite_error(code), database)
    assert (fault.kind if fault else None) == kind
    assert fault is None or "prompt" not in fault.remedy


def test_what_sqlite_cannot_tell_is_looked_up(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    database = tmp_path / "blendserve.db"
    error = sqlite_error(sqlite3.SQLITE_CANTOPEN)
    fault = storage_fault(error, database)
    assert fault is not None
    assert fault.kind == "missing"
    database.touch()

    def no_more(*_: Any) -> int:
        raise OSError(errno.EMFILE, "Too many open files")

    with monkeypatch.context() as patch:
        patch.setattr(os, "open", no_more)
        fault = storage_fault(error, database)
    assert fault is not None
    assert fault.kind == "handles"
