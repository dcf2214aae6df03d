"""What a tenant may say to the engine through the front, and what it learns of others."""

from __future__ import annotations

import asyncio
import logging
import os
from collections.abc import AsyncIterator, Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
from batch_fakes import finish, job, submit
from front_server import FrontServer

from blendserve.batch import ApiKeys
from blendserve.batch.keys import Holder, KeyGuard
from blendserve.cli.proxy import without

ALICE, BOB, ROOT = "alice-key-0123456789", "bob-key-0123456789", "root-key-0123456789"
KEYS = {
    ALICE: Holder("alice", admin=False),
    BOB: Holder("bob", admin=False),
    ROOT: Holder("ops", admin=True),
}
CHAT = "/v1/chat/completions"
BODY = {"model": "fake-model", "messages": [{"role": "user", "content": "hi"}]}
SALT = "x-blendserve-cache-salt"
REMOTE = "http://169.254.169.254/a.png"


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[FrontServer]:
    folder = tmp_path_factory.mktemp("front")
    with FrontServer(folder / "b", "--salts", str(folder / "salts"), keys=ApiKeys(KEYS)) as running:
        running.wait_until_up()
        yield running


def post(server: FrontServer, key: str, path: str, body: Any, **more: str) -> httpx.Response:
    headers = {"Authorization": f"Bearer {key}", **more}
    return server.http.post(path, json=body, headers=headers)


def salts(server: FrontServer) -> list[tuple[str, str]]:
    """(path, salt) of what the engine has got so far."""
    text = (server.store.directory.root.parent / "salts").read_text()
    return [(line.split(" ")[0], line.split(" ")[1]) for line in text.splitlines()]


def test_each_tenant_has_a_salt_of_its_own_online_and_in_its_lines(server: FrontServer) -> None:
    for key in (ALICE, BOB, ALICE):
        assert post(server, key, CHAT, BODY, **{SALT: "given-by-the-client"}).status_code == 200
        client = server.client_of(key)
        assert finish(client, submit(client, job(2)).id).status == "completed"
    seen = salts(server)
    online = [salt for path, salt in seen if path == CHAT]
    jobs = [salt for path, salt in seen if path == "/blendserve/jobs"]
    assert online == jobs
    alice, bob, again = online
    assert alice == again != bob
    assert {len(alice), len(bob)} == {32}


def test_a_salt_cannot_be_told_from_a_name_and_needs_a_name() -> None:
    one, other = ApiKeys(KEYS), ApiKeys(KEYS)
    assert one.cache_salt("alice") != other.cache_salt("alice")
    assert one.cache_salt("alice") != one.cache_salt("bob")
    assert one.cache_salt("") == ""


@pytest.mark.parametrize(
    ("path", "body", "param"),
    [
        (CHAT, {**BODY, "rid": "a"}, "rid"),
        (CHAT, {**BODY, "bootstrap_host": "10.0.0.1"}, "bootstrap_host"),
        (CHAT, {**BODY, "priority": 9}, "priority"),
        ("/generate", {"text": "a", "lora_path": "/etc"}, "lora_path"),
        ("/generate", {"text": "a", "session_params": {"id": "x"}}, "session_params"),
        ("/generate", {"text": "a", "image_data": "/etc/passwd"}, "image_data"),
        ("/generate", {"text": "a", "image_data": [REMOTE]}, "image_data"),
        ("/v1/embeddings", {"input": [{"image": REMOTE}]}, "input[0].image"),
        ("/v1/responses", {"input": "a", "previous_response_id": "resp_1"}, "previous_response_id"),
        (
            "/v1/messages",
            {"messages": [{"content": [{"source": {"type": "url", "url": REMOTE}}]}]},
            "messages[0].content[0].source",
        ),
        (
            CHAT,
            {"messages": [{"content": [{"image_url": {"url": "file:///etc/passwd"}}]}]},
            "messages[0].content[0].image_url",
        ),
        (CHAT, {**BODY, "custom_params": {"blendserve_plan": "{}"}}, "custom_params"),
    ],
    ids=str,
)
def test_a_tenant_may_not_steer_the_engine_or_make_it_fetch(
    server: FrontServer, path: str, body: dict[str, Any], param: str
) -> None:
    answer = post(server, ALICE, path, body)
    assert (answer.status_code, answer.json()["error"]["param"]) == (400, param)
    assert post(server, ROOT, path, body).status_code != 400


@pytest.mark.parametrize(
    ("header", "value"),
    [
        ("X-Data-Parallel-Rank", "0"),
        ("x-smg-routing-key", "a"),
        ("X-Override-Rid", "a"),
        ("X-Override-Routed-Dp-Rank", "x"),
        ("x-override-priority", "9"),
    ],
)
def test_a_tenant_may_not_steer_the_engine_by_a_header(
    server: FrontServer, header: str, value: str
) -> None:
    for path in (CHAT, "/generate", "/v1/responses"):
        answers = [
            server.http.post(
                path, json=BODY, headers={"Authorization": f"Bearer {key}", header: value}
            )
            for key in (ALICE, ROOT)
        ]
        assert answers[0].status_code == 400
        fault = answers[0].json()["error"]
        assert (fault["param"], fault["code"]) == (header.lower(), "unsupported_parameter")
        assert answers[1].status_code != 400


@pytest.mark.parametrize(
    ("content", "headers", "status"),
    [
        (b"{", {}, 400),
        (b"[1]", {}, 400),
        (b'{"a":' * 2_000 + b"1" + b"}" * 2_000, {}, 400),
        (b'{"a": NaN}', {}, 400),
        (b"\xff\xfe", {}, 400),
        (b"x", {"Content-Encoding": "gzip"}, 415),
        (b" " * (64 * 1024 * 1024 + 1), {}, 413),
    ],
    ids=["cut", "list", "deep", "nan", "no text", "gzip", "large"],
)
def test_a_tenants_body_is_json_that_can_be_checked(
    server: FrontServer, content: bytes, headers: dict[str, str], status: int
) -> None:
    key = {"Authorization": f"Bearer {ALICE}", "Content-Type": "application/json"}
    answer = server.http.post(CHAT, content=content, headers={**key, **headers})
    assert answer.status_code == status
    assert answer.json()["error"]["message"]


def test_the_engine_gets_what_was_checked_and_keeps_no_answer_of_a_tenant(
    server: FrontServer,
) -> None:
    twice = b'{"messages": [], "rid": null, "n": 1, "n": 2, "cache_salt": "mine"}'
    key = {"Authorization": f"Bearer {ALICE}"}
    got = server.http.post(CHAT, content=twice, headers=key).json()["body"]
    assert got == {"messages": [], "rid": None, "n": 2, "cache_salt": "mine"}
    body = {"input": "a", "store": True}
    assert post(server, ALICE, "/v1/responses", body).json()["body"]["store"] is False
    assert post(server, ROOT, "/v1/responses", body).json()["body"]["store"] is True


def test_what_tenants_may_ask(server: FrontServer) -> None:
    key = {"Authorization": f"Bearer {ALICE}"}
    for path in ("/v1/models/fake-model", "/v1/models/a/b"):
        assert server.http.get(path, headers=key).json() == {"id": path.removeprefix("/v1/models/")}
    for path in ("/v1/responses/resp_1", "/server_info", "/flush_cache", "/get_weights_by_name"):
        assert server.http.get(path, headers=key).status_code == 403


def test_the_engines_key_is_never_told(server: FrontServer) -> None:
    address = server.front.executor.address
    assert address is not None
    answer = server.http.get("/server_info", headers={"Authorization": f"Bearer {ROOT}"})
    stars = "*" * len(address.token)
    assert answer.json() == {"api_key": stars, "command": f"--api-key {stars}"}
    assert address.token not in answer.text


@pytest.mark.parametrize("size", [1, 2, 3, 5, 100])
def test_a_secret_is_found_wherever_it_is_cut(size: int) -> None:
    async def blocks(data: bytes) -> AsyncIterator[bytes]:
        for start in range(0, len(data), size):
            yield data[start : start + size]

    async def read(data: bytes) -> bytes:
        return b"".join([block async for block in without(b"aab", blocks(data))])

    for data in (b"", b"a", b"aa", b"aab", b"aaab", b"xaabaabx", b"aabaa", b"aaaab aa"):
        assert asyncio.run(read(data)) == data.replace(b"aab", b"***")


def test_the_engine_reads_of_the_batch_directory_only(server: FrontServer, tmp_path: Path) -> None:
    address = server.front.executor.address
    assert address is not None
    files = server.store.directory.root / "files"
    (link := files / "link").symlink_to("/etc/passwd")
    job_of = {"job_id": "a", "max_line_bytes": 9, "pending": [[0, 1]]}
    for path in ("/etc/passwd", str(files / ".." / ".." / "salts"), str(link), str(files)):
        answer = httpx.post(
            f"{address.url}/blendserve/jobs", json={**job_of, "path": path}, headers=address.headers
        )
        assert answer.status_code == 403
    link.unlink()


def test_a_websocket_without_a_key_is_closed() -> None:
    async def ask(scope: dict[str, Any]) -> list[str]:
        sent: list[str] = []

        async def send(message: Any) -> None:
            sent.append(message["type"])

        async def app(scope: Any, receive: Any, send: Any) -> None:
            sent.append("served")

        await KeyGuard(app, ApiKeys(KEYS))({"headers": [], **scope}, None, send)  # type: ignore[arg-type]
        return sent

    assert asyncio.run(ask({"type": "websocket", "path": "/v1/realtime"})) == ["websocket.close"]
    assert asyncio.run(ask({"type": "lifespan"})) == ["served"]


@pytest.mark.parametrize(("mode", "warned"), [(0o600, False), (0o640, True), (0o604, True)])
def test_a_keys_file_that_others_can_read_is_named(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, mode: int, warned: bool
) -> None:
    path = tmp_path / "keys"
    path.write_text(f"alice {ALICE}\n")
    os.chmod(path, mode)
    caplog.set_level(logging.WARNING, "blendserve")
    ApiKeys.read(path)
    assert (f"chmod 600 {path}" in caplog.text) is warned
