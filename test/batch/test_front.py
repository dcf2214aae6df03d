"""The front process: an engine that dies or hangs takes neither the API nor the job with it."""

from __future__ import annotations

import os
import sys
from pathlib import Path

import openai
import pytest
from batch_fakes import (
    CHAT,
    all_ids,
    counts_of,
    finish,
    job,
    results,
    submit,
    until,
)
from front_server import FrontServer

from blendserve.batch import ApiKeys
from blendserve.batch.keys import Holder, KeyFileError
from blendserve.cli.engine_process import WatchSettings

CHAT_BODY = {"model": "fake-model", "messages": [{"role": "user", "content": "hi"}]}


def ids(count: int) -> list[str]:
    return sorted(f"r{i}" for i in range(count))


def test_a_job_runs_in_the_engine_process(tmp_path: Path) -> None:
    with FrontServer(tmp_path) as server:
        # Not yet loaded: files and batches are taken all the same.
        batch = submit(server.client, job(30, {4: "fail", 5: "timeout", 6: "unwritable"}))
        batch = finish(server.client, batch.id)
        assert (batch.status, counts_of(batch).failed) == ("completed", 3)
        assert all_ids(server.client, batch) == ids(30)
        assert server.http.get("/blendserve/status").json()["engine"]["state"] == "up"


def test_an_engine_that_dies_is_replaced_and_the_job_goes_on(tmp_path: Path) -> None:
    log = tmp_path / "computed"
    with FrontServer(tmp_path / "batches", "--delay", "0.02", "--log", str(log)) as server:
        batch = submit(server.client, job(60))
        seen = until(
            lambda: server.client.batches.retrieve(batch.id),
            lambda seen: counts_of(seen).completed >= 12,
        )
        first = server.engine_pid
        server.kill_engine()
        until(lambda: server.front.engine.view.restarts, bool)
        # The API answers while there is no engine.
        assert server.client.files.content(batch.input_file_id).content == job(60)
        between = server.client.batches.retrieve(batch.id)
        assert counts_of(between).completed >= counts_of(seen).completed
        batch = finish(server.client, batch.id)
        assert (batch.status, counts_of(batch).completed) == ("completed", 60)
        assert all_ids(server.client, batch) == ids(60)
        assert server.engine_pid != first
    # Only lines that were with the engine when it died were computed twice.
    assert len(log.read_text().split()) <= 60 + 2 * 4


def test_a_cancelled_batch_leaves_the_engine_to_the_next_one(tmp_path: Path) -> None:
    log = tmp_path / "computed"
    with FrontServer(tmp_path / "batches", "--delay", "0.05", "--log", str(log)) as server:
        batch = submit(server.client, job(400))
        following = submit(server.client, job(8))
        until(
            lambda: server.client.batches.retrieve(batch.id),
            lambda seen: counts_of(seen).completed >= 8,
        )
        server.client.batches.cancel(batch.id)
        cancelled = finish(server.client, batch.id)
        assert all_ids(server.client, cancelled) == ids(400)
        assert finish(server.client, following.id).status == "completed"
        # What was in flight when it was cancelled is all that was computed for nothing.
        assert len(log.read_text().split()) <= counts_of(cancelled).completed + 2 * 4 + 8


def test_lines_that_kill_or_hang_the_engine_are_isolated_and_answered(tmp_path: Path) -> None:
    with FrontServer(tmp_path) as server:
        batch = finish(server.client, submit(server.client, job(20, {7: "die", 13: "hang"})).id)
        assert batch.status == "completed"
        assert all_ids(server.client, batch) == ids(20)
        errors = results(server.client, batch.error_file_id)
        assert set(errors) == {"r7", "r13"}
        assert {error["error"]["code"] for error in errors.values()} == {"engine_crashed"}
        assert server.front.engine.view.restarts >= 3


def test_online_requests_reach_the_engine_and_wait_their_turn_while_there_is_none(
    tmp_path: Path,
) -> None:
    with FrontServer(tmp_path) as server:
        server.wait_until_up()
        answer = server.http.post("/v1/chat/completions", json=CHAT_BODY)
        assert answer.json() == {"pid": server.engine_pid, "body": CHAT_BODY}
        assert server.http.get("/nowhere").status_code == 404
        # One of the engine's own routes reads files by path.
        for path in ("blendserve/jobs", "metrics/../blendserve/jobs", "x/%2e%2e/generate"):
            assert server.http.post(f"/{path}", json={}).status_code in (404, 405)
        server.kill_engine()
        until(lambda: server.front.engine.view.restarts, bool)
        refused = server.http.post("/v1/chat/completions", json=CHAT_BODY)
        if refused.status_code != 200:
            assert refused.status_code == 503
            assert refused.json()["error"]["code"] == "engine_unavailable"
            assert refused.headers["retry-after"]


def test_a_batch_waits_while_the_engine_is_another_one(tmp_path: Path) -> None:
    with FrontServer(tmp_path, "--delay", "0.05") as server:
        batch = submit(server.client, job(60))
        until(
            lambda: server.client.batches.retrieve(batch.id),
            lambda seen: counts_of(seen).completed >= 4,
        )
    with FrontServer(tmp_path, "--fingerprint", "other-model/float16") as server:
        server.wait_until_up()
        paused = until(
            lambda: server.front.service.progress(batch.id),
            lambda seen: "other-model/float16" in (seen.note or ""),
        )
        assert paused.phase == "paused"
    with FrontServer(tmp_path) as server:
        batch = finish(server.client, batch.id)
        assert batch.status == "completed"
        assert all_ids(server.client, batch) == ids(60)


def test_an_engine_that_never_starts_ends_the_front_with_its_status(tmp_path: Path) -> None:
    command = [sys.executable, "-c", "raise SystemExit(3)"]
    with FrontServer(tmp_path, command=command) as server:
        failure = until(lambda: server.front.failure, bool)
    assert failure is not None
    assert failure.status == 3
    assert "ended with status 3 before it served" in str(failure)


def test_an_engine_that_never_serves_is_given_up_and_ended(tmp_path: Path) -> None:
    command = [sys.executable, "-c", "import time; time.sleep(600)"]
    watch = WatchSettings(start_seconds=0.5)
    with FrontServer(tmp_path, command=command, watch=watch) as server:
        failure = until(lambda: server.front.failure, bool)
        pid = server.engine_pid
    assert "did not serve within" in str(failure)
    assert pid is not None
    with pytest.raises(ProcessLookupError):
        os.kill(pid, 0)


def test_no_engine_is_left_behind(tmp_path: Path) -> None:
    with FrontServer(tmp_path) as server:
        server.wait_until_up()
        pid = server.engine_pid
    assert pid is not None
    with pytest.raises(ProcessLookupError):
        os.kill(pid, 0)


# -- keys and tenants

ALICE, BOB, ROOT = "alice-key-0123456789", "bob-key-0123456789", "root-key-0123456789"


@pytest.fixture
def keys(tmp_path: Path) -> ApiKeys:
    path = tmp_path / "keys"
    path.write_text(f"# keys\nalice {ALICE}\nbob {BOB}\n\nops {ROOT} admin\n")
    return ApiKeys.read(path)


def test_tenants_see_their_own_files_and_batches_only(tmp_path: Path, keys: ApiKeys) -> None:
    with FrontServer(tmp_path / "batches", keys=keys) as server:
        alice, bob = server.client_of(ALICE), server.client_of(BOB)
        key = {"Idempotency-Key": "night"}
        batch = finish(alice, submit(alice, job(3), extra_headers=key).id)
        other = finish(bob, submit(bob, job(4), extra_headers=key).id)
        assert other.id != batch.id
        assert [seen.id for seen in alice.batches.list()] == [batch.id]
        assert len(list(bob.files.list())) == 2
        for foreign in (
            lambda: bob.batches.retrieve(batch.id),
            lambda: bob.batches.cancel(batch.id),
            lambda: bob.files.retrieve(batch.input_file_id),
            lambda: bob.files.content(batch.output_file_id or ""),
            lambda: bob.files.delete(batch.input_file_id),
            lambda: bob.batches.create(
                input_file_id=batch.input_file_id, endpoint=CHAT, completion_window="24h"
            ),
        ):
            with pytest.raises(openai.NotFoundError):
                foreign()
        with pytest.raises(openai.BadRequestError):
            bob.batches.list(after=batch.id)
        assert len(results(alice, batch.output_file_id)) == 3


def test_without_a_key_nothing_is_told_and_only_admins_steer_the_engine(
    tmp_path: Path, keys: ApiKeys
) -> None:
    def post(path: str, key: str) -> int:
        headers = {"Authorization": f"Bearer {key}"}
        return server.http.post(path, json=CHAT_BODY, headers=headers).status_code

    with FrontServer(tmp_path / "batches", keys=keys) as server:
        server.wait_until_up()
        for path in ("/v1/batches", "/v1/files", "/blendserve/status", "/v1/models", "/nowhere"):
            assert server.http.get(path).status_code == 401
        with pytest.raises(openai.AuthenticationError) as refused:
            server.client_of("wrong").batches.list()
        assert refused.value.code == "invalid_api_key"
        assert server.http.get("/health").status_code == 200
        assert post("/v1/chat/completions", ALICE) == 200
        assert post("/flush_cache", ALICE) == 403
        assert post("/flush_cache", ROOT) == 200


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("", "holds no key"),
        ("alice\n", "line 1: write `tenant key`"),
        (f"alice {ALICE} boss\n", "line 1: write"),
        (f"al/ice {ALICE}\n", "a tenant's name"),
        ("\nalice short\n", "line 2: a key has at least 16"),
        (f"alice {ALICE}\nbob {ALICE}\n", "line 2: this key stands in the file twice"),
    ],
)
def test_a_bad_key_file_is_refused_with_its_line(tmp_path: Path, text: str, said: str) -> None:
    path = tmp_path / "keys"
    path.write_text(text)
    with pytest.raises(KeyFileError) as refused:
        ApiKeys.read(path)
    assert str(path) in str(refused.value)
    assert said in str(refused.value)
    assert ALICE not in str(refused.value)


def test_a_missing_key_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(KeyFileError, match="nowhere"):
        ApiKeys.read(tmp_path / "nowhere")


def test_keys_are_kept_as_digests() -> None:
    keys = ApiKeys({ALICE: Holder("alice", admin=False)})
    assert keys.holder(ALICE) == Holder("alice", admin=False)
    assert ALICE not in repr(keys.__dict__)
