"""The unmodified OpenAI SDK drives the service from upload to download."""

from __future__ import annotations

import asyncio

import openai
import pytest
from batch_fakes import (
    ENDED,
    all_ids,
    chat_line,
    counts_of,
    finish,
    job,
    jsonl,
    results,
    submit,
    until,
    usage_of,
)
from batch_server import BatchServer, Clock


def test_a_job_runs_from_upload_to_download(server: BatchServer) -> None:
    client = server.client
    file = client.files.create(file=("job.jsonl", job(25)), purpose="batch")
    assert (file.object, file.purpose, file.bytes, file.filename) == (
        "file",
        "batch",
        len(job(25)),
        "job.jsonl",
    )
    client.files.wait_for_processing(file.id)
    assert client.files.content(file.id).content == job(25)

    batch = client.batches.create(
        input_file_id=file.id,
        endpoint="/v1/chat/completions",
        completion_window="24h",
        metadata={"team": "search"},
    )
    assert (batch.status, batch.object, batch.metadata) == (
        "validating",
        "batch",
        {"team": "search"},
    )
    assert batch.expires_at == batch.created_at + 86_400

    batch = finish(client, batch.id)
    assert batch.status == "completed"
    assert batch.model == "fake-model"
    assert batch.error_file_id is None
    assert batch.errors is None
    times = [batch.created_at, batch.in_progress_at, batch.finalizing_at, batch.completed_at]
    assert times == sorted(time for time in times if time is not None)
    assert usage_of(batch).input_tokens == 250
    assert usage_of(batch).output_tokens == 75
    assert usage_of(batch).total_tokens == 325
    assert usage_of(batch).input_tokens_details.cached_tokens == 100
    outputs = results(client, batch.output_file_id)
    assert sorted(outputs) == sorted(f"r{i}" for i in range(25))
    line = outputs["r7"]
    assert line["id"].startswith("batch_req_")
    assert line["error"] is None
    assert line["response"]["status_code"] == 200
    assert line["response"]["body"]["choices"][0]["message"]["content"] == "7 yas"
    output = client.files.retrieve(batch.output_file_id or "none")
    assert (output.purpose, output.expires_at) == ("batch_output", None)


def test_failed_requests_go_to_the_error_file_and_the_batch_completes(
    server: BatchServer,
) -> None:
    orders = {0: "fail", 1: "timeout", 2: "unwritable"}
    batch = finish(server.client, submit(server.client, job(6, orders)).id)
    assert batch.status == "completed"
    assert (counts_of(batch).completed, counts_of(batch).failed) == (3, 3)
    errors = results(server.client, batch.error_file_id)
    assert errors["r0"]["response"]["status_code"] == 400
    assert errors["r0"]["error"] is None
    assert errors["r1"]["response"] is None
    assert errors["r1"]["error"]["code"] == "request_timeout"
    assert errors["r2"]["error"]["code"] == "internal_error"
    assert set(results(server.client, batch.output_file_id)) == {"r3", "r4", "r5"}


def test_a_batch_without_successes_has_no_output_file(server: BatchServer) -> None:
    batch = finish(server.client, submit(server.client, job(2, {0: "fail", 1: "fail"})).id)
    assert (batch.status, batch.output_file_id) == ("completed", None)
    assert len(results(server.client, batch.error_file_id)) == 2


@pytest.mark.parametrize("order", ["silent", "bug"])
def test_a_line_that_never_gets_an_answer_is_answered_as_an_error(
    server: BatchServer, order: str
) -> None:
    batch = finish(server.client, submit(server.client, job(9, {4: order})).id)
    assert batch.status == "completed"
    assert all_ids(server.client, batch) == sorted(f"r{i}" for i in range(9))
    errors = results(server.client, batch.error_file_id)
    assert errors["r4"]["error"]["code"] == "internal_error"


def test_cancelling_keeps_what_is_finished(server: BatchServer) -> None:
    server.executor.gate = 8
    batch = submit(server.client, job(40))
    until(
        lambda: server.client.batches.retrieve(batch.id),
        lambda seen: counts_of(seen).completed >= 8,
    )
    first = server.client.batches.cancel(batch.id)
    assert first.status in {"cancelling", "cancelled"}
    assert first.cancelling_at is not None
    server.client.batches.cancel(batch.id)
    ended = finish(server.client, batch.id)
    assert ended.status == "cancelled"
    assert ended.cancelled_at is not None
    outputs = results(server.client, ended.output_file_id)
    errors = results(server.client, ended.error_file_id)
    assert len(outputs) == counts_of(ended).completed >= 8
    assert {line["error"]["code"] for line in errors.values()} == {"batch_cancelled"}
    assert all(line["response"] is None for line in errors.values())
    assert sorted([*outputs, *errors]) == sorted(f"r{i}" for i in range(40))
    assert server.executor.aborted > 0


def test_a_batch_that_waits_its_turn_is_validated_and_can_be_cancelled(
    server: BatchServer,
) -> None:
    server.executor.gate = 0
    running = submit(server.client, job(10))
    queued = submit(server.client, job(5))
    until(
        lambda: server.client.batches.retrieve(queued.id),
        lambda batch: batch.status == "in_progress" and counts_of(batch).total == 5,
    )
    server.client.batches.cancel(queued.id)
    ended = finish(server.client, queued.id)
    assert (ended.status, counts_of(ended).failed) == ("cancelled", 5)
    assert server.client.batches.retrieve(running.id).status == "in_progress"
    server.executor.gate = None
    assert finish(server.client, running.id).status == "completed"


def test_a_finished_batch_cannot_be_cancelled(server: BatchServer) -> None:
    batch = finish(server.client, submit(server.client, job(1)).id)
    with pytest.raises(openai.ConflictError):
        server.client.batches.cancel(batch.id)


def test_a_batch_past_its_window_expires_with_its_finished_lines(
    server: BatchServer, clock: Clock
) -> None:
    server.executor.gate = 4
    batch = submit(server.client, job(12), completion_window="30m")
    assert batch.expires_at == batch.created_at + 1_800
    until(
        lambda: server.client.batches.retrieve(batch.id),
        lambda seen: counts_of(seen).completed >= 4,
    )
    clock.seconds += 1_801
    server.service.nudge()
    ended = finish(server.client, batch.id)
    assert ended.status == "expired"
    assert ended.expired_at is not None
    errors = results(server.client, ended.error_file_id)
    assert {line["error"]["code"] for line in errors.values()} == {"batch_expired"}
    assert all_ids(server.client, ended) == sorted(f"r{i}" for i in range(12))


def test_lists_page_through_everything_newest_first(server: BatchServer) -> None:
    made = [submit(server.client, job(1)).id for _ in range(7)]
    page = server.client.batches.list(limit=3)
    assert [batch.id for batch in page.data] == made[:-4:-1]
    assert page.has_more
    assert [batch.id for batch in server.client.batches.list(limit=3)] == made[::-1]
    for batch_id in made:
        finish(server.client, batch_id)

    client = server.client
    files = [file.id for file in client.files.list(purpose="batch", order="asc", limit=2)]
    assert len(files) == 7
    descending = [file.id for file in client.files.list(purpose="batch", order="desc", limit=3)]
    assert descending == files[::-1]
    assert len(list(client.files.list(purpose="batch_output"))) == 7
    assert len(list(client.files.list(limit=5))) == 14


def test_files_can_be_deleted_while_paging_over_them(server: BatchServer) -> None:
    client = server.client
    for _ in range(5):
        client.files.create(file=("a.jsonl", job(1)), purpose="batch")
    for file in client.files.list(limit=2):
        deleted = client.files.delete(file.id)
        assert (deleted.id, deleted.deleted, deleted.object) == (file.id, True, "file")
        with pytest.raises(openai.NotFoundError):
            client.files.retrieve(file.id)
        with pytest.raises(openai.NotFoundError):
            client.files.content(file.id)
    assert list(client.files.list()) == []


def test_the_input_of_a_running_batch_cannot_be_deleted(server: BatchServer) -> None:
    server.executor.gate = 0
    batch = submit(server.client, job(3))
    with pytest.raises(openai.ConflictError) as refused:
        server.client.files.delete(batch.input_file_id)
    assert refused.value.code == "file_in_use"
    server.executor.gate = None
    finish(server.client, batch.id)
    assert server.client.files.delete(batch.input_file_id).deleted


def test_files_expire_when_they_were_told_to(server: BatchServer, clock: Clock) -> None:
    client = server.client
    file = client.files.create(
        file=("job.jsonl", job(2)),
        purpose="batch",
        expires_after={"anchor": "created_at", "seconds": 3_600},
    )
    assert file.expires_at == file.created_at + 3_600
    batch = client.batches.create(
        input_file_id=file.id,
        endpoint="/v1/chat/completions",
        completion_window="24h",
        output_expires_after={"anchor": "created_at", "seconds": 7_200},
    )
    ended = finish(client, batch.id)
    output = client.files.retrieve(ended.output_file_id or "none")
    assert output.expires_at == output.created_at + 7_200
    clock.seconds += 3_601
    with pytest.raises(openai.NotFoundError):
        client.files.retrieve(file.id)
    assert [kept.id for kept in client.files.list()] == [output.id]
    clock.seconds += 3_600
    assert list(client.files.list()) == []
    # The bytes go with the next sweep, which nobody has to ask for.
    server.service.nudge()
    stored = server.store.directory.root / "files"
    until(lambda: list(stored.iterdir()), lambda left: not left)


def test_an_idempotency_key_names_one_batch(server: BatchServer) -> None:
    key = {"Idempotency-Key": "night-run-1"}
    first = submit(server.client, job(2), extra_headers=key)
    again = server.client.batches.create(
        input_file_id=first.input_file_id,
        endpoint="/v1/chat/completions",
        completion_window="24h",
        extra_headers=key,
    )
    assert again.id == first.id
    assert len(list(server.client.batches.list())) == 1
    with pytest.raises(openai.ConflictError) as refused:
        submit(server.client, job(3), extra_headers=key)
    assert refused.value.code == "idempotency_key_reused"
    finish(server.client, first.id)


def test_the_async_client_works_too(server: BatchServer) -> None:
    async def drive() -> str:
        async with openai.AsyncOpenAI(base_url=f"{server.url}/v1", api_key="none") as client:
            file = await client.files.create(file=("job.jsonl", job(3)), purpose="batch")
            batch = await client.batches.create(
                input_file_id=file.id,
                endpoint="/v1/chat/completions",
                completion_window="24h",
            )
            while batch.status not in ENDED:
                await asyncio.sleep(0.01)
                batch = await client.batches.retrieve(batch.id)
            return batch.status

    assert asyncio.run(drive()) == "completed"


def test_dos_line_ends_a_byte_order_mark_and_blank_lines_do_no_harm(server: BatchServer) -> None:
    text = b"\xef\xbb\xbf" + jsonl([chat_line("first"), b"", b"  ", chat_line("zweite-ü")])
    data = text.replace(b"\n", b"\r\n").rstrip()
    batch = finish(server.client, submit(server.client, data).id)
    assert batch.status == "completed"
    assert set(results(server.client, batch.output_file_id)) == {"first", "zweite-ü"}


def test_progress_tells_lines_tokens_and_phase(server: BatchServer) -> None:
    server.executor.gate = 4
    batch = submit(server.client, job(10))
    running = until(lambda: server.service.progress(batch.id), lambda seen: seen.completed == 4)
    assert (running.phase, running.total, running.done) == ("running", 10, 4)
    assert running.started_at is not None
    assert running.usage.input_tokens == 40
    assert running.usage.cached_tokens == 16
    server.executor.gate = None
    finish(server.client, batch.id)
    ended = server.service.progress(batch.id)
    assert (ended.phase, ended.completed, ended.usage.output_tokens) == ("ended", 10, 30)
