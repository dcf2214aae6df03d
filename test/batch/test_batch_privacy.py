"""Prompts, answers and keys stay out of the log; requests that hardly come are given up."""

from __future__ import annotations

import contextlib
import logging
import socket
from pathlib import Path

import pytest
from batch_fakes import FakeExecutor, finish, job, submit, until
from batch_server import BatchServer

from blendserve.batch import BatchLimits

SECRET = "the-password-is-swordfish"


def test_no_prompt_reaches_the_log(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.DEBUG, "blendserve")
    prompts = {
        number: f"{order} {SECRET}"
        for number, order in enumerate(("bug", "fail", "unwritable", "silent", "say", "timeout"))
    }
    with BatchServer(tmp_path, FakeExecutor()) as server:
        assert finish(server.client, submit(server.client, job(6, prompts)).id).status
        broken = {0: f"break-the-check {SECRET}"}
        assert finish(server.client, submit(server.client, job(1, broken)).id).status
    assert caplog.records
    assert SECRET not in caplog.text


def drip_and_read(connection: socket.socket, drip: bytes) -> bytes:
    """Sends a little more of the body; what has been answered so far."""
    with contextlib.suppress(TimeoutError):
        connection.sendall(drip)
        return connection.recv(200)
    return b""


@pytest.mark.parametrize("drip", [b"", b" "], ids=["silent", "a byte at a time"])
def test_a_request_that_hardly_comes_is_given_up(tmp_path: Path, drip: bytes) -> None:
    limits = BatchLimits(upload_idle_seconds=0.2)
    with BatchServer(tmp_path, FakeExecutor(), limits) as server:
        host, port = server.url.removeprefix("http://").split(":")
        for path, kind in (("batches", "application/json"), ("files", "multipart/form-data")):
            with socket.create_connection((host, int(port)), timeout=20) as connection:
                head = f"POST /v1/{path} HTTP/1.1\r\nHost: x\r\nContent-Length: 9000\r\n"
                connection.sendall(f"{head}Content-Type: {kind}; boundary=b\r\n\r\n{{".encode())
                connection.settimeout(0.02)
                assert b" 408 " in until(lambda: drip_and_read(connection, drip), bool)
