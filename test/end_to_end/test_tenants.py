"""Two tenants on one real engine: neither learns what the other prompts."""

from __future__ import annotations

import json
import os
import time
from collections.abc import Iterator
from typing import Any

import httpx
import pytest
from conftest import MODEL_NAME, Server, blend_command
from jobs import finish, results, submit
from openai import OpenAI

from blendserve.cli.server_process import free_port, running_server

ALICE, BOB, ROOT = "alice-key-0123456789", "bob-key-0123456789", "root-key-0123456789"
SECRET = "The offer that we shall make on Monday is four hundred and twelve million in cash."
GUESS, WRONG = SECRET[:70], "Nothing that anybody has ever said to this model begins in this way."


@pytest.fixture(scope="module")
def server(model: str, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    folder = tmp_path_factory.mktemp("tenants")
    keys = folder / "keys"
    keys.write_text(f"alice {ALICE}\nbob {BOB}\nops {ROOT} admin\n")
    keys.chmod(0o600)
    port = free_port()
    command = [*blend_command(model, port, folder / "batches"), "--api-keys-file", str(keys)]
    with running_server(command, port, folder / "server.log") as url:
        yield Server(url, folder / "batches")


def ask(server: Server, key: str, path: str, body: dict[str, Any]) -> httpx.Response:
    headers = {"Authorization": f"Bearer {key}"}
    return httpx.post(f"{server.url}{path}", json=body, headers=headers, timeout=120)


def cached(server: Server, key: str, prompt: str, **more: Any) -> int:
    """Tokens of a prompt that the engine says it had."""
    body = {"model": MODEL_NAME, "prompt": prompt, "max_tokens": 1, "temperature": 0, **more}
    usage = ask(server, key, "/v1/completions", body).raise_for_status().json()["usage"]
    return int((usage.get("prompt_tokens_details") or {}).get("cached_tokens") or 0)


def test_a_guess_finds_nothing_of_another_tenants_prompts(server: Server) -> None:
    cached(server, ALICE, SECRET)
    assert cached(server, ALICE, f"{GUESS} zzz") > 8
    right, wrong = cached(server, BOB, f"{GUESS} zzz"), cached(server, BOB, f"{WRONG} zzz")
    assert right == wrong == 0
    # Nor through another route, or with a salt of one's own.
    told = f"Elsewhere: {SECRET}"
    cached(server, ALICE, told)
    body = {"text": f"{told[:80]} zzz", "sampling_params": {"max_new_tokens": 1}}
    for key, found in ((BOB, 0), (ALICE, 9)):
        answer = ask(server, key, "/generate", body).raise_for_status().json()
        assert answer["meta_info"]["cached_tokens"] >= found
        assert found or answer["meta_info"]["cached_tokens"] == 0
    assert cached(server, BOB, f"{GUESS} zzz", extra_key="alice") == 0
    assert cached(server, BOB, f"{GUESS} zzz", cache_salt="alice") == 0
    assert cached(server, BOB, f"{GUESS} xxx", cache_salt="alice") > 8


def test_nor_does_a_line_of_a_batch(server: Server) -> None:
    def clients(key: str) -> OpenAI:
        return OpenAI(base_url=f"{server.url}/v1", api_key=key, timeout=120, max_retries=0)

    def line_cached(key: str, prompt: str) -> int:
        body = {"model": MODEL_NAME, "prompt": prompt, "max_tokens": 1, "temperature": 0}
        line = {"custom_id": "a", "method": "POST", "url": "/v1/completions", "body": body}
        batch = finish(clients(key), submit(clients(key), [line], "/v1/completions"))
        answer = results(clients(key), batch.output_file_id)["a"]["response"]["body"]
        return int((answer["usage"].get("prompt_tokens_details") or {}).get("cached_tokens") or 0)

    told = f"In a line: {SECRET}"
    line_cached(ALICE, told)
    assert line_cached(BOB, f"{told[:80]} zzz") == 0
    assert cached(server, BOB, f"{told[:80]} yyy") > 8, "his own guess of before"
    # Lines and online requests of one tenant share.
    assert cached(server, ALICE, f"{told[:80]} zzz") > 8
    assert line_cached(ALICE, f"{told[:80]} yyy") > 8


def test_a_client_cannot_forge_a_plan(server: Server) -> None:
    tag = {"blendserve_plan": '{"side": 0, "rank": 0, "density": 1.0, "output_tokens": 1.0}'}
    body = {"model": MODEL_NAME, "prompt": "a", "max_tokens": 1, "custom_params": tag}
    for key in (ALICE, ROOT):
        answer = ask(server, key, "/v1/completions", body)
        assert answer.status_code == 400, answer.text
        assert "blendserve_plan" in answer.text
    nested = {"text": "a", "sampling_params": {"max_new_tokens": 1, "custom_params": tag}}
    assert ask(server, ROOT, "/generate", nested).status_code == 400


def test_the_engines_key_and_other_files_are_not_to_be_had(server: Server) -> None:
    for path in ("/server_info", "/get_server_info"):
        answer = httpx.get(
            f"{server.url}{path}", headers={"Authorization": f"Bearer {ROOT}"}, timeout=60
        )
        assert answer.status_code == 200
        told = answer.json()
        assert set(told["api_key"]) == {"*"}
        engine = f"http://127.0.0.1:{told['port']}"
        stolen = {"Authorization": f"Bearer {told['api_key']}"}
        assert httpx.get(f"{engine}/v1/models", headers=stolen).status_code == 401
    assert os.environ.get("BLENDSERVE_ENGINE_TOKEN") is None


def test_no_page_may_read_what_the_engine_says(server: Server) -> None:
    with httpx.Client(base_url=server.url, headers={"Authorization": f"Bearer {ALICE}"}) as http:
        assert http.get("/v1/models", headers={"Origin": "http://evil.example"}).status_code == 403
        plain = http.get("/v1/models")
        assert plain.status_code == 200
        assert not [name for name in plain.headers if name.startswith("access-control-")]
        assert len(plain.headers.get_list("date")) == len(plain.headers.get_list("server")) == 1
        assert http.get(f"/v1/models/{MODEL_NAME}").status_code == 200
        assert http.options("/v1/models").status_code == 405


def test_programs_of_a_tenant_are_its_own(server: Server) -> None:
    program = {"text": "a b c", "sampling_params": {"max_new_tokens": 4, "ignore_eos": True}}
    headers = {"Authorization": f"Bearer {ALICE}"}
    client = httpx.Client(base_url=server.url, headers=headers, timeout=60)
    path = "/blendserve/programs"
    assert httpx.post(f"{server.url}{path}", json={"programs": [program]}).status_code == 401

    def jobs_seen(key: str) -> list[str]:
        shown = {"Authorization": f"Bearer {key}"}
        status = httpx.get(f"{server.url}/blendserve/status", headers=shown, timeout=60).json()
        assert not any("owner" in job for job in status["jobs"])
        return [job["job_id"] for job in status["jobs"]]

    def ask_with(ticket: str, key: str) -> int:
        params = {**program["sampling_params"], "custom_params": {"blend_ticket": ticket}}
        body = {**program, "sampling_params": params}
        return ask(server, key, "/generate", body).status_code

    with client, client.stream("POST", path, json={"programs": [program] * 2}) as stream:
        events = (json.loads(line) for line in stream.iter_lines())
        job = next(events)["job"]
        ticket = next(event for event in events if "go" in event)["go"][0][1]
        # The status is half a second old at the most.
        deadline = time.monotonic() + 30
        while jobs_seen(ALICE) != [job] and time.monotonic() < deadline:
            time.sleep(0.1)
        assert jobs_seen(ALICE) == jobs_seen(ROOT) == [job]
        assert jobs_seen(BOB) == []
        # Another's ticket is as good as none; so is one that nobody was given.
        assert ask_with(ticket, BOB) == ask_with("forged", ALICE) == ask_with(ticket, ALICE) == 200
        assert ask(server, BOB, f"{path}/{job}", {"cancel": True}).status_code == 404
        assert ask(server, ALICE, f"{path}/{job}", {"ended": [0, 1]}).status_code == 200
        assert [*events][-1] == {"end": True}
