"""Odd lines among plain ones: each is answered on its own line, and nothing else is hurt."""

from __future__ import annotations

import json
from typing import Any

import httpx
import odd_lines
import pytest
from conftest import MODEL_NAME, Server
from jobs import finish, results, submit
from odd_lines import CHAT, COMPLETIONS, RESPONSES, Body

# All of them take minutes: of each endpoint, every so many.
STRIDE = 4
PLAIN_EVERY = 4


def plain(url: str, number: int) -> Body:
    """A line that must be answered. Some sample in a way that a neighbour's fault would break."""
    text = f"Say {number}."
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
        *odd_lines.bodies(url, MODEL_NAME)[::STRIDE],
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
    assert len(odd) >= 90
    before = restarts(blend)
    batch = finish(blend.client, submit(blend.client, data, url), seconds=480.0)
    assert (batch.status, batch.errors) == ("completed", None)
    answers = {
        **results(blend.client, batch.output_file_id),
        **results(blend.client, batch.error_file_id),
    }
    assert restarts(blend) == before
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


@pytest.mark.parametrize("url", [CHAT, COMPLETIONS])
def test_what_once_ended_the_engine_is_refused_online(blend: Server, url: str) -> None:
    before = restarts(blend)
    with httpx.Client(base_url=blend.url, timeout=120, trust_env=False) as client:
        for body in odd_lines.DEADLY[url]:
            for stream in (False, True):
                answer = client.post(
                    url,
                    json={"model": MODEL_NAME, "max_tokens": 4, "stream": stream, **body},
                )
                assert answer.status_code == 400, (body, answer.text)
                assert "error" in answer.text
    assert restarts(blend) == before
