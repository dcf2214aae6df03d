"""Nothing deletes what it does not own: lost databases, orphans, locks, and who may read."""

from __future__ import annotations

import fcntl
import hashlib
import os
import shutil
import stat
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from batch_fakes import CHAT, FakeExecutor, finish, job, submit
from batch_server import BatchServer

from blendserve.batch import BatchDirectoryError, BatchService, BatchStore
from blendserve.batch.directory import LOST_SECONDS
from blendserve.batch.ids import new_batch_id
from blendserve.batch.journal import Journal, Record
from blendserve.batch.objects import CreateBatch
from blendserve.batch.upload import Upload


def add(store: BatchStore, data: bytes) -> str:
    upload = Upload({"purpose": "batch"}, "a.jsonl", len(data), hashlib.sha256(data).hexdigest())
    with store.directory.draft() as draft:
        draft.file.write(data)
        return BatchService(store, FakeExecutor()).add_upload(upload, draft).id


def orphan(store: BatchStore, data: bytes) -> str:
    """Bytes in place whose row was never written."""
    digest = hashlib.sha256(data).hexdigest()
    with store.directory.draft() as draft:
        draft.file.write(data)
        store.directory.publish(draft, digest)
    return digest


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


# -- a database that does not know what lies beside it


def removed(root: Path) -> None:
    for path in root.glob("blendserve.db*"):
        path.unlink()


def emptied(root: Path) -> None:
    removed(root)
    (root / "blendserve.db").touch()


def without_wal(root: Path) -> None:
    """As a backup tool leaves it that copies the main file only."""


@pytest.mark.parametrize("lose", [removed, emptied, without_wal])
def test_a_lost_database_is_refused_and_nothing_is_touched(
    tmp_path: Path, lose: Callable[[Path], None]
) -> None:
    store = BatchStore(tmp_path / "batches")
    add(store, job(3))
    root = tmp_path / "copy"
    shutil.copytree(tmp_path / "batches", root, ignore=shutil.ignore_patterns("*-wal", "*-shm"))
    store.close()
    lose(root)
    before = contents(root / "files")
    assert before
    for _ in range(2):
        with pytest.raises(BatchDirectoryError) as refused:
            BatchStore(root)
        assert str(root / "blendserve.db") in str(refused.value)
        assert "1 files" in str(refused.value)
        assert "-wal" in str(refused.value)
        assert contents(root / "files") == before


def test_a_database_older_than_the_files_is_refused(tmp_path: Path) -> None:
    store = BatchStore(tmp_path)
    for count in range(1, 12):
        orphan(store, job(count))
    store.close()
    before = contents(tmp_path / "files")
    with pytest.raises(BatchDirectoryError, match=r"is older than .* 11 files"):
        BatchStore(tmp_path)
    assert contents(tmp_path / "files") == before


def test_a_journal_of_a_batch_that_is_not_known_is_refused(tmp_path: Path) -> None:
    store = BatchStore(tmp_path)
    path = store.directory.journal(new_batch_id())
    journal = Journal(path)
    journal.append([Record(0, "output", {"custom_id": "r0"}).encode()])
    journal.close()
    store.close()
    with pytest.raises(BatchDirectoryError, match="1 journals"):
        BatchStore(tmp_path)
    assert path.stat().st_size
    # The remedy that the message names.
    path.rename(tmp_path / path.name)
    BatchStore(tmp_path).close()


def test_what_a_crash_leaves_is_kept_aside_for_days(tmp_path: Path) -> None:
    store = BatchStore(tmp_path)
    kept = add(store, job(1))
    digest = orphan(store, job(2))
    store.close()
    store = BatchStore(tmp_path)
    aside = tmp_path / "lost" / digest
    assert aside.read_bytes() == job(2)
    assert store.content_of(kept).read_bytes() == job(1)
    store.directory.clear_lost(time.time() + LOST_SECONDS - 60)
    assert aside.exists()
    store.directory.clear_lost(time.time() + LOST_SECONDS + 60)
    assert not aside.exists()
    store.close()


# -- the lock


def test_a_second_server_is_refused_even_if_the_lock_file_is_gone(tmp_path: Path) -> None:
    first = BatchStore(tmp_path)
    with first.directory.draft() as draft:
        (tmp_path / "lock").unlink()
        with pytest.raises(BatchDirectoryError, match="in use by another server"):
            BatchStore(tmp_path)
        assert draft.path.exists()
    first.close()
    BatchStore(tmp_path).close()


def test_a_server_of_an_earlier_release_is_respected(tmp_path: Path) -> None:
    BatchStore(tmp_path).close()
    with open(tmp_path / "lock", "r+b") as file:
        # All that those do.
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        file.truncate(0)
        file.write(b"4711\n")
        file.flush()
        with pytest.raises(BatchDirectoryError, match=r"in use by another server \(process 4711\)"):
            BatchStore(tmp_path)
    BatchStore(tmp_path).close()


# -- odd folders


def test_a_folder_in_tmp_is_left_alone(tmp_path: Path) -> None:
    BatchStore(tmp_path).close()
    (tmp_path / "tmp" / "mine").mkdir()
    BatchStore(tmp_path).close()
    assert (tmp_path / "tmp" / "mine").is_dir()


def test_a_link_to_nothing_is_named(tmp_path: Path) -> None:
    (tmp_path / "link").symlink_to(tmp_path / "nowhere")
    with pytest.raises(BatchDirectoryError, match="link is a link to nothing"):
        BatchStore(tmp_path / "link")


def test_folders_above_that_are_missing_are_made(tmp_path: Path) -> None:
    BatchStore(tmp_path / "a" / "b" / "c").close()
    assert (tmp_path / "a" / "b" / "c" / "blendserve.db").exists()


# -- who may read


@pytest.fixture
def open_umask() -> Iterator[None]:
    before = os.umask(0)
    yield
    os.umask(before)


def modes(root: Path) -> dict[str, int]:
    paths = [root, *root.rglob("*")]
    return {str(path.relative_to(root)): stat.S_IMODE(path.stat().st_mode) for path in paths}


@pytest.mark.usefixtures("open_umask")
def test_nobody_else_may_read_anything(tmp_path: Path) -> None:
    root = tmp_path / "batches"
    executor = FakeExecutor()
    with BatchServer(root, executor) as server:
        finish(server.client, submit(server.client, job(4)).id)
        executor.gate = 2
        submit(server.client, job(6))
        while not list((root / "journals").iterdir()):
            time.sleep(0.01)
        with server.store.directory.draft():
            seen = modes(root)
    assert {name for name in seen if "journals/" in name}
    assert {"blendserve.db-wal", "lock"} <= seen.keys()
    wide = {name: oct(mode) for name, mode in seen.items() if mode & 0o077}
    assert wide == {}


@pytest.mark.usefixtures("open_umask")
def test_a_directory_of_an_earlier_release_is_closed_to_others(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    store = BatchStore(tmp_path)
    add(store, job(1))
    store.close()
    for path in (tmp_path, *tmp_path.iterdir()):
        path.chmod(0o755 if path.is_dir() else 0o644)
    BatchStore(tmp_path).close()
    left = modes(tmp_path)
    # The root may be shared on purpose: it is told, and what lies in it is closed.
    assert left.pop(".") == 0o755
    assert f"chmod 700 {tmp_path}" in caplog.text
    assert [name for name, mode in left.items() if "/" not in name and mode & 0o077] == []


# -- durable names


def test_the_name_of_a_new_directory_is_made_durable(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    synced: set[int] = set()
    fsync = os.fsync

    def watched(descriptor: int) -> None:
        synced.add(os.fstat(descriptor).st_ino)
        fsync(descriptor)

    monkeypatch.setattr(os, "fsync", watched)
    BatchStore(tmp_path / "above" / "batches").close()
    for folder in (tmp_path, tmp_path / "above", tmp_path / "above" / "batches"):
        assert folder.stat().st_ino in synced


def test_a_journal_is_durable_before_its_records_count(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A process that was killed may have left records that only the page cache has."""
    executor = FakeExecutor()
    executor.gate = 2
    with BatchServer(tmp_path, executor) as server:
        batch = submit(server.client, job(6))
        while server.service.progress(batch.id).done < 2:
            time.sleep(0.01)
    [path] = (tmp_path / "journals").iterdir()
    synced: list[int] = []
    fsync = os.fsync

    def watched(descriptor: int) -> None:
        synced.append(os.fstat(descriptor).st_ino)
        fsync(descriptor)

    monkeypatch.setattr(os, "fsync", watched)
    executor = FakeExecutor()
    executor.gate = 0
    with BatchServer(tmp_path, executor) as server:
        assert server.service.progress(batch.id).done >= 2
        assert path.stat().st_ino in synced
        assert path.parent.stat().st_ino in synced


# -- a disk that is full at the start


FULL_DISK = """
import os, pathlib, sys
sys.path.insert(0, sys.argv[2])
from test_directory_safety import add, job
from blendserve.batch import BatchDirectoryError, BatchStore
from blendserve.batch.storage import storage_fault

disk = pathlib.Path(sys.argv[1])
root = disk / "b"

def fill(name):
    with open(disk / name, "wb", buffering=0) as file:
        try:
            while True:
                file.write(b"x" * 4096)
        except OSError:
            pass

store = BatchStore(root)
kept = add(store, job(3))
store.close()
fill("ballast")
store = BatchStore(root)
assert store.content_of(kept).read_bytes() == job(3)
fill("more")
try:
    add(store, job(4))
except Exception as error:
    print(storage_fault(error, store.directory.database).kind)
store.close()
fill("most")
try:
    BatchStore(root)
except BatchDirectoryError as error:
    print(error)
for name in ("ballast", "more", "most"):
    os.unlink(disk / name)
store = BatchStore(root)
print(store.content_of(kept).read_bytes() == job(3), (root / "reserve").exists())
store.close()
"""


def test_a_start_on_a_full_disk_serves_what_is_there_or_says_so(tmp_path: Path) -> None:
    if shutil.which("unshare") is None:
        pytest.skip("this machine has no unshare")
    disk = tmp_path / "disk"
    disk.mkdir()
    script = 'mount -t tmpfs -o size=800k tmpfs "$1" || exit 77; exec "$2" -c "$3" "$1" "$4"'
    run = subprocess.run(
        [
            *("unshare", "--user", "--map-root-user", "--mount", "sh", "-c", script),
            *("sh", str(disk), sys.executable, FULL_DISK, str(Path(__file__).parent)),
        ],
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
        env={**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path))},
    )
    if run.returncode == 77 or "unshare" in run.stderr:
        pytest.skip("this user may not mount a tmpfs in a name space of its own")
    assert run.returncode == 0, run.stderr
    upload, start, end = run.stdout.splitlines()
    assert upload == "full"
    # With no reserve left it does not open, and does not speak of damage or a backup.
    assert f"the disk of {disk / 'b'} is full" in start
    assert "backup" not in start
    assert end == "True True"


def test_creating_needs_no_default_fields(tmp_path: Path) -> None:
    """One key, one request: a field that is given as its default is the same request."""
    store = BatchStore(tmp_path)
    service = BatchService(store, FakeExecutor())
    file_id = add(store, job(1))
    base = {"input_file_id": file_id, "endpoint": CHAT, "completion_window": "24h"}
    first = service.create(CreateBatch.model_validate(base), "key")
    again = service.create(CreateBatch.model_validate({**base, "metadata": None}), "key")
    assert first.id == again.id
    store.close()
