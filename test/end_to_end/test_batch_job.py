"""A whole job on a real server: the demo's file, with its sharing, a kill and bad lines."""

from __future__ import annotations

import json
import os
import runpy
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import httpx
import pytest
from conftest import ENGINE_FLAGS, MODEL_NAME, Server
from jobs import finish, results, submit
from openai import OpenAI

from blendserve.cli.server_process import free_port

DEMO = Path(__file__).parents[2] / "examples" / "demo_batch.jsonl"
CHAT = "/v1/chat/completions"


@pytest.fixture(scope="module")
def demo_lines() -> list[dict[str, Any]]:
    lines = [json.loads(line) for line in DEMO.open()]
    for line in lines:
        line["body"]["model"] = MODEL_NAME
    return lines


def test_the_demo_job_finds_nearly_all_shared_prefixes_in_the_cache(
    blend: Server, demo_lines: list[dict[str, Any]], model: str
) -> None:
    """In a pool of a tenth of its prompts, and from SGLang's own count of cached tokens."""
    httpx.post(f"{blend.url}/flush_cache").raise_for_status()
    batch = finish(blend.client, submit(blend.client, demo_lines, CHAT))
    assert batch.request_counts is not None
    assert batch.request_counts.completed == len(demo_lines)
    assert batch.usage is not None
    cached = batch.usage.input_tokens_details.cached_tokens
    # What the demo itself compares with: all prompt tokens but those unique in the prefix tree.
    demo = runpy.run_path(str(DEMO.with_name("demo.py")))
    prompts = demo["tokenized_prompts"](demo_lines, model)
    assert cached >= 0.95 * demo["best_cached_tokens"](prompts)


def test_the_servers_metrics_and_status_say_what_the_job_did(
    blend: Server, demo_lines: list[dict[str, Any]]
) -> None:
    batch = submit(blend.client, demo_lines, CHAT)
    seen: dict[str, Any] = {}
    while batch.status not in ("completed", "failed"):
        status = httpx.get(f"{blend.url}/blendserve/status").json()
        if status["jobs"] and status["jobs"][0]["phase"] == "running":
            seen = status
        batch = blend.client.batches.retrieve(batch.id)
    job, dispatch = seen["jobs"][0], seen["dispatch"]
    assert job["job_id"] == batch.id
    assert job["in_flight"] > 0
    assert 0 < job["planned_sharing"] <= job["best_sharing"] < 1
    assert dispatch["pace"] > 0
    assert dispatch["urgent"] == []
    # Both are brought up to date once a second.
    deadline = time.monotonic() + 30
    while not counters_of(blend.url).items() <= (series := blendserve_series(blend.url)).items():
        assert time.monotonic() < deadline, series
        time.sleep(0.2)


def counters_of(url: str) -> dict[str, float]:
    """Some of what GET /blendserve/status says of the scheduler, under the names of the series."""
    scheduler = httpx.get(f"{url}/blendserve/status").json()["schedulers"][0]
    admitted = {
        f'blendserve_admitted_requests_total{{dp_rank="0",side="{side}"}}': float(taken)
        for side, taken in scheduler["taken"].items()
    }
    return admitted | {
        'blendserve_prompt_tokens_total{dp_rank="0"}': float(scheduler["prompt_tokens"]),
        'blendserve_jobs{phase="running"}': 0.0,
    }


def blendserve_series(url: str) -> dict[str, float]:
    """What GET /metrics says of ours."""
    lines = httpx.get(f"{url}/metrics").text.splitlines()
    ours = (line.rpartition(" ") for line in lines if line.startswith("blendserve_"))
    return {name: float(value) for name, _, value in ours}


def test_cancel_keeps_what_is_finished_and_frees_the_engine(
    blend: Server, demo_lines: list[dict[str, Any]]
) -> None:
    long_lines = [
        {**line, "body": {**line["body"], "max_tokens": 2000, "ignore_eos": True}}
        for line in demo_lines
    ]
    batch = submit(blend.client, long_lines, CHAT)
    while batch.status == "validating":
        batch = blend.client.batches.retrieve(batch.id)
    blend.client.batches.cancel(batch.id)
    batch = finish(blend.client, batch)
    assert batch.status == "cancelled"
    lines = {
        **results(blend.client, batch.output_file_id),
        **results(blend.client, batch.error_file_id),
    }
    assert lines.keys() == {line["custom_id"] for line in demo_lines}
    scheduler = httpx.get(f"{blend.url}/blendserve/status").json()["schedulers"][0]
    assert scheduler["queued"] == {"left": 0, "right": 0}


def test_two_batches_run_together_and_cancelling_one_leaves_the_other_alone(
    blend: Server, demo_lines: list[dict[str, Any]]
) -> None:
    def lines(count: int, tokens: int) -> list[dict[str, Any]]:
        forced = {"max_tokens": tokens, "ignore_eos": True}
        return [{**line, "body": {**line["body"], **forced}} for line in demo_lines[:count]]

    endless, other = (submit(blend.client, lines(*size), CHAT) for size in ((40, 2000), (16, 64)))
    deadline = time.monotonic() + 120
    running: set[str] = set()
    while not {endless.id, other.id} <= running:
        assert time.monotonic() < deadline, running
        jobs = httpx.get(f"{blend.url}/blendserve/status").json()["jobs"]
        running = {job["job_id"] for job in jobs if job["phase"] == "running"}
    blend.client.batches.cancel(endless.id)
    assert finish(blend.client, endless).status == "cancelled"
    other = finish(blend.client, other)
    assert other.status == "completed"
    answers = results(blend.client, other.output_file_id)
    assert answers.keys() == {line["custom_id"] for line in demo_lines[:16]}
    lengths = {
        answer["response"]["body"]["usage"]["completion_tokens"] for answer in answers.values()
    }
    assert lengths == {64}


def test_one_poor_line_hurts_nobody_else(blend: Server) -> None:
    def line(custom_id: str, **body: Any) -> dict[str, Any]:
        body = {"model": MODEL_NAME, "max_tokens": 2, "temperature": 0, **body}
        return {"custom_id": custom_id, "method": "POST", "url": CHAT, "body": body}

    def message(text: str) -> list[dict[str, str]]:
        return [{"role": "user", "content": text}]

    lines = [
        line("good", messages=message("Say hello.")),
        line("over-long", messages=message("word " * 9000)),
        line("wrong type", messages=message("Hi."), temperature="warm"),
    ]
    batch = finish(blend.client, submit(blend.client, lines, CHAT))
    assert batch.status == "completed"
    answered = results(blend.client, batch.output_file_id)
    failed = results(blend.client, batch.error_file_id)
    assert answered.keys() == {"good"}
    assert failed.keys() == {"over-long", "wrong type"}
    for answer in failed.values():
        assert answer["error"] is None
        assert 400 <= answer["response"]["status_code"] < 500
    assert "longer than the model's context length" in json.dumps(failed["over-long"])
    assert "temperature" in json.dumps(failed["wrong type"])


@pytest.mark.parametrize(
    ("content", "code", "said"),
    [
        (b"not json\n", "invalid_json_line", "1"),
        (
            b'{"method":"POST","url":"/v1/chat/completions","body":{"messages":[]}}\n',
            "missing_required_parameter",
            "custom_id",
        ),
        (
            b'{"custom_id":"a","method":"POST","url":"/v1/chat/completions",'
            b'"body":{"model":"other","messages":[]}}\n',
            "model_not_found",
            "other",
        ),
        (
            b'{"custom_id":"a","method":"POST","url":"/v1/poems","body":{"model":"test-model"}}\n',
            "invalid_url",
            "/v1/poems",
        ),
    ],
)
def test_a_file_that_cannot_be_run_fails_with_its_line(
    blend: Server, content: bytes, code: str, said: str
) -> None:
    batch = finish(blend.client, submit(blend.client, content, CHAT))
    assert batch.status == "failed"
    assert batch.errors is not None
    assert batch.errors.data is not None
    fault = batch.errors.data[0]
    assert fault.line == 1
    assert fault.code == code
    assert said in f"{fault.line} {fault.message}"


def test_an_unknown_endpoint_is_refused_when_the_batch_is_created(blend: Server) -> None:
    response = httpx.post(
        f"{blend.url}/v1/batches",
        json={"input_file_id": "x", "endpoint": "/v1/poems", "completion_window": "24h"},
    )
    assert response.status_code == 400
    assert "/v1/poems" in response.json()["error"]["message"]


class VictimServer:
    """A server that can be killed without warning, with everything that it started."""

    def __init__(self, command: list[str], port: int, environment: dict[str, str]) -> None:
        self.url = f"http://127.0.0.1:{port}"
        self.process = subprocess.Popen(
            command,
            env={**os.environ, **environment},
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            start_new_session=True,
        )

    def wait_until_serving(self) -> OpenAI:
        while True:
            assert self.process.poll() is None, "the server ended"
            try:
                if httpx.get(f"{self.url}/health", timeout=20).status_code == 200:
                    return OpenAI(base_url=f"{self.url}/v1", api_key="unused", timeout=300)
            except httpx.TransportError:
                pass  # not listening yet
            time.sleep(0.2)

    def kill(self) -> None:
        os.killpg(self.process.pid, signal.SIGKILL)
        self.process.wait()


def test_a_job_survives_kill_9_and_plain_sglang_with_the_plugin_finishes_it(
    model: str, demo_lines: list[dict[str, Any]], tmp_path: Path
) -> None:
    """Also the second way to serve: SGLang's own launcher, switched on by the environment."""
    port = free_port()
    launcher = [sys.executable, "-m", "sglang.launch_server", "--model-path", model]
    command = [*launcher, *ENGINE_FLAGS, "--port", str(port)]
    environment = {"BLENDSERVE_ENABLED": "1", "BLENDSERVE_BATCH_DIR": str(tmp_path / "batches")}

    first = VictimServer(command, port, environment)
    try:
        client = first.wait_until_serving()
        batch = submit(client, demo_lines, CHAT)
        while (counts := batch.request_counts) is None or counts.completed < 20:
            assert batch.status in ("validating", "in_progress"), batch.status
            batch = client.batches.retrieve(batch.id)
    finally:
        first.kill()
    committed = counts.completed
    assert 20 <= committed < len(demo_lines)

    second = VictimServer(command, port, environment)
    try:
        client = second.wait_until_serving()
        batch = finish(client, client.batches.retrieve(batch.id))
        assert batch.status == "completed"
        answers = results(client, batch.output_file_id)
        assert answers.keys() == {line["custom_id"] for line in demo_lines}
        assert batch.error_file_id is None
        scheduler = httpx.get(f"{second.url}/blendserve/status").json()["schedulers"][0]
        assert sum(scheduler["taken"].values()) <= len(demo_lines) - committed
    finally:
        second.kill()
