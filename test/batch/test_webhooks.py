"""Webhooks at the end of batches, read with OpenAI's own client."""

from __future__ import annotations

import base64
import json
import threading
import time
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
from batch_fakes import FakeExecutor, finish, job, submit, until
from batch_server import BatchServer, Clock
from openai import BadRequestError, OpenAI
from openai.types.webhooks import UnwrapWebhookEvent

from blendserve.batch import WebhookError, Webhooks, webhooks

PAUSE = webhooks.pause_seconds
SECRET = "whsec_" + base64.b64encode(b"s" * 32).decode()
KEY = "blendserve_webhook_url"


class Receiver:
    """Takes what comes; the first `failures` get another status."""

    def __init__(self) -> None:
        self.got: list[tuple[bytes, dict[str, str]]] = []
        self.failures: list[int] = []
        receiver = self

        class Handler(BaseHTTPRequestHandler):
            def do_POST(self) -> None:
                body = self.rfile.read(int(self.headers["Content-Length"]))
                receiver.got.append((body, {k.lower(): v for k, v in self.headers.items()}))
                status = receiver.failures.pop(0) if receiver.failures else 204
                self.send_response(status)
                if status == 302:
                    self.send_header("Location", "/elsewhere")
                self.send_header("Content-Length", "0")
                self.end_headers()

            def log_message(self, format: str, *args: object) -> None:
                pass

        self._server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.host = f"127.0.0.1:{self._server.server_port}"
        self.url = f"http://{self.host}/hook"
        self._thread = threading.Thread(target=self._server.serve_forever)
        self._thread.start()

    def close(self) -> None:
        self._server.shutdown()
        self._thread.join(20)
        self._server.server_close()


@pytest.fixture
def receiver() -> Iterator[Receiver]:
    made = Receiver()
    yield made
    made.close()


@pytest.fixture
def secret(tmp_path: Path) -> str:
    path = tmp_path / "secret"
    path.write_text(SECRET + "\n")
    return str(path)


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(webhooks, "_LOOK_SECONDS", 0.01)
    monkeypatch.setattr(webhooks, "pause_seconds", lambda attempts: 0)


def now() -> Clock:
    """OpenAI's client refuses events whose time is far from its own."""
    clock = Clock()
    clock.seconds = float(int(time.time()))
    return clock


def event(receiver: Receiver, number: int = 0) -> UnwrapWebhookEvent:
    """As an application reads it: OpenAI's client checks signature and time."""
    until(lambda: len(receiver.got), lambda count: count > number)
    body, headers = receiver.got[number]
    return OpenAI(api_key="none").webhooks.unwrap(body, headers, secret=SECRET)


def waiting(server: BatchServer) -> object:
    return server.store.outbox.next_notice(2**40)


def test_openais_client_reads_the_event_of_every_kind_of_end(
    tmp_path: Path, receiver: Receiver, secret: str
) -> None:
    hooks = Webhooks.of(receiver.url, secret, "")
    clock = now()
    with BatchServer(tmp_path / "batches", FakeExecutor(), None, clock, hooks) as server:
        done = submit(server.client, job(3, {1: "fail"}))
        assert (event(receiver).type, event(receiver).data.id) == ("batch.completed", done.id)
        failed = submit(server.client, b"{nope\n")
        assert (event(receiver, 1).type, event(receiver, 1).data.id) == ("batch.failed", failed.id)
        server.executor.gate = 0
        cancelled = submit(server.client, job(2))
        server.client.batches.cancel(cancelled.id)
        assert event(receiver, 2).type == "batch.cancelled"
        expired = submit(server.client, job(2), completion_window="30m")
        clock.seconds += 1_801
        server.service.nudge()
        until(lambda: len(receiver.got), lambda count: count == 4)
        assert json.loads(receiver.got[3][0])["type"] == "batch.expired"
        assert json.loads(receiver.got[3][0])["data"] == {"id": expired.id}
        until(lambda: waiting(server), lambda notice: notice is None)
    assert len({headers["webhook-id"] for _, headers in receiver.got}) == 4


def test_it_is_sent_until_the_receiver_has_it_under_one_id(
    tmp_path: Path, receiver: Receiver, secret: str
) -> None:
    # A redirect is no success, and is not followed: it could lead anywhere.
    receiver.failures = [500, 302, 404]
    hooks = Webhooks.of(receiver.url, secret, "")
    with BatchServer(tmp_path / "batches", FakeExecutor(), None, now(), hooks) as server:
        submit(server.client, job(2))
        until(lambda: waiting(server), lambda notice: notice is None and len(receiver.got) > 0)
    assert len(receiver.got) == 4
    assert len({headers["webhook-id"] for _, headers in receiver.got}) == 1
    assert event(receiver, 3).type == "batch.completed"


def test_what_was_not_delivered_is_after_a_restart(
    tmp_path: Path, receiver: Receiver, secret: str
) -> None:
    directory = tmp_path / "batches"
    nobody = Webhooks.of("http://127.0.0.1:9/hook", secret, "")
    with BatchServer(directory, FakeExecutor(), None, now(), nobody) as server:
        batch = submit(server.client, job(2))
        finish(server.client, batch.id)
    hooks = Webhooks.of(receiver.url, secret, "")
    with BatchServer(directory, FakeExecutor(), None, now(), hooks):
        assert event(receiver).data.id == batch.id


@pytest.mark.parametrize("end", ["gone", "late"])
def test_it_is_given_up_where_nobody_wants_it_any_more(
    tmp_path: Path, receiver: Receiver, secret: str, end: str
) -> None:
    clock = now()
    receiver.failures = [410] if end == "gone" else [500] * 10_000
    hooks = Webhooks.of(receiver.url, secret, "")
    with BatchServer(tmp_path / "batches", FakeExecutor(), None, clock, hooks) as server:
        finish(server.client, submit(server.client, job(1)).id)
        if end == "late":
            until(lambda: len(receiver.got), lambda count: count > 2)
            clock.seconds += 80 * 3_600
        until(lambda: waiting(server), lambda notice: notice is None and len(receiver.got) > 0)


def test_a_batch_may_name_an_address_whose_host_is_allowed(
    tmp_path: Path, receiver: Receiver, secret: str
) -> None:
    hooks = Webhooks.of("", secret, f" other.example, {receiver.host}")
    with BatchServer(tmp_path / "batches", FakeExecutor(), None, now(), hooks) as server:
        silent = submit(server.client, job(1))
        finish(server.client, silent.id)
        batch = submit(server.client, job(1), metadata={KEY: receiver.url})
        assert event(receiver).data.id == batch.id
        for address in (
            "http://127.0.0.1:9/hook",
            "http://169.254.169.254/latest/meta-data",
            f"http://user@{receiver.host}/hook",
            f"http://{receiver.host}.example/hook",
            "file:///etc/passwd",
            "not an address",
            "http://[",
            "",
        ):
            with pytest.raises(BadRequestError) as refused:
                submit(server.client, job(1), metadata={KEY: address})
            assert refused.value.param == f"metadata.{KEY}"
    assert len(receiver.got) == 1


@pytest.mark.parametrize(
    ("url", "held", "said"),
    [
        ("https://example.com/hook", None, "--webhook-secret-file"),
        ("ftp://example.com/hook", SECRET, "no address"),
        ("https://example.com/hook", "hunter2", "whsec_"),
        ("https://example.com/hook", "whsec_c2hvcnQ=", "24 bytes"),
        ("https://example.com/hook", "whsec_!", "base64"),
    ],
)
def test_a_setting_that_cannot_be_used_is_told_with_the_remedy(
    tmp_path: Path, url: str, held: str | None, said: str
) -> None:
    path = tmp_path / "secret"
    if held is not None:
        path.write_text(held)
    with pytest.raises(WebhookError, match=said):
        Webhooks.of(url, str(path) if held is not None else "", "")


def test_pauses_grow_up_to_an_hour() -> None:
    pauses = [PAUSE(attempts) for attempts in (0, 3, 9, 10_000)]
    assert 4 <= pauses[0] <= 6
    assert 32 <= pauses[1] <= 48
    assert pauses[2] <= pauses[3] * 1.5 <= 1.5 * 1.2 * 3_600
