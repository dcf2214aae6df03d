"""The page at /blendserve/: in a real browser where there is one, and what it rests on anywhere."""

from __future__ import annotations

import os
import re
from pathlib import Path

import pytest
from batch_fakes import chat_line, counts_of, finish, job, jsonl, submit, until
from front_server import FrontServer
from webdriver import CHROMEDRIVER, CHROMIUM, browser

NO_BROWSER = "chromium and chromedriver are not installed"


def test_the_page_loads_nothing_from_elsewhere(tmp_path: Path) -> None:
    with FrontServer(tmp_path) as server:
        assert server.http.get("/blendserve", follow_redirects=True).url.path == "/blendserve/"
        page = server.http.get("/blendserve/")
        assert page.headers["content-type"].startswith("text/html")
        assert "default-src 'none'" in page.headers["content-security-policy"]
        loaded = re.findall(r'(?:src|href)="([^"]+)"', page.text)
        local = [path for path in loaded if path != "data:,"]
        assert sorted(local) == ["/blendserve/page.css", "/blendserve/page.js"]
        for path in local:
            answer = server.http.get(path)
            assert (answer.status_code, answer.headers["x-content-type-options"]) == (
                200,
                "nosniff",
            )
            assert "//" not in re.sub(r"//.*", "", answer.text)
            assert "innerHTML" not in answer.text


def test_the_calls_that_the_page_makes_tell_all_that_it_shows(tmp_path: Path) -> None:
    """The browser's test without a browser: the same calls, in the same order."""
    with FrontServer(tmp_path, "--delay", "0.05") as server:
        ended = finish(server.client, submit(server.client, job(3)).id)
        running = submit(server.client, job(400))
        status = server.http.get("/blendserve/status").json()
        assert set(status) == {"engine", "schedulers", "jobs", "dispatch"}
        assert {"state", "reason", "restarts"} <= set(status["engine"])

        def listed() -> list[dict[str, object]]:
            return list(server.http.get("/v1/batches?limit=20").json()["data"])

        assert [batch["id"] for batch in listed()] == [running.id, ended.id]
        until(
            lambda: server.client.batches.retrieve(running.id),
            lambda seen: counts_of(seen).completed > 4,
        )
        assert server.http.post(f"/v1/batches/{running.id}/cancel").status_code == 200
        assert finish(server.client, running.id).status == "cancelled"
        content = server.http.get(f"/v1/files/{ended.output_file_id}/content")
        assert len(content.text.splitlines()) == 3


@pytest.mark.skipif(not (CHROMIUM and CHROMEDRIVER), reason=NO_BROWSER)
def test_in_a_browser_jobs_are_seen_move_and_can_be_cancelled(tmp_path: Path) -> None:
    row = "document.querySelector(`tr[data-batch='${arguments[0]}']`)"
    with (
        FrontServer(tmp_path / "batches", "--delay", "0.05") as server,
        browser(tmp_path / "profile") as page,
    ):
        markup = jsonl([chat_line("a"), {**chat_line("b"), "url": "/v1/<img src=x>"}])
        failed = finish(server.client, submit(server.client, markup).id)
        ended = finish(server.client, submit(server.client, job(40, {3: "fail"})).id)
        running = submit(server.client, job(900))
        page.open(f"{server.url}/blendserve/")

        def text(batch_id: str) -> str:
            return str(page.run(f"return {row} ? {row}.innerText : ''", batch_id))

        def progress() -> float:
            return float(page.run(f"return {row}.querySelector('progress').value", running.id))

        until(lambda: text(running.id), lambda seen: "in_progress" in seen)
        assert "completed" in text(ended.id)
        assert "39 done, 1 failed of 40" in text(ended.id)
        assert "line 2: There is no endpoint '/v1/<img src=x>'" in text(failed.id)
        assert page.run("return document.querySelectorAll('img').length") == 0
        first = progress()
        until(progress, lambda seen: seen > first)
        assert "engine up" in page.run("return document.getElementById('engine').innerText")
        if "PAGE_SCREENSHOT" in os.environ:
            page.screenshot(Path(os.environ["PAGE_SCREENSHOT"]))
        # The table is drawn anew each second; a click may meet a button that is just replaced.
        page.run(f"{row}.querySelector('[data-action=cancel]').click()", running.id)
        until(lambda: text(running.id), lambda seen: "cancelled" in seen)
        assert server.client.batches.retrieve(running.id).status == "cancelled"
        severe = [entry for entry in page.console() if entry["level"] in ("SEVERE", "WARNING")]
        assert severe == []
