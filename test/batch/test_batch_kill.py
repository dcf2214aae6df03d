"""kill -9 at random instants: every custom_id ends on one line, and nothing is computed twice."""

from __future__ import annotations

import json
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

from batch_fakes import FakeExecutor, until

from blendserve.batch import BatchService, BatchStore

BATCHES, LINES = 3, 80
ROUNDS = 6
VICTIM = Path(__file__).with_name("batch_victim.py")


def committed_ids(batch_dir: Path) -> set[str]:
    """What the journals and the published files say is done, while no process runs."""
    done: set[str] = set()
    for journal in (batch_dir / "journals").glob("*.jsonl"):
        for raw in journal.read_bytes().splitlines(keepends=True):
            if raw.endswith(b"\n"):
                done.add(json.loads(raw)["line"]["custom_id"])
    for path in (batch_dir / "files").glob("*"):
        entries = map(json.loads, path.read_bytes().splitlines())
        done.update(entry["custom_id"] for entry in entries if "response" in entry)
    return done


def lines_of(log: Path) -> list[str]:
    return log.read_text().splitlines()


def start(batch_dir: Path, log: Path) -> subprocess.Popen[str]:
    victim = subprocess.Popen(
        [sys.executable, str(VICTIM), str(batch_dir), str(LINES), str(log)],
        stdout=subprocess.PIPE,
        text=True,
        env={**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path))},
    )
    assert victim.stdout is not None
    assert victim.stdout.readline() == "ready\n"
    return victim


def test_killed_at_random_instants_it_does_each_line_once(tmp_path: Path) -> None:
    batch_dir, log = tmp_path / "batches", tmp_path / "computed"
    chance = random.Random(20_240)
    log.touch()
    for _ in range(ROUNDS):
        committed = committed_ids(batch_dir)
        before = len(lines_of(log))
        victim = start(batch_dir, log)
        target = before + chance.randint(0, 24)
        until(
            lambda: len(lines_of(log)) >= target or victim.poll() is not None,  # noqa: B023
            bool,
        )
        # Not a wait for anything: the instant is what the test varies.
        time.sleep(chance.uniform(0.0, 0.02))
        victim.send_signal(signal.SIGKILL)
        victim.wait(20)
        assert committed.isdisjoint(lines_of(log)[before:])
        assert committed <= committed_ids(batch_dir)

    committed = committed_ids(batch_dir)
    assert committed
    before = len(lines_of(log))
    victim = start(batch_dir, log)
    assert victim.wait(30) == 0
    computed = lines_of(log)[before:]
    assert committed.isdisjoint(computed)
    assert len(committed) + len(computed) == BATCHES * LINES

    store = BatchStore(batch_dir)
    service = BatchService(store, FakeExecutor())
    batches = service.list(after=None, limit=10).data
    assert len(batches) == BATCHES
    for number, batch in enumerate(reversed(batches)):
        assert batch.status == "completed"
        counts = batch.request_counts
        assert (counts.total, counts.completed, counts.failed) == (LINES, LINES - 2, 2)
        ids: list[str] = []
        for file_id in (batch.output_file_id, batch.error_file_id):
            assert file_id is not None
            _, stream = service.open_file(file_id)
            with stream:
                ids += [json.loads(line)["custom_id"] for line in stream]
        assert sorted(ids) == sorted(f"b{number}r{i}" for i in range(LINES))
    store.close()
