"""Every bad input has its code and its message, and a client's fault is never a 500."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

import httpx
import openai
import pytest
from batch_fakes import CHAT, FakeExecutor, chat_line, faults_of, finish, job, jsonl, submit
from batch_server import BatchServer

from blendserve.batch import BatchLimits
from blendserve.batch.refusals import RefusedLine
from blendserve.batch.validation import ValidationStopped, Verdict, validate_file


def without(line: dict[str, Any], name: str) -> dict[str, Any]:
    return {key: value for key, value in line.items() if key != name}


def with_body(**changes: Any) -> dict[str, Any]:
    line = chat_line("b")
    body = {**line["body"], **changes}
    return {**line, "body": {key: value for key, value in body.items() if value is not ...}}


def image(url: str) -> list[dict[str, Any]]:
    part = {"type": "image_url", "image_url": {"url": url}}
    return [{"role": "user", "content": [part]}]


GOOD = chat_line("a")
LINE = chat_line("b")

# (second line of the file, code, a part of the message, param)
BAD_LINES: dict[str, tuple[Any, str, str, str | None]] = {
    "not JSON": (b"{nope", "invalid_json_line", "not valid JSON", None),
    "cut off": (b'{"custom_id": "b"', "invalid_json_line", "not valid JSON", None),
    "an array": ([1], "invalid_json_line", "not an object", None),
    "a number": (b"17", "invalid_json_line", "not an object", None),
    "not UTF-8": (b'{"custom_id": "\xff"}', "invalid_json_line", "not UTF-8", None),
    "NaN as custom_id": (
        b'{"custom_id": NaN, "method": "POST", "url": "%s", "body": {}}' % CHAT.encode(),
        "invalid_type",
        "a string",
        "custom_id",
    ),
    "nan": (b'{"custom_id": nan}', "invalid_json_line", "column 15", None),
    "too deep": (b"[" * 1_500, "invalid_json_line", "not valid JSON", None),
    "too long": (chat_line("b", "x" * 3_000), "line_too_long", "at most 2000", None),
    "no custom_id": (
        without(LINE, "custom_id"),
        "missing_required_parameter",
        "custom_id is missing",
        "custom_id",
    ),
    "empty custom_id": ({**LINE, "custom_id": ""}, "invalid_type", "not empty", "custom_id"),
    "number custom_id": ({**LINE, "custom_id": 7}, "invalid_type", "a string", "custom_id"),
    "duplicate custom_id": (GOOD, "duplicate_custom_id", "line 1", "custom_id"),
    "no method": (
        without(LINE, "method"),
        "missing_required_parameter",
        "method is missing",
        "method",
    ),
    "wrong method": ({**LINE, "method": "GET"}, "invalid_method", '"POST"', "method"),
    "no url": (without(LINE, "url"), "missing_required_parameter", "url is missing", "url"),
    "number url": ({**LINE, "url": 5}, "invalid_type", "a string", "url"),
    "other url": ({**LINE, "url": "/v1/completions"}, "url_mismatch", "endpoint is", "url"),
    "unknown url": ({**LINE, "url": "/v1/chat"}, "invalid_url", "no endpoint", "url"),
    "no body": (without(LINE, "body"), "missing_required_parameter", "body is missing", "body"),
    "list body": ({**LINE, "body": []}, "invalid_type", "an object", "body"),
    "unknown field": ({**LINE, "boddy": {}}, "unknown_parameter", "'boddy'", "boddy"),
    "second model": (with_body(model="other-model"), "model_mismatch", "one model", "body.model"),
    "a custom_id with half a pair": (
        b'{"custom_id": "b\\ud83d", "method": "POST", "url": "%s", "body": {}}' % CHAT.encode(),
        "invalid_value",
        "surrogate",
        "custom_id",
    ),
}

# The same for what is wrong inside a body.
BAD_BODIES: dict[str, tuple[Any, str, str, str | None]] = {
    "number model": (with_body(model=3), "invalid_type", "a string", "body.model"),
    "empty model": (with_body(model=""), "invalid_type", "not empty", "body.model"),
    "no messages": (
        with_body(messages=...),
        "missing_required_parameter",
        "messages is missing",
        "body.messages",
    ),
    "text messages": (with_body(messages="hi"), "invalid_type", "a list", "body.messages"),
    "empty messages": (with_body(messages=[]), "invalid_value", "empty", "body.messages"),
    "stream": (with_body(stream=True), "invalid_value", "cannot stream", "body.stream"),
    "n = 0": (with_body(n=0), "invalid_value", "from 1", "body.n"),
    "n = 1000": (with_body(n=1_000), "invalid_value", "exceed 128", "body.n"),
    "half an n": (with_body(n=1.5), "invalid_value", "whole number", "body.n"),
    "true n": (with_body(n=True), "invalid_value", "whole number", "body.n"),
    "text n": (with_body(n="2"), "invalid_value", "whole number", "body.n"),
    "max_tokens": (with_body(max_tokens=-1), "invalid_value", "from 0", "body.max_tokens"),
    "remote image": (
        with_body(messages=image("https://example.org/cat.png")),
        "remote_url_not_allowed",
        "data: URL",
        "body.messages[0].content[0].image_url",
    ),
    "image on the server's disk": (
        with_body(messages=image("/etc/passwd.png")),
        "remote_url_not_allowed",
        "data: URL",
        "body.messages[0].content[0].image_url",
    ),
    "too many tokens": (chat_line("b", "too-long"), "token_limit_exceeded", "4096", "body"),
    "a line that breaks the check": (
        chat_line("b", "break-the-check"),
        "invalid_request",
        "TypeError",
        "body",
    ),
}


def verdict(tmp_path: Path, data: bytes, **limits: Any) -> tuple[Verdict, list[RefusedLine]]:
    path = tmp_path / "input.jsonl"
    path.write_bytes(data)
    refused: list[RefusedLine] = []
    found = validate_file(
        path, CHAT, FakeExecutor(), BatchLimits(**limits), lambda: False, refused.append
    )
    assert found.refused == len(refused)
    return found, refused


@pytest.mark.parametrize("name", BAD_LINES)
def test_a_bad_line_is_named_with_its_code_and_place(tmp_path: Path, name: str) -> None:
    line, code, part, param = BAD_LINES[name]
    data = jsonl([GOOD, line, chat_line("c")])
    found, refused = verdict(tmp_path, data, max_line_bytes=2_000)
    assert [(fault.line, fault.code, fault.param) for fault in found.faults] == [(2, code, param)]
    assert part in found.faults[0].message
    assert found.total == 3
    assert refused == []


@pytest.mark.parametrize("name", BAD_BODIES)
def test_a_bad_body_is_its_lines_own_matter(tmp_path: Path, name: str) -> None:
    line, code, part, param = BAD_BODIES[name]
    found, refused = verdict(tmp_path, jsonl([GOOD, line, chat_line("c")]))
    assert (found.total, found.faults) == (3, [])
    assert [(one.index, one.number, one.custom_id) for one in refused] == [(1, 2, "b")]
    assert [(fault.code, fault.param) for fault in refused[0].faults] == [(code, param)]
    assert part in refused[0].faults[0].message


@pytest.mark.parametrize(
    "line",
    [
        with_body(model=...),
        with_body(model=None),
        with_body(max_tokens=8.0, n=1.0),
        with_body(max_tokens="8"),
        with_body(temperature="warm"),
    ],
    ids=["no model", "null model", "8.0", "text for a number", "a wrong type"],
)
def test_what_the_engine_takes_or_refuses_itself_is_left_to_it(tmp_path: Path, line: Any) -> None:
    found, refused = verdict(tmp_path, jsonl([GOOD, line]))
    assert (found.faults, refused, found.model) == ([], [], "fake-model")


@pytest.mark.parametrize(
    ("data", "code"),
    [
        (b"", "empty_file"),
        (b"\n \r\n\n", "empty_file"),
        (b"\xef\xbb\xbf", "empty_file"),
        (job(3).decode().encode("utf-16"), "invalid_encoding"),
        (jsonl([with_body(model="gpt-9")]), "model_not_found"),
        (job(301), "too_many_tasks"),
    ],
    ids=["empty", "blank", "only a BOM", "UTF-16", "unknown model", "too many"],
)
def test_a_bad_file_fails_the_batch(server: BatchServer, data: bytes, code: str) -> None:
    batch = finish(server.client, submit(server.client, data).id)
    assert batch.status == "failed"
    assert batch.failed_at is not None
    assert batch.in_progress_at is None
    assert [error.code for error in faults_of(batch)] == [code]
    assert (batch.output_file_id, batch.error_file_id) == (None, None)
    assert server.executor.computed == []


def test_all_bad_lines_are_listed_up_to_a_cap_that_tells_the_rest(server: BatchServer) -> None:
    lines = [b"{" if number % 2 else chat_line(f"r{number}") for number in range(80)]
    batch = finish(server.client, submit(server.client, jsonl(lines)).id)
    listed = faults_of(batch)
    assert [error.line for error in listed[:20]] == list(range(2, 41, 2))
    assert (listed[20].code, listed[20].line) == ("more_errors", None)
    assert "and 20 more" in (listed[20].message or "")
    assert len(listed) == 21


def test_one_line_may_have_several_faults(tmp_path: Path) -> None:
    line = {"custom_id": "x", "url": "/v1/completions", "id": 1, "body": {"stream": True}}
    found, _ = verdict(tmp_path, jsonl([line]))
    assert {fault.code for fault in found.faults} == {
        "missing_required_parameter",
        "url_mismatch",
        "unknown_parameter",
    }
    assert {fault.param for fault in found.faults} == {"method", "url", "id"}


def test_line_numbers_count_blank_lines(tmp_path: Path) -> None:
    found, _ = verdict(tmp_path, jsonl([b"", GOOD, b"", b"{"]))
    assert [fault.line for fault in found.faults] == [4]
    assert found.total == 2


def test_validation_stops_when_told_to(tmp_path: Path) -> None:
    path = tmp_path / "input.jsonl"
    path.write_bytes(job(3))
    with pytest.raises(ValidationStopped):
        validate_file(path, CHAT, FakeExecutor(), BatchLimits(), lambda: True, lambda _: None)


def assert_error(response: httpx.Response, status: int, code: str | None, part: str) -> None:
    assert response.status_code == status, response.text
    error = response.json()["error"]
    assert set(error) == {"message", "type", "param", "code"}
    assert error["code"] == code
    assert part in error["message"]
    assert error["type"] == "invalid_request_error"


BATCH = {"input_file_id": "FILE", "endpoint": CHAT, "completion_window": "24h"}
NO_FILE = "file-" + "0" * 32

BAD_BATCHES: dict[str, tuple[Any, int, str | None, str]] = {
    "not JSON": (b"{", 400, "invalid_json", "not valid JSON"),
    "not UTF-8": (b'"\xff"', 400, None, "parsing the body"),
    "no body": (b"", 400, "missing_required_parameter", ""),
    "a list": ([], 400, "invalid_value", ""),
    "nothing": ({}, 400, "missing_required_parameter", "input_file_id"),
    "number file": ({**BATCH, "input_file_id": 1}, 400, "invalid_value", "input_file_id"),
    "no such file": ({**BATCH, "input_file_id": NO_FILE}, 404, "not_found", NO_FILE),
    "path as file": ({**BATCH, "input_file_id": "../lock"}, 404, "not_found", "../lock"),
    "endpoint": ({**BATCH, "endpoint": "/v1/images"}, 400, "invalid_endpoint", "/v1/images"),
    "window": ({**BATCH, "completion_window": "24"}, 400, "invalid_value", "m, h or d"),
    "no window": ({**BATCH, "completion_window": "0h"}, 400, "invalid_value", "m, h or d"),
    "long window": ({**BATCH, "completion_window": "9999d"}, 400, "invalid_value", "365d"),
    "unknown field": ({**BATCH, "windwo": 1}, 400, "unknown_parameter", "windwo"),
    "metadata type": ({**BATCH, "metadata": {"a": 1}}, 400, "invalid_value", "metadata.a"),
    "metadata pairs": (
        {**BATCH, "metadata": {str(i): "" for i in range(17)}},
        400,
        "invalid_value",
        "metadata",
    ),
    "metadata key": ({**BATCH, "metadata": {"k" * 65: ""}}, 400, "invalid_value", "metadata"),
    "metadata value": (
        {**BATCH, "metadata": {"k": "v" * 513}},
        400,
        "invalid_value",
        "metadata.k",
    ),
    "short life": (
        {**BATCH, "output_expires_after": {"anchor": "created_at", "seconds": 60}},
        400,
        "invalid_value",
        "output_expires_after.seconds",
    ),
    "other anchor": (
        {**BATCH, "output_expires_after": {"anchor": "now", "seconds": 3_600}},
        400,
        "invalid_value",
        "output_expires_after.anchor",
    ),
    "huge": (b'{"x": "' + b"x" * 300_000 + b'"}', 413, "body_too_large", "larger than"),
}


def test_bad_batch_requests(server: BatchServer) -> None:
    file = server.client.files.create(file=("a.jsonl", job(1)), purpose="batch")
    for name, (body, status, code, part) in BAD_BATCHES.items():
        data = body if isinstance(body, bytes) else json.dumps(body).encode()
        response = server.http.post(
            "/v1/batches",
            content=data.replace(b"FILE", file.id.encode()),
            headers={"Content-Type": "application/json"},
        )
        try:
            assert_error(response, status, code, part)
        except AssertionError as error:
            raise AssertionError(name) from error
    assert list(server.client.batches.list()) == []


def test_bad_uploads(server: BatchServer) -> None:
    def post(data: dict[str, str], files: Any) -> httpx.Response:
        return server.http.post("/v1/files", data=data, files=files)

    def post_raw(**content: Any) -> httpx.Response:
        return server.http.post("/v1/files", **content)

    good = {"file": ("a.jsonl", job(1))}
    batch = {"purpose": "batch"}
    assert_error(post({}, good), 400, "missing_required_parameter", "purpose")
    assert_error(post({"purpose": "vision"}, good), 400, "invalid_purpose", "vision")
    assert_error(post(batch, {"file": ("a.txt", b"{}")}), 400, "invalid_file_format", "a.txt")
    assert_error(
        post(batch, {"other": ("a.jsonl", b"{}")}), 400, "missing_required_parameter", "file"
    )
    assert_error(
        post(batch, [("file", ("a.jsonl", b"{}")), ("file", ("b.jsonl", b"{}"))]),
        400,
        "invalid_form",
        "one file",
    )
    assert_error(
        post(batch, {"file": ("a.jsonl", b"x" * 400_001)}), 400, "file_too_large", "400000"
    )
    assert_error(
        post({**batch, "expires_after[seconds]": "many"}, good), 400, "invalid_value", "3600"
    )
    assert_error(post({"purpose": "x" * 5_000}, good), 400, "invalid_form", "longer than")
    assert_error(
        server.http.post("/v1/files", json={"a": 1}), 400, "invalid_content_type", "multipart"
    )
    form = {"Content-Type": "multipart/form-data; boundary=cut"}
    assert_error(
        server.http.post("/v1/files", content=b"rubbish", headers=form), 400, "invalid_form", ""
    )
    assert_error(post_raw(content=b"", headers=form), 400, "invalid_form", "")
    cut = b'--cut\r\nContent-Disposition: form-data; name="file"; filename="a.jsonl"\r\n\r\n{}'
    assert_error(
        server.http.post("/v1/files", content=cut, headers=form), 400, "invalid_form", "boundary"
    )
    assert list(server.client.files.list()) == []
    root = server.store.directory.root
    assert not [*(root / "tmp").iterdir(), *(root / "files").iterdir()]


@pytest.mark.parametrize("size", [400_001, 3_000_000])
def test_the_sdk_learns_that_its_file_is_too_large(server: BatchServer, size: int) -> None:
    with pytest.raises(openai.BadRequestError) as refused:
        server.client.files.create(file=("big.jsonl", b"x" * size), purpose="batch")
    assert refused.value.code == "file_too_large"


STRANGE_IDS = [
    "..%2F..%2Flock",
    "%2e%2e%2fblendserve.db",
    "..",
    "file-" + "0" * 31,
    "file-" + "0" * 33,
    "file-" + "0" * 32 + "%0A",
    "file-" + "0" * 32 + "%00",
    "FILE-" + "0" * 32,
    "file-" + "g" * 32,
    "batch_" + "0" * 32,
    "file-" + "%D9%A0" * 32,
    "' OR 1=1 --",
    "x" * 4_000,
]


def test_strange_ids_are_not_found(server: BatchServer) -> None:
    for identifier in STRANGE_IDS:
        for method, path in [
            ("GET", f"/v1/files/{identifier}"),
            ("GET", f"/v1/files/{identifier}/content"),
            ("DELETE", f"/v1/files/{identifier}"),
            ("GET", f"/v1/batches/{identifier}"),
            ("POST", f"/v1/batches/{identifier}/cancel"),
        ]:
            response = server.http.request(method, path)
            # httpx itself resolves "..", which may end on a route with another method.
            assert response.status_code in ((404, 405) if identifier == ".." else (404,)), path


@pytest.mark.parametrize(
    "query",
    [
        "files?limit=0",
        "files?limit=10001",
        "files?limit=x",
        "files?order=up",
        "batches?limit=101",
        f"files?after={NO_FILE}",
        "files?after=../x",
        "batches?after=nope",
    ],
)
def test_bad_list_queries(server: BatchServer, query: str) -> None:
    response = server.http.get(f"/v1/{query}")
    assert response.status_code == 400
    assert response.json()["error"]["param"] in {"limit", "order", "after"}


def test_a_file_name_never_reaches_a_path_or_a_header(server: BatchServer) -> None:
    name = '../../etc/x"\r\nSet-Cookie: a=b;.jsonl'
    file = server.client.files.create(file=(name, job(1)), purpose="batch")
    assert "/" not in file.filename
    response = server.client.files.content(file.id).response
    assert "set-cookie" not in response.headers
    stored = [path.name for path in (server.store.directory.root / "files").iterdir()]
    assert stored == [hashlib.sha256(job(1)).hexdigest()]


def test_a_bad_idempotency_key_is_refused(server: BatchServer) -> None:
    file = server.client.files.create(file=("a.jsonl", job(1)), purpose="batch")
    response = server.http.post(
        "/v1/batches",
        json={**BATCH, "input_file_id": file.id},
        headers={"Idempotency-Key": "k" * 256},
    )
    assert_error(response, 400, "invalid_idempotency_key", "255")


def test_the_output_of_one_batch_is_not_the_input_of_another(server: BatchServer) -> None:
    batch = finish(server.client, submit(server.client, job(1)).id)
    with pytest.raises(openai.BadRequestError) as refused:
        server.client.batches.create(
            input_file_id=batch.output_file_id or "none", endpoint=CHAT, completion_window="24h"
        )
    assert refused.value.code == "invalid_file_purpose"


@pytest.mark.parametrize(
    ("url", "meant"),
    [
        ("/chat/completions", CHAT),
        (f"{CHAT}/", CHAT),
        (f"https://api.example.org{CHAT}", CHAT),
        ("v1/chat/completions", CHAT),
        ("/v1/chat/completion", CHAT),
        ("/v1/embedding", "/v1/embeddings"),
        ("/rerank", "/v1/rerank"),
    ],
)
def test_a_url_that_is_nearly_right_is_told_the_right_one(
    tmp_path: Path, url: str, meant: str
) -> None:
    found, _ = verdict(tmp_path, jsonl([GOOD, {**LINE, "url": url}]))
    assert f"Did you mean {meant!r}?" in found.faults[0].message


def test_a_url_like_no_other_gets_no_guess(tmp_path: Path) -> None:
    found, _ = verdict(tmp_path, jsonl([GOOD, {**LINE, "url": "/v2/images"}]))
    assert "Did you mean" not in found.faults[0].message


def test_where_urls_may_differ_each_line_is_checked_by_its_own(tmp_path: Path) -> None:
    lines = [
        GOOD,
        {**LINE, "custom_id": "p", "url": "/v1/completions", "body": {"prompt": "fine"}},
        {**LINE, "custom_id": "e", "url": "/v1/embeddings"},
        {**LINE, "custom_id": "s", "url": "/v1/score", "body": {"items": ["not served"]}},
    ]
    found, refused = verdict(tmp_path, jsonl(lines), mixed_endpoints=True)
    assert found.faults == []
    assert [(line.custom_id, line.faults[0].code) for line in refused] == [
        ("e", "missing_required_parameter"),
        ("s", "invalid_endpoint"),
    ]


def test_where_urls_may_differ_a_file_of_which_none_is_served_fails(tmp_path: Path) -> None:
    line = {**LINE, "url": "/v1/score", "body": {"items": ["not served"]}}
    found, _ = verdict(tmp_path, jsonl([line]), mixed_endpoints=True)
    assert [fault.code for fault in found.faults] == ["invalid_endpoint"]
