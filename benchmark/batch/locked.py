"""Reads while another process has the database locked and creates wait for it.

    python benchmark/batch/locked.py --json benchmark/results/batch-locked.json

A front over a fake engine, in a process of its own; a process with `BEGIN IMMEDIATE`; 45 clients
that create batches over and over, each answer being 503; one client that reads a batch meanwhile.
"""

from __future__ import annotations

import argparse
import json
import sqlite3
import statistics
import sys
import tempfile
import threading
import time
from collections import Counter
from pathlib import Path
from typing import Any

import httpx

sys.path.insert(0, str(Path(__file__).parents[2] / "test" / "batch"))

from batch_fakes import CHAT, finish, job, submit
from front_server import FrontServer


def reads(http: httpx.Client, path: str, seconds: float) -> list[float]:
    taken: list[float] = []
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        start = time.monotonic()
        http.get(path).raise_for_status()
        taken.append(time.monotonic() - start)
        time.sleep(0.02)
    return taken


def figures(taken: list[float]) -> dict[str, Any]:
    cuts = statistics.quantiles(taken, n=100)
    names = {"median_ms": cuts[49], "p99_ms": cuts[98], "slowest_ms": max(taken)}
    return {"reads": len(taken), **{name: round(1_000 * cut, 1) for name, cut in names.items()}}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seconds", type=float, default=20.0)
    parser.add_argument("--creates", type=int, default=45)
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as name, FrontServer(Path(name) / "batches") as server:
        server.wait_until_up()
        batch = finish(server.client, submit(server.client, job(3)).id)
        path = f"/v1/batches/{batch.id}"
        calm = figures(reads(server.http, path, options.seconds / 2))
        ask = {"input_file_id": batch.input_file_id, "endpoint": CHAT, "completion_window": "24h"}
        stop, answers = threading.Event(), Counter[int]()

        def create() -> None:
            with httpx.Client(base_url=server.url, timeout=120) as http:
                while not stop.is_set():
                    answers[http.post("/v1/batches", json=ask).status_code] += 1

        other = sqlite3.connect(Path(name) / "batches" / "blendserve.db", isolation_level=None)
        other.execute("BEGIN IMMEDIATE")
        threads = [threading.Thread(target=create) for _ in range(options.creates)]
        for thread in threads:
            thread.start()
        locked = figures(reads(server.http, path, options.seconds))
        stop.set()
        for thread in threads:
            thread.join(60)
        other.execute("ROLLBACK")
        other.close()
        after = server.http.post("/v1/batches", json=ask).status_code
    result = {
        "creates_waiting": options.creates,
        "not_locked": calm,
        "locked": locked,
        "answers_to_creates": {str(status): count for status, count in answers.items()},
        "create_afterwards": after,
    }
    print(json.dumps(result, indent=2))
    if options.json:
        options.json.write_text(json.dumps(result, indent=2) + "\n")
    assert set(answers) == {503}, answers
    assert locked["p99_ms"] < 500, locked


if __name__ == "__main__":
    main()
