"""Reads while another process has the database locked and creates wait for it.

    python benchmark/batch/locked.py --json benchmark/results/batch-locked.json

Four processes: a front over a fake engine; one that has `BEGIN IMMEDIATE`; one with 45 clients that
create batches over and over, each answer being 503; and this one, which reads a batch meanwhile.
"""

from __future__ import annotations

import argparse
import json
import socket
import sqlite3
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections import Counter
from pathlib import Path
from typing import Any

import httpx
from fake_load import FAKE_ENGINE

sys.path.insert(0, str(FAKE_ENGINE.parent))
sys.path.insert(0, str(Path(__file__).parents[1]))

from batch_fakes import CHAT, finish, job, submit
from openai import OpenAI
from record import save

from blendserve.cli import front

_START_SECONDS = 120


def serve(port: str, batch_dir: str) -> int:
    front.ENGINE_COMMAND = (sys.executable, str(FAKE_ENGINE))
    return front.serve_front(["--port", port, "--batch-dir", batch_dir])


def create(url: str, file_id: str, clients: str, seconds: str) -> int:
    """Prints how often each status was answered."""
    ask = {"input_file_id": file_id, "endpoint": CHAT, "completion_window": "24h"}
    answers = Counter[int]()
    end = time.monotonic() + float(seconds)

    def ask_on() -> None:
        with httpx.Client(base_url=url, timeout=120, trust_env=False) as http:
            while time.monotonic() < end:
                answers[http.post("/v1/batches", json=ask).status_code] += 1

    threads = [threading.Thread(target=ask_on) for _ in range(int(clients))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    print(json.dumps(answers))
    return 0


def wait_until_up(http: httpx.Client) -> None:
    end = time.monotonic() + _START_SECONDS
    while time.monotonic() < end:
        try:
            if http.get("/blendserve/status").json()["engine"]["state"] == "up":
                return
        except httpx.TransportError:
            pass  # not listening yet
        time.sleep(0.2)
    raise TimeoutError("the server did not come up")


def reads(http: httpx.Client, path: str, seconds: float) -> dict[str, Any]:
    taken: list[float] = []
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        start = time.monotonic()
        http.get(path).raise_for_status()
        taken.append(time.monotonic() - start)
        time.sleep(0.02)
    cuts = statistics.quantiles(taken, n=100)
    found = {"median_ms": cuts[49], "p99_ms": cuts[98], "slowest_ms": max(taken)}
    return {"reads": len(taken), **{name: round(1_000 * cut, 1) for name, cut in found.items()}}


def measure(folder: Path, seconds: float, clients: int) -> dict[str, Any]:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = str(probe.getsockname()[1])
    url, batch_dir = f"http://127.0.0.1:{port}", folder / "batches"
    this = [sys.executable, __file__]
    server = subprocess.Popen([*this, "serve", port, str(batch_dir)], stderr=subprocess.DEVNULL)
    try:
        http = httpx.Client(base_url=url, timeout=120, trust_env=False)
        wait_until_up(http)
        client = OpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0)
        batch = finish(client, submit(client, job(3)).id)
        path = f"/v1/batches/{batch.id}"
        calm = reads(http, path, seconds / 2)
        other = sqlite3.connect(batch_dir / "blendserve.db", isolation_level=None)
        other.execute("BEGIN IMMEDIATE")
        asking = [*this, "create", url, batch.input_file_id, str(clients), str(seconds)]
        creating = subprocess.Popen(asking, stdout=subprocess.PIPE, text=True)
        locked = reads(http, path, seconds)
        answers, _ = creating.communicate(timeout=120)
        other.execute("ROLLBACK")
        other.close()
        ask = {"input_file_id": batch.input_file_id, "endpoint": CHAT, "completion_window": "24h"}
        after = http.post("/v1/batches", json=ask).status_code
    finally:
        server.terminate()
        server.wait(60)
    return {
        "creates_waiting": clients,
        "not_locked": calm,
        "locked": locked,
        "answers_to_creates": json.loads(answers),
        "create_afterwards": after,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seconds", type=float, default=20.0)
    parser.add_argument("--creates", type=int, default=45)
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        result = measure(Path(name), options.seconds, options.creates)
    print(json.dumps(result, indent=2))
    if options.json:
        save(options.json, result)
    assert set(result["answers_to_creates"]) == {"503"}, result["answers_to_creates"]
    assert result["locked"]["p99_ms"] < 500, result["locked"]


if __name__ == "__main__":
    command = {"serve": serve, "create": create}.get(sys.argv[1] if len(sys.argv) > 1 else "")
    if command is not None:
        sys.exit(command(*sys.argv[2:]))
    main()
