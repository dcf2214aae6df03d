"""What a server of programs answers, whoever asks: tickets, tenants, clients that go away."""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Iterator
from typing import Any

import httpx
import pytest
from program_server import CACHE_SALT_HEADER, ProgramServer, serving

pytestmark = pytest.mark.timeout(60)


@pytest.fixture
def server() -> Iterator[ProgramServer]:
    with serving() as server:
        yield server


class held:
    """A job of programs whose client is this test: an iterator over what it is told."""

    def __init__(
        self, server: ProgramServer, programs: list[Any], salt: str = "", limit: int | None = None
    ) -> None:
        self._client = httpx.Client(base_url=server.url, timeout=20)
        body = {"programs": programs, "limit": limit}
        headers = {CACHE_SALT_HEADER: salt}
        self._stream = self._client.stream(
            "POST", "/blendserve/programs", json=body, headers=headers
        )

    def __enter__(self) -> Iterator[dict[str, Any]]:
        response = self._stream.__enter__()
        events = (json.loads(line) for line in response.iter_lines())
        assert "job" in next(events)
        return (event for event in events if event)

    def __exit__(self, *error: Any) -> None:
        self._stream.__exit__(*error)
        self._client.close()


def test_a_ticket_that_is_forged_or_anothers_makes_an_unplanned_request(
    server: ProgramServer,
) -> None:
    def ask(ticket: Any, **headers: str) -> httpx.Response:
        params = {"max_new_tokens": 4, "custom_params": {"blend_ticket": ticket, "own": 1}}
        body = {"text": "a b c", "sampling_params": params}
        return httpx.post(f"{server.url}/generate", json=body, headers=headers, timeout=20)

    program = {"text": "a b c", "sampling_params": {"max_new_tokens": 4, "ignore_eos": True}}
    with held(server, [program], salt="alice") as stream:
        ticket = next(stream)["go"][0][1]
        assert ask("forged", **{CACHE_SALT_HEADER: "alice"}).status_code == 200
        assert ask(ticket, **{CACHE_SALT_HEADER: "bob"}).status_code == 200
        assert ask(ticket).status_code == 200
        # Not even the text of it reaches the engine.
        assert [(one.tag, one.custom) for one in server.asked] == [(None, {"own": 1})] * 3
        refused = ask(["list"], **{CACHE_SALT_HEADER: "alice"})
        assert refused.status_code == 400
        assert "blend_ticket" in refused.json()["error"]["message"]
        assert ask(ticket, **{CACHE_SALT_HEADER: "alice"}).status_code == 200
        assert server.asked[-1].tag is not None
    assert server.wait_until_clean()


def test_a_client_that_goes_away_leaves_nothing_behind(server: ProgramServer) -> None:
    server.frozen = True
    programs = [
        {"text": f"a b c{k}", "sampling_params": {"max_new_tokens": 9, "ignore_eos": True}}
        for k in range(40)
    ]
    asked: list[threading.Thread] = []
    with held(server, programs, limit=4) as stream:
        going: list[Any] = []
        while len(going) < 4:
            going += next(stream).get("go", [])
        for _, ticket in going[:4]:
            params = {"max_new_tokens": 9, "custom_params": {"blend_ticket": ticket}}
            body = {"text": "a b c", "sampling_params": params}
            post = threading.Thread(
                target=lambda body=body: httpx.post(f"{server.url}/generate", json=body, timeout=30)
            )
            post.start()
            asked.append(post)
        deadline = time.monotonic() + 10
        while server.at_once < 4 and time.monotonic() < deadline:
            time.sleep(0.01)
        assert server.at_once == 4
    # Its stream is closed now, and its requests are aborted.
    assert server.wait_until_clean()
    assert len(set(server.aborted)) == 4
    for post in asked:
        post.join(20)


def test_only_the_owner_may_speak_of_a_job(server: ProgramServer) -> None:
    program = {"text": "a b", "sampling_params": {"max_new_tokens": 4, "ignore_eos": True}}
    with held(server, [program] * 3, salt="alice") as stream:
        job = next(iter(server.jobs))
        url = f"{server.url}/blendserve/programs/{job}"

        def tell(news: Any, salt: str = "alice") -> int:
            headers = {CACHE_SALT_HEADER: salt}
            return httpx.post(url, json=news, headers=headers, timeout=20).status_code

        assert tell({"cancel": True}, "bob") == 404
        assert tell({"canzel": True}) == 400
        assert tell({"ended": [-1]}) == 400
        # Numbers that do not run are passed over.
        assert tell({"ended": [77, 0, 0], "failed": [1]}) == 200
        view = server.jobs[job].view
        assert view.failed == 1
        assert tell({"cancel": True}) == 200
        assert [*stream][-2:] == [{"cancelled": True}, {"end": True}]
        assert tell({"cancel": True}) == 404
    assert server.wait_until_clean()


@pytest.mark.parametrize(
    "body",
    [
        b"no json",
        b"[]",
        b'{"programs": []}',
        b'{"programs": [1]}',
        b'{"programs": [{}], "limit": 0}',
    ],
)
def test_a_body_that_is_no_job_is_a_400(server: ProgramServer, body: bytes) -> None:
    answer = httpx.post(f"{server.url}/blendserve/programs", content=body, timeout=20)
    assert answer.status_code == 400
    assert answer.json()["error"]["message"]
    assert server.is_clean
