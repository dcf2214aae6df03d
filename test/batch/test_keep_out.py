"""Pages of other sites, foreign names, silent and greedy clients: none of them gets through."""

from __future__ import annotations

import contextlib
import socket
from pathlib import Path

import httpx
import pytest
from batch_fakes import job, until
from front_server import FrontServer

from blendserve.batch import KnownHosts
from blendserve.cli import connections, proxy
from blendserve.cli.connections import PatientProtocol

EVIL = {"Origin": "http://evil.example"}
JSON = {"input_file_id": "file-x", "endpoint": "/v1/chat/completions", "completion_window": "24h"}
FORM = {"files": {"file": ("a.jsonl", b"{}")}, "data": {"purpose": "batch"}}


def cors_headers(answer: httpx.Response) -> list[str]:
    return [name for name in answer.headers if name.startswith("access-control-")]


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> object:
    with FrontServer(tmp_path_factory.mktemp("front")) as running:
        running.wait_until_up()
        yield running


# -- other origins and names


@pytest.mark.parametrize("path", ["/v1/files", "/v1/batches", "/v1/files/x", "/v1/models", "/x"])
def test_a_preflight_is_answered_by_us_and_allows_nothing(server: FrontServer, path: str) -> None:
    asked = {"Access-Control-Request-Method": "DELETE", "Access-Control-Request-Headers": "x-a"}
    for headers, status in (({**EVIL, **asked}, 403), (asked, 405)):
        answer = server.http.options(path, headers=headers)
        assert (answer.status_code, cors_headers(answer)) == (status, [])
        assert answer.json()["error"]["message"]
    assert "GET" in answer.headers["allow"]


@pytest.mark.parametrize(
    "headers",
    [
        EVIL,
        {"Origin": "null"},
        {"Origin": "http://127.0.0.1:1"},
        {"Origin": "file://"},
        {"Origin": "http://[::1"},
        {"Sec-Fetch-Site": "cross-site"},
        {"Sec-Fetch-Site": "same-site"},
    ],
    ids=str,
)
def test_a_page_of_another_origin_writes_nothing_and_reads_nothing(
    server: FrontServer, headers: dict[str, str]
) -> None:
    before = server.http.get("/v1/files").json()
    kept = server.client.files.create(file=("a.jsonl", job(1)), purpose="batch").id
    for answer in (
        server.http.post("/v1/files", headers=headers, **FORM),
        server.http.post("/v1/batches", headers=headers, json=JSON),
        server.http.delete(f"/v1/files/{kept}", headers=headers),
        server.http.post("/v1/chat/completions", headers=headers, json={}),
        # Some of the engine's routes that steer it are GET.
        server.http.get("/flush_cache", headers=headers),
    ):
        assert (answer.status_code, answer.json()["error"]["code"]) == (403, "foreign_origin")
        assert cors_headers(answer) == []
    read = server.http.get("/v1/files", headers=headers)
    assert (read.status_code, cors_headers(read)) == (200, [])
    assert read.headers["cross-origin-resource-policy"] == "same-origin"
    server.client.files.delete(kept)
    assert server.http.get("/v1/files").json() == before


def test_our_own_page_and_programs_may_do_all(server: FrontServer) -> None:
    for headers in ({"Origin": server.url, "Sec-Fetch-Site": "same-origin"}, {}):
        answer = server.http.post("/v1/files", headers=headers, **FORM)
        assert answer.status_code == 200
        assert server.http.delete(f"/v1/files/{answer.json()['id']}", headers=headers).is_success
        assert server.http.post("/v1/chat/completions", headers=headers, json={}).is_success
    # A proxy with TLS in front: the page's scheme is another one than ours.
    headers = {"Host": "localhost", "Origin": "https://localhost"}
    assert server.http.post("/v1/batches", headers=headers, json=JSON).status_code == 404


@pytest.mark.parametrize("name", ["evil.example", "127.0.0.1.evil.example", "a b", "[::1", ""])
def test_a_foreign_host_name_is_refused(server: FrontServer, name: str) -> None:
    for path in ("/v1/files", "/blendserve/", "/v1/models", "/health"):
        answer = server.http.get(path, headers={"Host": name})
        assert answer.status_code == 421
        assert "--allowed-hosts" in answer.json()["error"]["message"]


def test_which_names_are_known() -> None:
    hosts = KnownHosts.of("models.example, gpu1.lan.", "batch.internal")
    known = ("models.example", "gpu1.lan", "batch.internal", socket.gethostname().lower())
    for name in (*known, "localhost", "a.localhost", "127.0.0.1", "10.0.0.7", "::1"):
        assert hosts.knows(name)
    for name in ("evil.example", "models.example.evil.example", "notlocalhost", "1.2.3"):
        assert not hosts.knows(name)
    assert KnownHosts.of("*", "").knows("evil.example")


# -- our routes are ours


def test_no_route_of_ours_is_ever_the_engines(server: FrontServer) -> None:
    for method, path, allowed in (
        ("PUT", "/v1/files", "GET, HEAD, POST"),
        ("DELETE", "/v1/batches/x", "GET, HEAD"),
        ("GET", "/v1/batches/x/cancel", "POST"),
        ("POST", "/blendserve/status", "GET, HEAD"),
        ("POST", "/blendserve/live", "GET, HEAD"),
    ):
        answer = server.http.request(method, path)
        assert (answer.status_code, answer.headers["allow"]) == (405, allowed)
        assert answer.json()["error"]["code"] == "method_not_allowed"
    for path in ("/v1/files/x/y", "/v1/batches/x/y", "/blendserve/jobs", "/blendserve/engine"):
        answer = server.http.get(path)
        assert (answer.status_code, answer.json()["error"]["code"]) == (404, "not_found")


def test_trailing_slashes_and_head_work(server: FrontServer) -> None:
    assert server.http.get("/v1/files/").json() == server.http.get("/v1/files").json()
    assert server.http.post("/v1/batches/", json=JSON).status_code == 404
    assert server.http.get("/blendserve/status/").status_code == 200
    head = server.http.head("/v1/files")
    assert (head.status_code, head.content) == (200, b"")
    assert head.headers["content-length"] == str(len(server.http.get("/v1/files").content))


def test_no_header_of_one_hop_goes_to_the_next(server: FrontServer) -> None:
    answer = server.http.get(
        "/headers", headers={"Connection": "keep-alive, X-Mine", "X-Mine": "1", "X-Other": "2"}
    )
    seen = answer.json()
    assert "x-other" in seen
    assert not {"x-mine", "host-of-the-front"} & seen.keys()
    assert "x-hop" not in answer.headers
    assert len(answer.headers.get_list("date")) == len(answer.headers.get_list("server")) == 1


def test_live_and_ready_tell_of_the_front_and_of_the_engine(tmp_path: Path) -> None:
    with FrontServer(tmp_path) as server:
        server.wait_until_up()
        assert server.http.get("/blendserve/ready").status_code == 200
        server.kill_engine()
        until(lambda: server.front.engine.view.restarts, bool)
        assert server.http.get("/blendserve/live").status_code == 200
        answer = server.http.get("/blendserve/ready")
        if answer.status_code != 200:
            assert (answer.status_code, answer.headers["retry-after"]) == (503, "5")
        until(lambda: server.http.get("/blendserve/ready").status_code, lambda seen: seen == 200)


# -- silent and greedy clients


def connect(server: FrontServer) -> socket.socket:
    host, port = server.url.removeprefix("http://").split(":")
    return socket.create_connection((host, int(port)), timeout=20)


@pytest.mark.parametrize("sent", [b"", b"GET /v1/files HTTP/1.1\r\nHost: localhost\r\nX: "])
def test_a_connection_without_a_request_is_closed(
    server: FrontServer, monkeypatch: pytest.MonkeyPatch, sent: bytes
) -> None:
    monkeypatch.setattr(PatientProtocol, "head_seconds", 0.2)
    with connect(server) as silent:
        silent.sendall(sent)
        assert silent.recv(1) == b""
    with connect(server) as second:
        # The one after an answer, too.
        second.sendall(b"GET /blendserve/live HTTP/1.1\r\nHost: localhost\r\n\r\nGET /")
        assert b" 200 " in second.recv(4_000)
        until(lambda: second.recv(4_000), lambda seen: seen == b"")


def test_a_slow_answer_is_not_taken_for_silence(
    server: FrontServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(PatientProtocol, "head_seconds", 0.2)
    assert server.http.get("/slow").json() == {"slept": 0.6}


def test_a_request_to_the_engine_that_falls_silent_is_given_up(
    server: FrontServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(proxy, "_IDLE_SECONDS", 0.2)
    head = b"POST /v1/chat/completions HTTP/1.1\r\nHost: localhost\r\nContent-Length: 900\r\n\r\n{"
    with connect(server) as silent:
        silent.sendall(head)
        assert b" 408 " in silent.recv(4_000)
    with connect(server) as gone:
        gone.sendall(head)
    assert server.http.post("/v1/chat/completions", json={"a": 1}).is_success


def test_an_upload_takes_a_file_on_disk_only_once_its_file_begins(server: FrontServer) -> None:
    drafts = server.store.directory.root / "tmp"
    head = b"POST /v1/files HTTP/1.1\r\nHost: localhost\r\nContent-Length: 9000\r\n"
    head += b"Content-Type: multipart/form-data; boundary=B\r\n\r\n"
    part = b'--B\r\nContent-Disposition: form-data; name="file"; filename="a"\r\n\r\n{"a'
    with connect(server) as begun:
        begun.sendall(head + b"--B\r\n")
        assert server.http.get("/v1/files").status_code == 200
        assert list(drafts.iterdir()) == []
        begun.sendall(part)
    until(lambda: list(drafts.iterdir()), lambda left: left == [])


def send_form(server: FrontServer, blocks: list[bytes]) -> bytes:
    """The answer to a form, which may come before all of it has been taken."""
    size = sum(map(len, blocks))
    with connect(server) as client:
        client.sendall(
            b"POST /v1/files HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n"
            b"Content-Type: multipart/form-data; boundary=B\r\n"
            b"Content-Length: %d\r\n\r\n" % size
        )
        answer = b""
        with contextlib.suppress(BrokenPipeError, ConnectionResetError):
            for block in blocks:
                client.sendall(block)
        with contextlib.suppress(ConnectionResetError):
            while block := client.recv(4_000):
                answer += block
        return answer


FILE_PART = b'--B\r\nContent-Disposition: form-data; name="file"; filename="a"\r\n\r\n{}\r\n'
FIELD = b'--B\r\nContent-Disposition: form-data; name="x"\r\n\r\ny\r\n'


@pytest.mark.parametrize(
    ("blocks", "said"),
    [
        ([FILE_PART + b"--B--\r\n", *[b"x" * (1 << 20)] * 8], b"beside its file"),
        ([b"x" * (1 << 20)] * 8, b"invalid_form"),
        ([FIELD * 20_000], b"too many parts"),
    ],
    ids=["after the last boundary", "no boundary", "one name again and again"],
)
def test_what_stands_beside_the_file_is_bounded(
    server: FrontServer, blocks: list[bytes], said: bytes
) -> None:
    answer = send_form(server, blocks)
    assert said in answer or answer == b"", answer
    assert server.http.get("/v1/files").status_code == 200


def test_the_descriptor_limit_is_raised_to_what_the_system_allows(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    raised: list[tuple[int, int]] = []
    resource = connections.resource
    monkeypatch.setattr(resource, "getrlimit", lambda _: (1_024, 4_096))
    monkeypatch.setattr(resource, "setrlimit", lambda _, limits: raised.append(limits))
    assert connections.raise_descriptor_limit() == (4_096 - 128) // 2
    assert raised == [(4_096, 4_096)]
