"""A line with a bad body is answered while the file is checked, and the others run."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from batch_fakes import (
    FakeExecutor,
    chat_line,
    counts_of,
    faults_of,
    finish,
    jsonl,
    results,
    submit,
    until,
)
from batch_server import BatchServer

from blendserve.batch import BatchLimits, EngineUnavailable, LineFault
from blendserve.batch.bodies import body_faults, content_faults, steering_faults
from blendserve.batch.executor import BatchLine
from blendserve.batch.lines import FileLineSource

CHAT = "/v1/chat/completions"
PICTURE = "https://example.org/cat.png"
NESTED: Any = None
for _ in range(300):
    NESTED = [NESTED]


def raw(custom_id: str, body: str) -> bytes:
    return f'{{"custom_id":"{custom_id}","method":"POST","url":"{CHAT}","body":{body}}}'.encode()


def odd_job() -> bytes:
    message = '"messages":[{"role":"user","content":"x"}]'
    return jsonl(
        [
            chat_line("good1"),
            chat_line("stream", stream=True),
            raw("nan", f'{{{message},"temperature":NaN}}'),
            raw("infinite", f'{{{message},"a":{{"b c":[1,-1e400]}}}}'),
            raw("deep", f'{{{message},"x":{"[" * 5_000}{"]" * 5_000}}}'),
            chat_line("nested", metadata=NESTED),
            raw("null", '{"messages":null}'),
            chat_line("rid", rid="1", priority=3),
            raw("half", '{"messages":[{"role":"user","content":"a\\ud83d"}]}'),
            chat_line("good2"),
        ]
    )


EXPECTED = {
    "stream": ("invalid_value", "body.stream"),
    "nan": ("invalid_value", "body.temperature"),
    "infinite": ("invalid_value", "body.a.b c[1]"),
    "deep": ("nesting_too_deep", "body"),
    "nested": ("nesting_too_deep", "body.metadata" + "[0]" * 62 + "["),
    "null": ("missing_required_parameter", "body.messages"),
    "rid": ("unsupported_parameter", "body.rid"),
}


def test_a_bad_body_is_answered_400_on_its_own_line(server: BatchServer) -> None:
    batch = finish(server.client, submit(server.client, odd_job()).id)
    assert batch.status == "completed"
    answers = results(server.client, batch.output_file_id)
    assert sorted(answers) == ["good1", "good2", "half"]
    # Half of a surrogate pair is read as U+FFFD.
    said = answers["half"]["response"]["body"]["choices"][0]["message"]["content"]
    assert said == "\ufffda"
    errors = results(server.client, batch.error_file_id)
    assert sorted(errors) == sorted(EXPECTED)
    for custom_id, line in errors.items():
        assert line["error"] is None
        assert line["response"]["status_code"] == 400
        assert line["response"]["request_id"] == line["id"]
        error = line["response"]["body"]["error"]
        assert (error["code"], error["param"]) == EXPECTED[custom_id]
        assert error["type"] == "invalid_request_error"
        assert error["message"]
    both = errors["rid"]["response"]["body"]["error"]["message"]
    assert "`rid`" in both
    assert "`priority`" in both
    assert sorted(server.executor.computed) == ["good1", "good2", "half"]
    assert (counts_of(batch).completed, counts_of(batch).failed) == (3, 7)


def test_a_file_of_bad_bodies_alone_completes(server: BatchServer) -> None:
    data = jsonl(chat_line(f"r{i}", stream=True) for i in range(3))
    batch = finish(server.client, submit(server.client, data).id)
    assert (batch.status, counts_of(batch).failed) == ("completed", 3)
    assert batch.output_file_id is None
    assert server.executor.computed == []


def test_a_file_that_fails_leaves_no_journal(server: BatchServer) -> None:
    data = jsonl([*(chat_line(f"r{i}", stream=True) for i in range(200)), chat_line("r0")])
    batch = finish(server.client, submit(server.client, data).id)
    assert [fault.code for fault in faults_of(batch)] == ["duplicate_custom_id"]
    assert (batch.output_file_id, batch.error_file_id) == (None, None)
    until(lambda: list(server.store.directory.stored_journal_ids()), lambda ids: not ids)


class EngineGoes(FakeExecutor):
    """Its engine is lost when the line `last` is checked."""

    def check(self, line: BatchLine) -> LineFault | None:
        if line.custom_id == "last":
            raise EngineUnavailable("gone")
        return None


def test_a_check_that_begins_again_answers_no_line_twice(tmp_path: Path) -> None:
    refused = [chat_line(f"r{i}", stream=True) for i in range(600)]
    with BatchServer(tmp_path, EngineGoes(), BatchLimits()) as server:
        batch = submit(server.client, jsonl([*refused, chat_line("last")]))
        journal = server.store.directory.journal(batch.id)
        until(lambda: journal.exists() and len(journal.read_bytes().splitlines()), bool)
        assert server.client.batches.retrieve(batch.id).status == "validating"
    assert len(journal.read_bytes().splitlines()) == 600
    with BatchServer(tmp_path, FakeExecutor(), BatchLimits()) as server:
        batch = finish(server.client, batch.id)
        assert sorted(results(server.client, batch.output_file_id)) == ["last"]
        assert len(results(server.client, batch.error_file_id)) == 600


def test_answers_of_the_check_are_durable_before_the_batch_runs(tmp_path: Path) -> None:
    executor = FakeExecutor()
    executor.gate = 0
    lines = [*(chat_line(f"r{i}", stream=True) for i in range(5)), chat_line("good")]
    with BatchServer(tmp_path, executor, BatchLimits()) as server:
        batch = submit(server.client, jsonl(lines))
        until(
            lambda: server.client.batches.retrieve(batch.id),
            lambda now: now.status == "in_progress" and counts_of(now).failed == 5,
        )
        journal = server.store.directory.journal(batch.id).read_bytes()
        assert len(journal.splitlines()) == 5
    executor.gate = None
    with BatchServer(tmp_path, executor, BatchLimits()) as server:
        batch = finish(server.client, batch.id)
        assert (counts_of(batch).completed, counts_of(batch).failed) == (1, 5)
        assert len(results(server.client, batch.error_file_id)) == 5


STRANGE = "".join(map(chr, (0x85, 0x2028, 0x2029, 0x0B, 0x0C, 0x1C, 0x1D, 0x1E))) + "\u2019é"


def test_results_have_one_line_for_each_request_for_every_reader(server: BatchServer) -> None:
    lines = [
        chat_line(f"a{STRANGE}", f"say {STRANGE}"),
        chat_line(f"b{STRANGE}", f"fail {STRANGE}"),
        chat_line(f"c{STRANGE}", stream=STRANGE),
    ]
    batch = finish(server.client, submit(server.client, jsonl(lines)).id)
    assert batch.output_file_id
    assert batch.error_file_id
    for file_id, wanted in ((batch.output_file_id, ["a"]), (batch.error_file_id, ["b", "c"])):
        content = server.client.files.content(file_id)
        for read in (content.text.splitlines(), list(content.iter_lines())):
            ids = [json.loads(line)["custom_id"] for line in read]
            assert sorted(ids) == [letter + STRANGE for letter in wanted]
    answer = results(server.client, batch.output_file_id)[f"a{STRANGE}"]["response"]["body"]
    assert answer["choices"][0]["message"]["content"] == f"say {STRANGE}"[::-1]


def test_a_body_without_a_model_says_nothing_of_it(tmp_path: Path) -> None:
    path = tmp_path / "in.jsonl"
    path.write_bytes(jsonl([chat_line("a", model=None), chat_line("b")]))
    source = FileLineSource(path, 1 << 20)
    assert "model" not in source.read(0).body
    assert source.read(1).body["model"] == "fake-model"
    source.close()


def content(part: dict[str, Any]) -> dict[str, Any]:
    return {"messages": [{"role": "user", "content": [{"type": "text", "text": "x"}, part]}]}


REMOTE: dict[str, tuple[dict[str, Any], str]] = {
    "picture": (
        content({"type": "image_url", "image_url": {"url": PICTURE}}),
        "body.messages[0].content[1].image_url",
    ),
    "bare": (
        content({"type": "image_url", "image_url": PICTURE}),
        "body.messages[0].content[1].image_url",
    ),
    "file": (
        content({"type": "video_url", "video_url": {"url": "file:///etc/x.mp4"}}),
        "body.messages[0].content[1].video_url",
    ),
    "space": (
        content({"type": "audio_url", "audio_url": {"url": " data:x"}}),
        "body.messages[0].content[1].audio_url",
    ),
    "embedding": ({"input": [{"image": "http://169.254.169.254/a.png"}]}, "body.input[0].image"),
    "video": ({"input": [{"text": "a"}, {"video": "/etc/passwd"}]}, "body.input[1].video"),
    "tool output": (
        {"input": [{"type": "function_call_output", "output": [{"image_url": PICTURE}]}]},
        "body.input[0].output[0].image_url",
    ),
    "file part": (
        {"input": [{"content": [{"type": "input_file", "file_url": PICTURE}]}]},
        "body.input[0].content[0].file_url",
    ),
    "generate": ({"image_data": [["data:,", PICTURE]]}, "body.image_data"),
    "generate dict": ({"audio_data": [{"url": PICTURE}]}, "body.audio_data"),
    "unknown place": ({"x": {"y": [{"image_url": {"url": PICTURE}}]}}, "body.x.y[0].image_url"),
}


@pytest.mark.parametrize("name", REMOTE)
def test_media_are_found_wherever_they_stand(name: str) -> None:
    body, param = REMOTE[name]
    faults = list(content_faults(body))
    assert [(fault.code, fault.param) for fault in faults] == [("remote_url_not_allowed", param)]
    allowed = list(content_faults(body, allow_remote_urls=True))
    is_web = "http" in json.dumps(body)
    assert [fault.code for fault in allowed] == ([] if is_web else ["remote_url_not_allowed"])


@pytest.mark.parametrize(
    "body",
    [
        content({"type": "image_url", "image_url": {"url": "data:image/png;base64,AA", "x": 1}}),
        content({"type": "image_url", "image_url": {"url": "DATA:image/png;base64,AA"}}),
        content({"type": "input_audio", "input_audio": {"data": "AA", "format": "wav"}}),
        {"messages": [], "audio": {"voice": "x", "format": "wav"}},
        {"metadata": {"image": "cat.png"}},
        {"tools": [{"function": {"parameters": {"properties": {"image_url": "string"}}}}]},
        {"response_format": {"json_schema": {"schema": {"examples": [{"video": "a.mp4"}]}}}},
    ],
)
def test_what_nobody_fetches_is_let_through(body: dict[str, Any]) -> None:
    assert list(content_faults(body)) == []


def test_a_claimed_digest_of_media_is_refused() -> None:
    url = {"url": "data:image/png;base64,AA", "content_hash": "sha256:00"}
    (fault,) = content_faults(content({"type": "image_url", "image_url": url}))
    assert fault.code == "unsupported_parameter"


STEERING: list[tuple[dict[str, Any], str]] = [
    *(
        ({name: value}, f"body.{name}")
        for name, value in {
            "rid": "x",
            "request_id": "x",
            "session_params": {"id": "x"},
            "session_id": "x",
            "routed_dp_rank": 0,
            "data_parallel_rank": 0,
            "disagg_prefill_dp_rank": 0,
            "bootstrap_host": "evil.example",
            "bootstrap_port": 1,
            "bootstrap_room": 1,
            "bootstrap_pair_key": "x",
            "decode_tp_size": 1,
            "priority": 10**9,
            "cache_salt": "x",
            "extra_key": "x",
            "lora_path": "/tmp/adapter",
            "lora_id": "x",
            "http_worker_ipc": "ipc:///tmp/x",
            "kv_hints": {},
        }.items()
    ),
    ({"custom_params": {"blendserve_plan": "{}"}}, "body.custom_params"),
    ({"custom_params": {"__req__": 1}}, "body.custom_params"),
    ({"sampling_params": {"custom_params": {"blendserve_plan": 1}}}, "body.custom_params"),
    ({"sampling_params": [{"custom_params": {"blendserve_plan": 1}}]}, "body.custom_params"),
    ({"tools": [{"type": "mcp", "server_url": "http://evil.example"}]}, "body.tools[0]"),
]


@pytest.mark.parametrize(("body", "param"), STEERING, ids=lambda value: str(value)[:50])
def test_what_steers_the_engine_is_refused(body: dict[str, Any], param: str) -> None:
    (fault,) = steering_faults(body)
    assert (fault.code, fault.param) == ("unsupported_parameter", param)


@pytest.mark.parametrize(
    "body",
    [
        {"rid": None, "priority": None, "custom_params": None, "tools": None},
        {"custom_params": {"thinking_budget": 5}},
        {"custom_params": 3, "sampling_params": 7, "tools": [1, {"type": "function"}]},
    ],
)
def test_what_steers_nothing_is_left_alone(body: dict[str, Any]) -> None:
    assert list(steering_faults(body)) == []


@pytest.mark.parametrize("name", ["background", "store", "previous_response_id"])
def test_what_makes_sense_online_only_is_refused_in_responses(name: str) -> None:
    body = {"input": "x", name: "resp_1" if name.endswith("id") else True}
    (fault,) = body_faults("/v1/responses", body, BatchLimits())
    assert fault.param == f"body.{name}"
    assert list(body_faults("/v1/chat/completions", {**body, "messages": [1]}, BatchLimits())) == []
