"""A directory of the release before is opened, upgraded, and goes on; a newer one is left alone."""

from __future__ import annotations

import shutil
import sqlite3
from pathlib import Path
from typing import Any

import pytest
from batch_fakes import CHAT, FakeExecutor, all_ids, finish, results, until
from batch_server import BatchServer

from blendserve.batch import BatchDirectoryError, BatchService, BatchStore
from blendserve.batch.objects import CreateBatch

# Made by that release: files and batches of two tenants; one batch completed, one failed, one with
# a journal of four results and a suspect, one not validated yet; a file that expires after an
# hour, a deleted one, two idempotency keys. All at BatchServer's clock.
SAVED = Path(__file__).with_name("directory_v3")
ENGINE = "fake-model@fedcba9876543210"


@pytest.fixture
def directory(tmp_path: Path) -> Path:
    root = tmp_path / "batches"
    shutil.copytree(SAVED, root, ignore=shutil.ignore_patterns("*.sql"))
    database = sqlite3.connect(root / "blendserve.db")
    database.executescript((SAVED / "database.sql").read_text())
    database.close()
    return root


def by_name(server: BatchServer, tenant: str) -> dict[str, Any]:
    page = server.service.list(after=None, limit=100, tenant=tenant)
    return {(batch.metadata or {})["n"]: batch for batch in page.data}


def schema(root: Path) -> set[tuple[Any, ...]]:
    database = sqlite3.connect(root / "blendserve.db")
    tables = [name for (name,) in database.execute("SELECT name FROM sqlite_master")]
    columns = {
        (table, *row[1:3], row[5], row[6])
        for table in tables
        for row in database.execute(f"PRAGMA table_xinfo({table})")
    }
    [version] = database.execute("PRAGMA user_version")
    database.close()
    return columns | {("version", *version)}


def test_everything_is_there_and_goes_on(directory: Path) -> None:
    executor = FakeExecutor(fingerprint=ENGINE)
    with BatchServer(directory, executor) as server:
        done = by_name(server, "")["done"]
        assert done.status == "completed"
        outputs = results(server.client, done.output_file_id)
        assert len(outputs) == 5
        assert list(results(server.client, done.error_file_id)) == ["r2"]
        assert by_name(server, "ads")["failed"].errors.data[0].code == "invalid_json_line"

        waited = finish(server.client, by_name(server, "")["validating"].id)
        assert (waited.status, all_ids(server.client, waited)) == ("completed", ["r0", "r1", "r2"])
        running = until(
            lambda: by_name(server, "ads")["running"], lambda batch: batch.status == "completed"
        )
        counts = running.request_counts
        assert (counts.total, counts.completed, counts.failed) == (12, 11, 1)
        # What its journal had was not done again, though its records have no checksums.
        assert len(executor.computed) == 3 + 8

        stored = len(list((directory / "files").iterdir()))
        listed = [file.id for file in server.client.files.list()]
        server.clock.seconds += 3_601
        server.service.nudge()
        until(lambda: len(list((directory / "files").iterdir())), lambda count: count < stored)
        [expired] = {*listed} - {file.id for file in server.client.files.list()}
        assert expired == "file-71a52abec1bd800cafaf2bf216d38083"
    assert schema(directory) == schema_of_new(directory.with_name("new"))


def schema_of_new(root: Path) -> set[tuple[Any, ...]]:
    BatchStore(root).close()
    return schema(root)


def test_a_key_of_the_release_before_still_finds_its_batch(directory: Path) -> None:
    store = BatchStore(directory)
    service = BatchService(store, FakeExecutor(), clock=lambda: 1_700_000_000.0)
    known = service.list(after=None, limit=10).data[0]
    request = CreateBatch(
        input_file_id=known.input_file_id,
        endpoint=CHAT,
        completion_window="24h",
        metadata={"n": "validating"},
    )
    assert service.create(request, "key-2").id == known.id
    explicit = request.model_copy(update={"reuse_results": False, "output_expires_after": None})
    assert service.create(explicit, "key-2").id == known.id
    store.close()


def test_a_running_batch_waits_for_an_engine_of_its_own_name(directory: Path) -> None:
    with BatchServer(directory, FakeExecutor(fingerprint="other@0123456789abcdef")) as server:
        batch_id = by_name(server, "ads")["running"].id
        note = server.service.progress(batch_id, "ads").note or ""
        assert "fake-model@" in note
        assert "other@0123456789abcdef" in note
    # Once one of them has taken it up, it is that one's for good.
    adopted = FakeExecutor(fingerprint=ENGINE)
    adopted.gate = 2
    with BatchServer(directory, adopted) as server:
        until(lambda: batch_id in adopted.running, bool)
    with BatchServer(directory, FakeExecutor(fingerprint="fake-model@0000")) as server:
        assert ENGINE in (server.service.progress(batch_id, "ads").note or "")


def test_a_record_that_counts_for_another_line_is_computed_again(directory: Path) -> None:
    """Without a checksum, the custom_id tells that a digit of the index was flipped."""
    [journal] = (directory / "journals").iterdir()
    journal.write_bytes(journal.read_bytes().replace(b'{"index":3,', b'{"index":9,'))
    executor = FakeExecutor(fingerprint=ENGINE)
    with BatchServer(directory, executor) as server:
        batch = until(
            lambda: by_name(server, "ads")["running"], lambda batch: batch.status == "completed"
        )
        found: list[str] = []
        for file_id in (batch.output_file_id, batch.error_file_id):
            _, stream = server.service.open_file(file_id, "ads")
            with stream:
                found += [line.split(b'"custom_id":"')[1].split(b'"')[0] for line in stream]
        assert sorted(found) == sorted(f"r{i}".encode() for i in range(12))


@pytest.mark.parametrize("version", [1, 2, 99])
def test_a_version_that_is_not_known_is_left_alone(tmp_path: Path, version: int) -> None:
    BatchStore(tmp_path).close()
    with sqlite3.connect(tmp_path / "blendserve.db") as database:
        database.execute(f"PRAGMA user_version = {version}")
    with pytest.raises(BatchDirectoryError, match=f"schema version {version}.* knows versions 3"):
        BatchStore(tmp_path)


def test_a_migration_that_is_cut_short_changes_nothing(
    directory: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from blendserve.batch import database as database_module

    class Died(BaseException):
        pass

    migrate = database_module._migrate_from_3

    def dying(connection: Any) -> None:
        migrate(connection)
        raise Died

    before = schema(directory)
    with monkeypatch.context() as patch:
        patch.setattr(database_module, "_migrate_from_3", dying)
        with pytest.raises(Died):
            BatchStore(directory)
    assert schema(directory) == before
    BatchStore(directory).close()
    assert schema(directory) != before


def test_a_directory_from_before_webhooks_gets_them(tmp_path: Path) -> None:
    BatchStore(tmp_path / "new").close()
    BatchStore(tmp_path / "old").close()
    with sqlite3.connect(tmp_path / "old" / "blendserve.db") as database:
        database.execute("DROP TABLE webhooks")
        database.execute("PRAGMA user_version = 4")
    BatchStore(tmp_path / "old").close()
    assert schema(tmp_path / "old") == schema(tmp_path / "new")
