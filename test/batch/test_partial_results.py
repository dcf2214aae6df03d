"""Results of a batch that still runs: what is told is the beginning of its files in the end."""

from __future__ import annotations

import json
from pathlib import Path

import httpx
import pytest
from batch_fakes import FakeExecutor, chat_line, counts_of, finish, job, jsonl, submit, until
from batch_server import BatchServer


def so_far(server: BatchServer, batch_id: str, kind: str = "output", after: int = 0) -> bytes:
    answer = server.http.get(
        f"/v1/batches/{batch_id}/results", params={"kind": kind, "after": after}
    )
    assert answer.status_code == 200, answer.text
    return answer.content


def status_of(answer: httpx.Response) -> str:
    return answer.headers["blendserve-batch-status"]


def test_what_is_told_while_it_runs_is_the_beginning_of_the_file(server: BatchServer) -> None:
    server.executor.gate = 8
    batch = submit(server.client, job(20, {1: "fail", 6: "timeout"}))
    until(lambda: counts_of(server.client.batches.retrieve(batch.id)), lambda c: c.failed == 2)
    until(lambda: counts_of(server.client.batches.retrieve(batch.id)), lambda c: c.completed >= 6)
    answer = server.http.get(f"/v1/batches/{batch.id}/results")
    assert status_of(answer) == "in_progress"
    outputs, errors = answer.content, so_far(server, batch.id, "error")
    assert len(outputs.splitlines()) == 6
    assert {json.loads(line)["custom_id"] for line in errors.splitlines()} == {"r1", "r6"}
    server.executor.gate = None
    ended = finish(server.client, batch.id)
    assert ended.output_file_id is not None
    assert ended.error_file_id is not None
    whole = server.client.files.content(ended.output_file_id).content
    assert whole.startswith(outputs)
    assert server.client.files.content(ended.error_file_id).content == errors
    answer = server.http.get(f"/v1/batches/{batch.id}/results", params={"after": 6})
    assert status_of(answer) == "completed"
    assert outputs + answer.content == whole


def test_a_reader_that_comes_again_and_again_gets_each_line_once(server: BatchServer) -> None:
    server.executor.delay_seconds = 0.005
    batch = submit(server.client, job(120, {3: "fail"}))
    got = b""
    status = ""
    while status != "completed":
        answer = server.http.get(
            f"/v1/batches/{batch.id}/results", params={"after": len(got.splitlines())}
        )
        status = status_of(answer)
        got += answer.content
    file_id = server.client.batches.retrieve(batch.id).output_file_id
    assert file_id is not None
    assert got == server.client.files.content(file_id).content
    # One that has less than was told before gets it from the beginning.
    assert so_far(server, batch.id, after=2) == b"".join(got.splitlines(keepends=True)[2:])


def test_what_was_told_stands_after_a_restart(tmp_path: Path) -> None:
    with BatchServer(tmp_path / "batches", FakeExecutor()) as server:
        server.executor.gate = 5
        batch = submit(server.client, job(12))
        until(lambda: so_far(server, batch.id), lambda told: len(told.splitlines()) >= 5)
        told = so_far(server, batch.id)
    waiting = FakeExecutor()
    waiting.gate = 0
    with BatchServer(tmp_path / "batches", waiting) as server:
        assert so_far(server, batch.id).startswith(told)
        waiting.gate = None
        ended = finish(server.client, batch.id)
        assert ended.output_file_id is not None
        assert server.client.files.content(ended.output_file_id).content.startswith(told)


@pytest.mark.parametrize(
    ("path", "status"),
    [
        ("batch_00000000000000000000000000000000/results", 404),
        ("../files/results", 404),
        ("{id}/results?kind=both", 400),
        ("{id}/results?after=-1", 400),
        ("{id}/results?after=many", 400),
    ],
)
def test_a_wrong_question_is_answered_in_openais_shape(
    server: BatchServer, path: str, status: int
) -> None:
    batch = submit(server.client, job(1))
    answer = server.http.get("/v1/batches/" + path.format(id=batch.id))
    assert answer.status_code == status
    if "batch_0" in path or status == 400:
        assert answer.json()["error"]["message"]


def test_a_failed_batch_has_no_results_and_a_deleted_file_is_gone(server: BatchServer) -> None:
    failed = submit(server.client, b"{nope\n")
    finish(server.client, failed.id)
    assert so_far(server, failed.id) == so_far(server, failed.id, "error") == b""
    done = finish(server.client, submit(server.client, jsonl([chat_line("a")])).id)
    assert done.output_file_id is not None
    server.client.files.delete(done.output_file_id)
    assert server.http.get(f"/v1/batches/{done.id}/results").status_code == 404
