"""Files lie under the digest of their bytes: the same bytes once, as long as a file has them."""

from __future__ import annotations

import hashlib
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import openai
import pytest
from batch_fakes import FakeExecutor, finish, job, submit, until
from batch_server import BatchServer

from blendserve.batch import BatchService, BatchStore
from blendserve.batch.ids import new_file_id
from blendserve.batch.tables import FileRow
from blendserve.batch.upload import Upload


def stored(batch_dir: Path) -> set[str]:
    return {path.name for path in (batch_dir / "files").iterdir()}


def digest(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


def add(service: BatchService, data: bytes) -> str:
    upload = Upload({"purpose": "batch"}, "a.jsonl", len(data), digest(data))
    with service.store.directory.draft() as draft:
        draft.file.write(data)
        return service.add_upload(upload, draft).id


@pytest.fixture
def service(tmp_path: Path) -> Any:
    store = BatchStore(tmp_path)
    yield BatchService(store, FakeExecutor())
    store.close()


def test_the_same_bytes_lie_once_until_the_last_file_that_has_them_goes(tmp_path: Path) -> None:
    with BatchServer(tmp_path, FakeExecutor()) as server:
        data, files = job(3), server.client.files
        first, second = (files.create(file=("a.jsonl", data), purpose="batch") for _ in range(2))
        assert first.id != second.id
        assert stored(tmp_path) == {digest(data)}
        files.delete(first.id)
        with pytest.raises(openai.NotFoundError):
            files.content(first.id)
        assert files.content(second.id).content == data
        files.delete(second.id)
        assert stored(tmp_path) == set()


def test_deleting_a_twin_leaves_the_input_of_a_running_batch(tmp_path: Path) -> None:
    executor = FakeExecutor()
    executor.gate = 1
    with BatchServer(tmp_path, executor) as server:
        data = job(6)
        twin = server.client.files.create(file=("b.jsonl", data), purpose="batch")
        batch = submit(server.client, data)
        until(lambda: executor.running, bool)
        server.client.files.delete(twin.id)
        executor.gate = None
        assert finish(server.client, batch.id).status == "completed"
        assert server.client.files.content(batch.input_file_id).content == data


def test_an_expired_file_leaves_its_twin(tmp_path: Path) -> None:
    with BatchServer(tmp_path, FakeExecutor()) as server:
        data, files = job(2), server.client.files
        lifetime: Any = {"anchor": "created_at", "seconds": 3_600}
        files.create(file=("a.jsonl", data), purpose="batch", expires_after=lifetime)
        lasting = files.create(file=("a.jsonl", data), purpose="batch")
        server.clock.seconds += 3_601
        assert [file.id for file in files.list()] == [lasting.id]
        assert files.content(lasting.id).content == data


def test_bytes_that_no_file_has_after_a_crash_leave_at_the_next_start(tmp_path: Path) -> None:
    """Between bytes and row of an upload; and between row and bytes of a deletion."""
    store = BatchStore(tmp_path)
    kept, unlinked = (add(BatchService(store, FakeExecutor()), job(count)) for count in (1, 2))
    with store.directory.draft() as draft:
        draft.file.write(job(3))
        store.directory.publish(draft, digest(job(3)))
    with store._writing() as session:
        row = session.query(FileRow).filter_by(id=unlinked).one()
        row.deleted_at = 1
    store.close()
    assert len(stored(tmp_path)) == 3
    store = BatchStore(tmp_path)
    assert stored(tmp_path) == {digest(job(1))}
    assert store.content_of(kept).read_bytes() == job(1)
    store.close()


def test_bytes_whose_row_cannot_be_written_do_not_stay(
    tmp_path: Path, service: BatchService
) -> None:
    file_id = add(service, job(1))
    for count, left in ((2, {digest(job(1))}), (1, {digest(job(1))})):
        with service.store.directory.draft() as draft:
            draft.file.write(job(count))
            row = FileRow(
                id=file_id,  # Taken, so the row is refused.
                purpose="batch",
                filename="b.jsonl",
                size_bytes=1,
                sha256=digest(job(count)),
                created_at=0,
            )
            with pytest.raises(Exception, match="UNIQUE"):
                service.store.add_file(row, draft)
        assert stored(tmp_path) == left


def test_uploads_and_deletions_of_the_same_bytes_at_once_never_lose_them(
    tmp_path: Path, service: BatchService
) -> None:
    data, stop = job(2), threading.Event()

    def churn() -> None:
        while not stop.is_set():
            service.delete_file(add(service, data))

    with ThreadPoolExecutor(2) as threads:
        churning = [threads.submit(churn) for _ in range(2)]
        try:
            for _ in range(40):
                file_id = add(service, data)
                _, stream = service.open_file(file_id)
                with stream:
                    assert stream.read() == data
                service.delete_file(file_id)
        finally:
            stop.set()
        for future in churning:
            future.result()
    assert stored(tmp_path) == set()


def test_an_id_that_is_no_digest_leads_nowhere(service: BatchService) -> None:
    for text in ("../blendserve.db", "a" * 63, "A" * 64, "a" * 64 + "\n", new_file_id()):
        with pytest.raises(ValueError, match="digest"):
            service.store.directory.content(text)
