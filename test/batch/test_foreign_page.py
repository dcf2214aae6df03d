"""A page of another origin, in a real browser: it can neither read nor write."""

from __future__ import annotations

import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest
from batch_fakes import counts_of, finish, job, submit, until
from front_server import FrontServer
from webdriver import CHROMEDRIVER, CHROMIUM, browser

NO_BROWSER = "chromium and chromedriver are not installed"
# What a page can try. Each attempt ends as "blocked", "unreadable" (sent, and the answer is hidden
# from the page) or "read: ..." with what it got.
PAGE = """<!doctype html><title>evil</title><body><script>
const target = TARGET, batch = BATCH, file = FILE;
const line = JSON.stringify({input_file_id: file, endpoint: "/v1/chat/completions",
                             completion_window: "24h"});
const form = () => { const data = new FormData();
  data.append("purpose", "batch"); data.append("file", new Blob(["{}"]), "evil.jsonl");
  return data; };
const attempts = {};
async function attempt(name, path, options = {}) {
  try {
    const answer = await fetch(target + path, {credentials: "include", ...options});
    if (answer.type === "opaque" || answer.type === "opaqueredirect") {
      attempts[name] = (await answer.text()) === "" ? "unreadable" : "read: opaque";
    } else { attempts[name] = "read: " + answer.status + " " + await answer.text(); }
  } catch (error) { attempts[name] = "blocked"; }
}
function load(name, tag, path) {
  return new Promise(done => {
    const element = document.createElement(tag);
    const end = seen => () => { attempts[name] = seen; done(); };
    element.onload = end(tag === "iframe" ? "unreadable" : "read: loaded");
    element.onerror = end("blocked");
    element.src = target + path;
    document.body.append(element);
    setTimeout(end("blocked"), 5000);
  });
}
function submitForm(name, path, kind) {
  return new Promise(done => {
    const frame = document.createElement("iframe"); frame.name = name;
    document.body.append(frame);
    const sent = document.createElement("form");
    Object.assign(sent, {method: "POST", action: target + path, enctype: kind, target: name});
    const field = document.createElement("input");
    Object.assign(field, {name: '{"input_file_id": "' + file + '", "x": "', value: '"}'});
    sent.append(field); document.body.append(sent);
    frame.onload = () => {
      let seen; try { seen = frame.contentDocument ? "read: frame" : "unreadable"; }
      catch (error) { seen = "unreadable"; }
      attempts[name] = seen; done(); };
    sent.submit();
    setTimeout(() => { attempts[name] ??= "blocked"; done(); }, 5000);
  });
}
function socket(name, path) {
  return new Promise(done => {
    const opened = new WebSocket(target.replace("http", "ws") + path);
    opened.onopen = () => { attempts[name] = "read: open"; done(); };
    opened.onerror = () => { attempts[name] = "blocked"; done(); };
  });
}
(async () => {
  for (const path of ["/v1/files", "/v1/batches", "/v1/batches/" + batch, "/v1/models/x",
                      "/v1/files/" + file + "/content", "/blendserve/status", "/blendserve/",
                      "/blendserve/live", "/health", "/headers"]) {
    await attempt("get " + path, path);
    await attempt("no-cors get " + path, path, {mode: "no-cors"});
  }
  const asked = {"content-type": "application/json", "authorization": "Bearer x"};
  await attempt("create", "/v1/batches", {method: "POST", headers: asked, body: line});
  await attempt("create as text", "/v1/batches", {method: "POST", body: line});
  await attempt("create unseen", "/v1/batches", {method: "POST", mode: "no-cors", body: line});
  await attempt("cancel", "/v1/batches/" + batch + "/cancel", {method: "POST"});
  await attempt("cancel unseen", "/v1/batches/" + batch + "/cancel",
                {method: "POST", mode: "no-cors"});
  await attempt("upload", "/v1/files", {method: "POST", body: form()});
  await attempt("upload unseen", "/v1/files", {method: "POST", mode: "no-cors", body: form()});
  await attempt("delete", "/v1/files/" + file, {method: "DELETE"});
  await attempt("chat", "/v1/chat/completions", {method: "POST", headers: asked, body: "{}"});
  await attempt("chat unseen", "/v1/chat/completions",
                {method: "POST", mode: "no-cors", body: "{}"});
  await attempt("steer", "/flush_cache", {method: "POST", mode: "no-cors"});
  const queued = navigator.sendBeacon(target + "/v1/files", form());
  attempts["beacon"] = queued ? "unreadable" : "blocked";
  await load("script", "script", "/v1/files");
  await load("style", "script", "/blendserve/page.js");
  await load("frame", "iframe", "/blendserve/");
  await submitForm("form_text", "/v1/batches", "text/plain");
  await submitForm("form_upload", "/v1/files", "multipart/form-data");
  await submitForm("form_cancel", "/v1/batches/" + batch + "/cancel",
                   "application/x-www-form-urlencoded");
  await socket("socket", "/v1/realtime");
  window.attempts = attempts;
})();
</script>"""
# A page whose name its owner has made lead to this machine: for the browser it is one origin.
REBOUND = """
window.seen = {};
(async () => {
  const asked = [["files", "/v1/files", "GET"], ["status", "/blendserve/status", "GET"],
                 ["chat", "/v1/chat/completions", "POST"]];
  for (const [name, path, method] of asked) {
    const answer = await fetch(path, {method, body: method === "POST" ? "{}" : undefined});
    window.seen[name] = answer.status;
  }
  window.done = true;
})();
"""


@contextmanager
def site(markup: str) -> Iterator[str]:
    """A site of somebody else's on this machine; its address."""

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self.send_response(200)
            self.send_header("Content-Type", "text/html")
            self.end_headers()
            self.wfile.write(markup.encode())

        def log_message(self, *_: Any) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_address[1]}/"
    finally:
        server.shutdown()
        thread.join(20)
        server.server_close()


@pytest.mark.skipif(not (CHROMIUM and CHROMEDRIVER), reason=NO_BROWSER)
def test_a_page_of_another_origin_can_neither_read_nor_write(tmp_path: Path) -> None:
    log = tmp_path / "posts"
    rules = "--host-resolver-rules=MAP rebound.example 127.0.0.1"
    with FrontServer(tmp_path / "b", "--delay", "0.05", "--salts", str(log)) as server:
        server.wait_until_up()
        running = submit(server.client, job(900))
        until(
            lambda: server.client.batches.retrieve(running.id),
            lambda seen: counts_of(seen).completed > 4,
        )

        def state() -> tuple[list[str], list[tuple[str, str]], list[str]]:
            files = sorted(file.id for file in server.client.files.list())
            batches = sorted((batch.id, batch.status) for batch in server.client.batches.list())
            return files, batches, log.read_text().splitlines()

        before = state()
        markup = PAGE.replace("TARGET", json.dumps(server.url))
        markup = markup.replace("BATCH", json.dumps(running.id))
        markup = markup.replace("FILE", json.dumps(running.input_file_id))
        with site(markup) as evil, browser(tmp_path / "profile", rules) as page:
            page.open(evil)
            attempts = until(lambda: page.run("return window.attempts || null"), bool)
            page.open(server.url.replace("127.0.0.1", "rebound.example") + "/blendserve/")
            page.run(REBOUND)
            assert until(lambda: page.run("return window.done || null"), bool)
            rebound = page.run("return window.seen")
        assert len(attempts) == 20 + 11 + 8
        assert {name: seen for name, seen in attempts.items() if seen.startswith("read")} == {}
        assert rebound == {"files": 421, "chat": 421, "status": 421}
        assert state() == before
        server.client.batches.cancel(running.id)
        assert finish(server.client, running.id).status == "cancelled"
