"""Odd lines among plain ones: each is answered on its own line, and nothing else is hurt."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import httpx
import odd_lines
import pytest
from conftest import ENGINE_FLAGS, MODEL_NAME, Server
from jobs import finish, results, submit
from odd_lines import CHAT, COMPLETIONS, EMBEDDINGS, RESPONSES, Body

# All of them take minutes: of each endpoint, every so many.
STRIDES = {CHAT: 4, COMPLETIONS: 4, RESPONSES: 2, EMBEDDINGS: 1}
PLAIN_EVERY = 4
READY = "The server is fired up and ready"


def plain(url: str, number: int) -> Body:
    """A line that must be answered. Some sample in a way that a neighbour's fault would break."""
    text = f"Say {number}."
    if url == EMBEDDINGS:
        return {"model": MODEL_NAME, "input": text}
    if url == RESPONSES:
        return {"model": MODEL_NAME, "input": text, "max_output_tokens": 12}
    body: Body = {"model": MODEL_NAME, "max_tokens": 12, "top_k": 50 if number % 2 else -1}
    if url == CHAT:
        return {**body, "messages": [{"role": "user", "content": text}]}
    return {**body, "prompt": text}


def job(url: str) -> tuple[bytes, set[str], set[str]]:
    """A file of odd and plain lines, and the ids of each."""
    bodies = [
        *({"model": MODEL_NAME, "max_tokens": 4, **body} for body in odd_lines.DEADLY[url]),
        *odd_lines.bodies(url, MODEL_NAME)[:: STRIDES[url]],
    ]
    lines: list[dict[str, Any]] = []
    for number, body in enumerate(bodies):
        lines.append({"custom_id": f"odd-{number}", "body": body})
        if number % PLAIN_EVERY == 0:
            lines.append({"custom_id": f"plain-{number}", "body": plain(url, number)})
    data = b"".join(
        json.dumps({"method": "POST", "url": url, **line}).encode() + b"\n" for line in lines
    )
    ids = {line["custom_id"] for line in lines}
    return data, {i for i in ids if i.startswith("odd")}, {i for i in ids if i.startswith("plain")}


def restarts(server: Server) -> int:
    answer = httpx.get(f"{server.url}/blendserve/status", trust_env=False).json()
    return int(answer["engine"]["restarts"])


@pytest.mark.parametrize("url", [CHAT, COMPLETIONS, RESPONSES])
def test_odd_lines_cost_nobody_but_themselves(blend: Server, url: str) -> None:
    data, odd, good = job(url)
    before = restarts(blend)
    batch = finish(blend.client, submit(blend.client, data, url), seconds=480.0)
    assert (batch.status, batch.errors) == ("completed", None)
    answers = {
        **results(blend.client, batch.output_file_id),
        **results(blend.client, batch.error_file_id),
    }
    assert restarts(blend) == before
    check(answers, odd, good)


def test_odd_lines_cost_nobody_but_themselves_offline(model: str, tmp_path: Path) -> None:
    """An engine that embeds is another one, which `run-batch` starts."""
    data, odd, good = job(EMBEDDINGS)
    source, output, errors = (tmp_path / name for name in ("in.jsonl", "out.jsonl", "bad.jsonl"))
    source.write_bytes(data)
    files = ("-i", source, "-o", output, "--errors", errors)
    run = subprocess.run(
        [
            *(sys.executable, "-m", "blendserve", "run-batch", *files, "--model-path", model),
            *(*ENGINE_FLAGS, "--is-embedding"),
        ],
        capture_output=True,
        text=True,
        timeout=480,
        check=False,
        cwd=tmp_path,
    )
    # Some lines have failed.
    assert run.returncode == 1, run.stderr[-3000:]
    lines = [json.loads(line) for path in (output, errors) for line in path.open()]
    answers = {line["custom_id"]: line for line in lines}
    assert len(answers) == len(lines)
    check(answers, odd, good)
    [log] = tmp_path.glob("*.log")
    assert log.read_text(errors="replace").count(READY) == 1


def check(answers: dict[str, dict[str, Any]], odd: set[str], good: set[str]) -> None:
    """Plain lines are answered, odd ones answered or refused, each once."""
    assert len(odd) >= 150
    assert len(good) >= 40
    assert set(answers) == odd | good
    faults = {custom_id: line["error"] for custom_id, line in answers.items() if line["error"]}
    assert faults == {}
    statuses = {custom_id: line["response"]["status_code"] for custom_id, line in answers.items()}
    assert {statuses[custom_id] for custom_id in good} == {200}
    wrong = {i: answers[i]["response"]["body"] for i in odd if not _own(statuses[i])}
    assert wrong == {}
    assert {statuses[i] == 200 for i in odd} == {True, False}


def _own(status: int) -> bool:
    return status == 200 or 400 <= status < 500


@pytest.mark.parametrize("url", [CHAT, COMPLETIONS, RESPONSES])
def test_what_once_ended_the_engine_is_refused_online(blend: Server, url: str) -> None:
    before = restarts(blend)
    with httpx.Client(base_url=blend.url, timeout=120, trust_env=False) as client:
        for body in odd_lines.DEADLY[url]:
            for stream in (False, True):
                answer = client.post(
                    url,
                    json={"model": MODEL_NAME, "max_tokens": 4, "stream": stream, **body},
                )
                assert answer.status_code == 400, (str(body)[:300], answer.text)
                assert "error" in answer.text
    assert restarts(blend) == before
