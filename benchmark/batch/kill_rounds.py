"""kill -9 of the front or of the engine at random instants; then every line is counted.

    python benchmark/batch/kill_rounds.py --json benchmark/results/batch-kill.json

Jobs of 500 lines through run-batch over a fake engine, one after another, until the asked number
of kills has been done. After each job: the multiset of custom_ids over output and errors equals
the input's; and no line was computed whose result stood in the journal before a kill.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path
from typing import Any

import psutil
from fake_load import FAKE_ENGINE, write_job

_RUN = """
import sys
from functools import partial
from blendserve.cli import main, offline_job
offline_job.ENGINE_COMMAND = (sys.executable, {engine!r}, "--delay", "0.05", "--log", {log!r})
offline_job.WatchSettings = partial(offline_job.WatchSettings, pause_seconds=0.05)
sys.exit(main(["run-batch", *sys.argv[1:]]))
"""


class Job:
    """One job, started again after each death."""

    def __init__(self, folder: Path, lines: int) -> None:
        self.lines = lines
        self.folder = folder
        self.source, self.log = folder / "in.jsonl", folder / "computed"
        self.log.touch()
        write_job(self.source, lines, 300)
        self.process: subprocess.Popen[bytes] | None = None
        self.recomputed = 0

    def ensure_running(self) -> None:
        if self.process is None or self.process.poll() is not None:
            code = _RUN.format(engine=str(FAKE_ENGINE), log=str(self.log))
            output = ["-i", str(self.source), "-o", str(self.folder / "out.jsonl")]
            self.process = subprocess.Popen(
                [sys.executable, "-c", code, *output],
                stdout=subprocess.DEVNULL,
                stderr=subprocess.DEVNULL,
            )

    def is_done(self) -> bool:
        return not (self.folder / "out.jsonl.blendserve").exists()

    def computed(self) -> list[str]:
        return self.log.read_text().split()

    def committed(self) -> set[str]:
        """What the journal says is done: at least what is durable now."""
        done: set[str] = set()
        for path in self.folder.glob("out.jsonl.blendserve/batches/journals/*"):
            try:
                content = path.read_bytes()
            except FileNotFoundError:
                continue
            for raw in content.rpartition(b"\n")[0].splitlines():
                record = json.loads(raw)
                if record["kind"] != "suspect":
                    done.add(record["line"]["custom_id"])
        return done

    def kill(self, target: str) -> bool:
        """kill -9; False if there was nothing to kill."""
        assert self.process is not None
        if target == "front":
            self.process.send_signal(signal.SIGKILL)
            self.process.wait()
            return True
        try:
            children = psutil.Process(self.process.pid).children()
        except psutil.NoSuchProcess:
            return False
        for child in children:
            os.kill(child.pid, signal.SIGKILL)
        return bool(children)

    def check(self) -> dict[str, Any]:
        found: Counter[str] = Counter()
        crashed = 0
        for name in ("out.jsonl", "out.errors.jsonl"):
            path = self.folder / name
            for raw in path.read_bytes().splitlines() if path.exists() else ():
                line = json.loads(raw)
                found[line["custom_id"]] += 1
                crashed += (line["error"] or {}).get("code") == "engine_crashed"
        expected = Counter(f"request-{number}" for number in range(self.lines))
        return {
            "multiset_is_the_input": found == expected,
            "answered_engine_crashed": crashed,
            "computed": len(self.computed()),
            "committed_lines_computed_again": self.recomputed,
        }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--kills", type=int, default=60)
    parser.add_argument("--lines", type=int, default=500)
    parser.add_argument("--seed", type=int, default=6)
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    chance = random.Random(options.seed)
    kills: Counter[str] = Counter()
    jobs: list[dict[str, Any]] = []
    while kills.total() < options.kills or not jobs:
        with tempfile.TemporaryDirectory() as name:
            job = Job(Path(name), options.lines)
            watched: list[tuple[set[str], int]] = []
            while True:
                job.ensure_running()
                assert job.process is not None
                target = len(job.computed()) + chance.randint(0, 90)
                instant = time.monotonic() + chance.uniform(0.0, 12.0)
                while job.process.poll() is None and time.monotonic() < instant:
                    if len(job.computed()) >= target:
                        break
                    time.sleep(0.01)
                time.sleep(chance.uniform(0.0, 0.06))
                if job.process.poll() is not None or kills.total() >= options.kills:
                    job.process.wait()
                    if not job.is_done():
                        # Its engine was killed before it had ever served: the run ends and says
                        # so, and the same command goes on.
                        continue
                    break
                victim = chance.choice(["front", "engine"])
                watched.append((job.committed(), len(job.computed())))
                if job.kill(victim):
                    kills[victim] += 1
            computed = job.computed()
            # A result may be on its way into the journal while this looks; what it saw there
            # must never be computed afterwards.
            for committed, position in watched:
                job.recomputed += len(committed.intersection(computed[position:]))
            jobs.append({**job.check(), "exit_status": job.process.returncode})
            print(jobs[-1], dict(kills), flush=True)
    result = {"lines_per_job": options.lines, "kills": dict(kills), "jobs": jobs}
    if options.json:
        options.json.write_text(json.dumps(result, indent=2) + "\n")
    assert all(job["multiset_is_the_input"] for job in jobs)
    assert not any(job["committed_lines_computed_again"] for job in jobs)


if __name__ == "__main__":
    main()
