"""Many batches, many tenants: everyone gets a turn, nothing is retried for ever, old things go."""

from __future__ import annotations

import hashlib
import threading
from pathlib import Path
from typing import Any

import openai
import pytest
from batch_fakes import (
    CHAT,
    FakeExecutor,
    all_ids,
    chat_line,
    faults_of,
    finish,
    job,
    jsonl,
    submit,
    until,
)
from batch_server import BatchServer
from hypothesis import given, settings
from hypothesis import strategies as st
from sqlalchemy import insert

import blendserve.batch.stages as stages_module
import blendserve.batch.surroundings as surroundings_module
import blendserve.batch.worker as worker_module
from blendserve.batch import BatchLimits, BatchService, BatchStore
from blendserve.batch.fairness import in_turn, makes_room
from blendserve.batch.ids import new_batch_id, new_file_id
from blendserve.batch.objects import CreateBatch
from blendserve.batch.reuse import reused_records
from blendserve.batch.tables import BatchRow, FileRow
from blendserve.batch.upload import Upload

NOW = 1_700_000_000


def add_file(store: BatchStore, data: bytes, tenant: str = "", **form: str) -> str:
    upload = Upload(
        {"purpose": "batch", **form}, "a.jsonl", len(data), hashlib.sha256(data).hexdigest()
    )
    service = BatchService(store, FakeExecutor(), clock=lambda: NOW)
    with store.directory.draft() as draft:
        draft.file.write(data)
        return service.add_upload(upload, draft, tenant).id


def rows(file_id: str, count: int, **values: Any) -> list[dict[str, Any]]:
    base = {"tenant": "", "endpoint": CHAT, "input_file_id": file_id, "completion_window": "24h"}
    base |= {"status": "validating", "created_at": NOW, "expires_at": NOW + 86_400, **values}
    return [{"id": new_batch_id(), **base} for _ in range(count)]


def submit_as(server: BatchServer, tenant: str, data: bytes, window: str = "24h") -> str:
    file_id = add_file(server.store, data, tenant)
    request = CreateBatch(input_file_id=file_id, endpoint=CHAT, completion_window=window)
    return server.service.create(request, tenant=tenant).id


# -- whose turn it is


@settings(max_examples=100, deadline=None)
@given(
    tenants=st.sets(st.text("abcd", max_size=2), min_size=1, max_size=6),
    rounds=st.integers(1, 12),
)
def test_tenants_take_turns(tenants: set[str], rounds: int) -> None:
    last: str | None = None
    served = []
    for _ in range(rounds * len(tenants)):
        last = in_turn(sorted(tenants), last, {})[0]
        served.append(last)
    assert {served.count(tenant) for tenant in tenants} == {rounds}


def test_who_has_fewest_running_is_next() -> None:
    assert in_turn(["a", "b", "c"], "b", {"a": 2, "c": 1}) == ["b", "c", "a"]
    assert in_turn(["a", "b", "c"], "b", {}) == ["c", "a", "b"]


def row(tenant: str, seconds: int, seq: int) -> BatchRow:
    return BatchRow(tenant=tenant, expires_at=NOW + seconds, seq=seq)


def test_the_one_with_most_makes_room_and_only_for_who_has_less() -> None:
    hoard = [row("a", 600, 1), row("a", 7_200, 2), row("a", 60, 3)]
    assert makes_room(row("b", 86_400, 4), hoard, NOW) is hoard[1]
    # A short window is no way past others who have no more than oneself.
    fair = [row("a", 86_400, 1), row("b", 7_200, 2)]
    assert makes_room(row("c", 60, 3), fair, NOW) is None
    assert makes_room(row("b", 60, 3), fair, NOW) is fair[1]
    assert makes_room(row("b", 7_000, 3), fair, NOW) is None


def test_one_with_short_windows_does_not_keep_others_out(tmp_path: Path) -> None:
    executor = FakeExecutor()
    executor.gate = 0
    with BatchServer(tmp_path, executor, BatchLimits(max_running=2)) as server:
        hasty = [submit_as(server, "hasty", job(2), "1m") for _ in range(6)]
        until(lambda: len(executor.running), lambda count: count == 2)
        patient = submit_as(server, "patient", job(2), "7d")
        # It takes one of the two places at once, though everyone's window closes before.
        until(lambda: executor.running, lambda running: patient in running)
        executor.gate = None
        for batch_id in hasty:
            until(
                lambda: server.service.retrieve(batch_id, "hasty").status,  # noqa: B023
                lambda status: status == "completed",
            )
        assert server.service.retrieve(patient, "patient").status == "completed"


def test_files_of_tenants_are_checked_in_turn(tmp_path: Path) -> None:
    executor = FakeExecutor()
    store = BatchStore(tmp_path)
    made = {}
    for tenant, count in (("a", 6), ("b", 2)):
        file_id = add_file(store, job(1), tenant)
        made[tenant] = rows(file_id, count, tenant=tenant)
        with store._writing() as session:
            session.execute(insert(BatchRow), made[tenant])
    store.close()
    with BatchServer(tmp_path, executor, BatchLimits(max_running=1)) as server:
        until(lambda: len(executor.began), lambda count: count == 8)
        owner = {entry["id"]: tenant for tenant, entries in made.items() for entry in entries}
        order = "".join(owner[batch_id] for batch_id in executor.began)
        # Both of the second tenant's are done before the last three of the first one's.
        assert order.rindex("b") <= 4, order
        until(server.store.backlog.next_expiry, lambda first: first is None)


# -- how many


def test_a_tenant_has_a_bound_on_open_batches_of_its_own(tmp_path: Path) -> None:
    executor = FakeExecutor()
    executor.gate = 0
    limits = BatchLimits(max_open_batches=3)
    with BatchServer(tmp_path, executor, limits) as server:
        made = [submit(server.client, job(1)).id for _ in range(3)]
        with pytest.raises(openai.RateLimitError) as refused:
            submit(server.client, job(1))
        assert refused.value.code == "too_many_open_batches"
        assert "at most 3" in refused.value.message
        assert refused.value.response.headers["retry-after"]
        submit_as(server, "another", job(1))
        executor.gate = None
        for batch_id in made:
            finish(server.client, batch_id)
        assert finish(server.client, submit(server.client, job(1)).id).status == "completed"


@pytest.mark.parametrize("stage", ["validate", "run", "publish"])
def test_looking_for_the_next_batch_reads_no_more_rows_than_it_needs(
    tmp_path: Path, stage: Any
) -> None:
    """What SQLite executes is counted: it must not grow with the batches that wait."""
    store = BatchStore(tmp_path)
    file_id = add_file(store, job(1))
    state = {
        "validate": {"status": "validating"},
        "run": {"status": "in_progress", "fingerprint": "x", "total": 1},
        "publish": {"status": "in_progress", "ending": "expired", "total": 1},
    }[stage]
    steps: list[int] = []

    def measure() -> int:
        steps.append(0)

        def step() -> int:
            steps[-1] += 1
            return 0

        with store._reading() as session:
            driver: Any = session.connection().connection.driver_connection
            driver.set_progress_handler(step, 10)
        found = store.backlog.next_batch(
            stage, lambda tenants: tenants, fingerprint="x" if stage == "run" else None
        )
        assert found is not None
        store.backlog.expire_overdue(NOW)
        store.backlog.next_expiry()
        return steps[-1]

    few, many = 10, 3_000
    counts = []
    for count in (few, many):
        with store._writing() as session:
            session.execute(insert(BatchRow), rows(file_id, count, **state))
        counts.append(measure())
    store.close()
    assert counts[1] <= 2 * counts[0] + 20, counts


# -- what ends by itself


def test_a_batch_that_waits_to_be_checked_expires(tmp_path: Path) -> None:
    executor = FakeExecutor()
    executor.slow_check_seconds = 0.005
    with BatchServer(tmp_path, executor) as server:
        busy = submit(server.client, job(300))
        waits = submit(server.client, job(3), completion_window="30m")
        server.clock.seconds += 1_801
        server.service.nudge()
        ended = finish(server.client, waits.id)
        assert ended.status == "expired"
        assert ended.expired_at
        executor.slow_check_seconds = 0.0
        assert finish(server.client, busy.id).status == "completed"


def test_expired_files_go_by_themselves_but_not_under_a_batch(tmp_path: Path) -> None:
    executor = FakeExecutor()
    executor.gate = 0
    with BatchServer(tmp_path, executor) as server:
        lifetime = {"expires_after[anchor]": "created_at", "expires_after[seconds]": "3600"}
        used, unused = (add_file(server.store, job(n), **lifetime) for n in (4, 5))
        request = CreateBatch(input_file_id=used, endpoint=CHAT, completion_window="24h")
        batch = server.service.create(request)
        until(lambda: executor.running, bool)
        server.clock.seconds += 7_200
        server.service.nudge()
        stored = tmp_path / "files"
        until(lambda: len(list(stored.iterdir())), lambda count: count == 1)
        assert [file.id for file in server.client.files.list()] == [used]
        with pytest.raises(openai.NotFoundError):
            server.client.files.retrieve(unused)
        executor.gate = None
        assert finish(server.client, batch.id).status == "completed"
        server.clock.seconds += 120
        server.service.nudge()
        # Its output is left.
        until(lambda: len(list(stored.iterdir())), lambda count: count == 1)
        assert [file.purpose for file in server.client.files.list()] == ["batch_output"]


def test_what_cannot_be_removed_keeps_no_batch_from_its_end(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def refused(*_: Any) -> bool:
        raise OSError(5, "Input/output error")

    monkeypatch.setattr(BatchStore, "bury_expired", refused)
    with BatchServer(tmp_path, FakeExecutor()) as server:
        assert finish(server.client, submit(server.client, job(2)).id).status == "completed"
    assert "cannot be removed yet" in caplog.text


def test_many_expired_files_cost_one_statement_a_block(tmp_path: Path) -> None:
    """Under the right to write, a look at every batch for every file would take seconds."""
    store = BatchStore(tmp_path)
    count = 1_200
    first = add_file(store, job(1))
    digest = store.content_of(first).name
    files = [
        {
            "id": new_file_id(),
            "tenant": "",
            "purpose": "batch",
            "filename": "a.jsonl",
            "size_bytes": 1,
            "sha256": digest,
            "created_at": NOW,
            "expires_at": NOW + 60,
        }
        for _ in range(count)
    ]
    ended = {"status": "completed", "ending": "completed"}
    with store._writing() as session:
        session.execute(insert(FileRow), files)
        for file in files:
            session.execute(insert(BatchRow), rows(file["id"], 1, **ended))
    blocks = 1
    while store.bury_expired(NOW + 61):
        blocks += 1
    assert blocks == 3
    listed, _ = store.list_files(
        now=NOW + 61, tenant="", after=None, limit=10, order="asc", purpose=None
    )
    assert [file.id for file in listed] == [first]
    assert store.content_of(first).exists()
    store.close()


# -- what is never tried for ever


def test_reuse_leaves_out_what_it_cannot_read_or_write(tmp_path: Path) -> None:
    deep: list[Any] = []
    for _ in range(300):
        deep = [deep]
    odd = [b'{"custom_id":"nan","body":{"x":NaN}}', b"[]", b'{"custom_id":"none"}']
    lines = [chat_line("deep", metadata=deep), chat_line("deep-answer"), chat_line("plain")]
    (tmp_path / "input").write_bytes(jsonl([*odd, *lines]))
    answers = [{"custom_id": line["custom_id"], "response": {}} for line in lines]
    answers[1]["response"] = deep
    (tmp_path / "output").write_bytes(jsonl([b"rubbish", b"[]", *answers]))
    new, earlier = (BatchRow(id=new_batch_id(), input_file_id="input") for _ in range(2))
    earlier.output_file_id = "output"
    [[record]] = reused_records(lambda name: tmp_path / name, new, [earlier], 10**6)
    assert b'"custom_id":"plain"' in record
    assert b'"index":5' in record


@pytest.mark.parametrize("stage", ["Validation", "Running", "Publishing"])
def test_a_batch_that_raises_again_and_again_ends_and_others_go_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, stage: str
) -> None:
    owner = getattr(stages_module, stage)
    carry_out = owner.carry_out
    tries: list[str] = []
    bad = threading.Event()
    marked: list[str] = []

    async def sometimes(self: Any, row: BatchRow) -> None:
        if (row.metadata_json or "") == '{"n":"bad"}' and not (
            stage == "Publishing" and row.errors_json
        ):
            tries.append(row.id)
            bad.set()
            raise ZeroDivisionError("what a prompt says")
        marked.append(row.id)
        await carry_out(self, row)

    monkeypatch.setattr(owner, "carry_out", sometimes)
    with BatchServer(tmp_path, FakeExecutor()) as server:
        odd = submit(server.client, job(3), metadata={"n": "bad"})
        assert bad.wait(20)
        plain = submit(server.client, job(3))
        assert finish(server.client, plain.id).status == "completed"
        ended = finish(server.client, odd.id)
        assert ended.status == "failed"
        [fault] = faults_of(ended)
        assert fault.code == "internal_error"
        assert "ZeroDivisionError" in (fault.message or "")
        assert "prompt" not in (fault.message or "")
        assert tries == [odd.id] * worker_module._MAX_TRIES
        if stage == "Running":
            assert all_ids(server.client, ended) == ["r0", "r1", "r2"]
        if stage == "Publishing":
            # What could not be published is kept for whoever looks into it.
            assert (tmp_path / "lost" / f"{odd.id}.jsonl").stat().st_size
    assert not list((tmp_path / "journals").iterdir())
    assert "fails for good" in caplog.text


def test_a_full_disk_is_no_reason_to_end_a_batch(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = stages_module.validate_file
    refusals = [0]

    def unreadable(*args: Any, **kwargs: Any) -> Any:
        refusals[0] += 1
        if refusals[0] <= 2 * worker_module._MAX_TRIES:
            raise OSError(5, "Input/output error")
        return real(*args, **kwargs)

    monkeypatch.setattr(stages_module, "validate_file", unreadable)
    with BatchServer(tmp_path, FakeExecutor()) as server:
        assert finish(server.client, submit(server.client, job(2)).id).status == "completed"
    assert refusals[0] > 2 * worker_module._MAX_TRIES


def test_what_cannot_be_cancelled_any_more_says_what_it_is_about_to_be(tmp_path: Path) -> None:
    executor = FakeExecutor()
    executor.gate = 0
    with BatchServer(tmp_path, executor) as server:
        batch = submit(server.client, job(4))
        until(lambda: executor.running, bool)
        assert server.store.advance(batch.id, ["in_progress"], ending="expired") is not None
        with pytest.raises(openai.ConflictError, match="about to be expired cannot be cancelled"):
            server.client.batches.cancel(batch.id)
        server.service.nudge()
        executor.gate = None
        finish(server.client, batch.id)
        with pytest.raises(openai.ConflictError, match="that is expired cannot be cancelled"):
            server.client.batches.cancel(batch.id)


def test_a_batch_whose_journal_cannot_be_read_does_not_keep_the_server_from_starting(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    executor = FakeExecutor()
    executor.gate = 4
    with BatchServer(tmp_path, executor) as server:
        broken = submit(server.client, job(12))
        until(lambda: server.service.progress(broken.id).done, lambda done: done >= 4)
    read = surroundings_module.tally_journal
    damaged = threading.Event()
    damaged.set()

    def unreadable(*args: Any) -> Any:
        if damaged.is_set() and args[1] == 12:
            raise OSError(5, "Input/output error")
        return read(*args)

    monkeypatch.setattr(surroundings_module, "tally_journal", unreadable)
    with BatchServer(tmp_path, FakeExecutor()) as server:
        assert finish(server.client, submit(server.client, job(2)).id).status == "completed"
        assert server.client.batches.retrieve(broken.id).status == "in_progress"
        damaged.clear()
        ended = finish(server.client, broken.id)
        assert (ended.status, len(all_ids(server.client, ended))) == ("completed", 12)
