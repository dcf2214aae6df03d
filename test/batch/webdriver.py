"""A headless Chromium, driven through chromedriver's own HTTP interface (W3C WebDriver)."""

from __future__ import annotations

import base64
import contextlib
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
from batch_fakes import until

from blendserve.cli.server_process import free_port

CHROMIUM, CHROMEDRIVER = shutil.which("chromium"), shutil.which("chromedriver")
_ELEMENT = "element-6066-11e4-a52e-4f735466cecf"


class Browser:
    """One window."""

    def __init__(self, http: httpx.Client, session: str) -> None:
        self._http = http
        self._session = f"/session/{session}"

    def _call(self, path: str, **body: Any) -> Any:
        answer = self._http.post(f"{self._session}/{path}", json=body)
        assert answer.status_code == 200, answer.text
        return answer.json()["value"]

    def open(self, url: str) -> None:
        self._call("url", url=url)

    def run(self, script: str, *arguments: Any) -> Any:
        """What a piece of JavaScript returns."""
        return self._call("execute/sync", script=script, args=list(arguments))

    def click(self, selector: str) -> None:
        found = self._call("element", using="css selector", value=selector)
        self._call(f"element/{found[_ELEMENT]}/click")

    def console(self) -> list[dict[str, Any]]:
        """What was written to the console since the last look."""
        return list(self._call("se/log", type="browser"))

    def screenshot(self, path: Path) -> None:
        answer = self._http.get(f"{self._session}/screenshot")
        path.write_bytes(base64.b64decode(answer.json()["value"]))


@contextlib.contextmanager
def browser(profile: Path, *flags: str) -> Iterator[Browser]:
    assert CHROMEDRIVER is not None
    port = free_port()
    driver = subprocess.Popen(
        [CHROMEDRIVER, f"--port={port}"], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
    )
    arguments = ["--headless=new", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage"]
    arguments += [f"--user-data-dir={profile}", "--window-size=1200,640", *flags]
    options = {
        "browserName": "chrome",
        "goog:chromeOptions": {"binary": CHROMIUM, "args": arguments},
        "goog:loggingPrefs": {"browser": "ALL"},
    }
    try:
        with httpx.Client(base_url=f"http://127.0.0.1:{port}", timeout=60) as http:

            def ready() -> bool:
                with contextlib.suppress(httpx.TransportError):
                    return bool(http.get("/status").json()["value"]["ready"])
                return False

            until(ready, bool)
            answer = http.post("/session", json={"capabilities": {"alwaysMatch": options}})
            assert answer.status_code == 200, answer.text
            session = answer.json()["value"]["sessionId"]
            try:
                yield Browser(http, session)
            finally:
                http.delete(f"/session/{session}")
    finally:
        driver.terminate()
        driver.wait(20)
