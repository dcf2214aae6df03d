"""``blendserve batches`` against a server with a fake engine."""

from __future__ import annotations

import json
import sys
import threading
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parents[1] / "batch"))

from collections.abc import Iterator

from batch_fakes import FakeExecutor, counts_of, finish, job, submit, until
from batch_server import BatchServer

from blendserve.cli import main


@pytest.fixture
def server(tmp_path: Path) -> Iterator[BatchServer]:
    with BatchServer(tmp_path / "batches", FakeExecutor()) as running:
        yield running


class Said:
    def __init__(self, status: int, out: str, err: str) -> None:
        self.status, self.out, self.err = status, out, err


@pytest.fixture
def batches(server: BatchServer, capfdbinary: pytest.CaptureFixture[bytes]):
    def run(*arguments: str, url: str = server.url) -> Said:
        capfdbinary.readouterr()
        status = main(["batches", *arguments, "--url", url])
        out, err = capfdbinary.readouterr()
        return Said(status, out.decode(), err.decode())

    return run


def ids(text: str) -> list[str]:
    return sorted(json.loads(line)["custom_id"] for line in text.splitlines())


def test_a_batch_from_its_file_to_its_answers(batches, server, tmp_path: Path) -> None:
    source = tmp_path / "in.jsonl"
    source.write_bytes(job(5, {1: "fail"}))
    made = batches("create", str(source), "--metadata", "n=1")
    assert made.status == 0
    batch_id = made.out.strip()
    waited = batches("wait", batch_id)
    assert waited.status == 1
    assert waited.out == f"{batch_id} is completed, 4 of 5 answered, 1 failed\n"
    shown = batches("show", batch_id)
    assert shown.status == 0
    assert "4 of 5 answered, 1 failed" in shown.out
    assert "n" in shown.out
    answers = tmp_path / "answers.jsonl"
    assert batches("download", batch_id, "-o", str(answers)).status == 0
    assert ids(answers.read_text()) == ["r0", "r2", "r3", "r4"]
    assert ids(batches("download", batch_id, "--kind", "error").out) == ["r1"]
    errors = batches("errors", batch_id)
    assert errors.status == 1
    assert errors.out == "1 x 400, e.g. r1: no\n"
    listed = batches("list")
    assert batch_id in listed.out
    assert json.loads(batches("list", "--json", "--limit", "1").out)["id"]


def test_a_batch_that_runs_gives_what_it_has_and_can_be_followed(batches, server, tmp_path) -> None:
    server.executor.gate = 5
    batch = submit(server.client, job(12, {2: "fail"}))
    until(lambda: counts_of(server.client.batches.retrieve(batch.id)).completed, lambda n: n >= 5)
    partly = batches("download", batch.id)
    assert partly.status == 4
    assert len(ids(partly.out)) >= 5
    assert "in_progress" in partly.err
    assert batches("errors", batch.id).status == 4
    threading.Timer(0.3, lambda: setattr(server.executor, "gate", None)).start()
    whole = batches("download", batch.id, "--follow")
    assert whole.status == 0
    assert ids(whole.out) == sorted({f"r{i}" for i in range(12)} - {"r2"})
    assert len(whole.out.splitlines()) == 11


def test_a_cancelled_batch_and_a_failed_one_say_so(batches, server, tmp_path: Path) -> None:
    server.executor.gate = 0
    batch = submit(server.client, job(3))
    cancelled = batches("cancel", batch.id)
    assert cancelled.status == 0
    finish(server.client, batch.id)
    again = batches("cancel", batch.id)
    assert again.status == 0
    source = tmp_path / "bad"
    source.write_bytes(job(1) + b"{nope\n")
    failed = batches("create", str(source), "--wait")
    assert failed.status == 1
    batch_id = failed.out.split()[0]
    assert "line 2: The line is not valid JSON" in batches("errors", batch_id).out


@pytest.mark.parametrize(
    ("arguments", "status", "said"),
    [
        (("show", "batch_nope"), 2, "No such batch: batch_nope (HTTP 404)"),
        (("create", "/nowhere.jsonl"), 2, "No such file"),
        (("create", __file__), 2, "give --endpoint"),
        (("create", __file__, "--endpoint", "/v1/nope"), 2, "There is no endpoint"),
        (("create", __file__, "--endpoint", "/v1/completions", "--window", "1y"), 2, "window"),
        (("create", __file__, "--metadata", "n"), 2, "write NAME=VALUE"),
        (("download", "batch_nope", "-o", "/"), 2, "No such batch"),
    ],
)
def test_a_mistake_is_one_sentence(batches, arguments, status: int, said: str) -> None:
    found = batches(*arguments)
    assert found.status == status
    assert said in found.err
    assert found.err.startswith("blendserve batches: ")
    assert len(found.err.splitlines()) == 1


@pytest.mark.parametrize(
    "url", ["http://127.0.0.1:9", "127.0.0.1", "http://[", "http://127.0.0.1:9/v1/"]
)
def test_a_server_that_is_not_there(batches, url: str) -> None:
    found = batches("list", url=url)
    assert found.status == (3 if url.startswith("http://127") else 2)
    assert "--url" in found.err
    assert len(found.err.splitlines()) == 1
