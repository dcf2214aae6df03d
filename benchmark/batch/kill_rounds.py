"""kill -9 of the front or of the engine at random instants; then every line is counted.

    python benchmark/batch/kill_rounds.py --json benchmark/results/batch-kill.json

Jobs of 500 lines through run-batch, until the asked number of kills has been done: most over a fake
engine, some over the real one with the tiny model of the end-to-end tests. Several workers run jobs
beside each other. After each job: the multiset of custom_ids over output and errors equals the
input's; and no line was computed whose result stood in the journal before a kill. Exit status 1 if
a job breaks that.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import random
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import psutil
from fake_load import FAKE_ENGINE, write_job

from blendserve.batch.journal import read_records

sys.path.insert(0, str(Path(__file__).parents[1]))
sys.path.insert(0, str(Path(__file__).parents[2] / "test" / "end_to_end"))

import tiny_model
from record import save

_RUN = """
import sys
from functools import partial
from blendserve.cli import main, offline_job
offline_job.ENGINE_COMMAND = (sys.executable, *{engine!r})
offline_job.WatchSettings = partial(offline_job.WatchSettings, pause_seconds=0.05)
sys.exit(main(["run-batch", *sys.argv[1:]]))
"""


_REAL_FLAGS = (
    *("--max-total-tokens", "4096", "--chunked-prefill-size", "256", "--device", "cpu"),
    *("--dtype", "float32", "--mem-fraction-static", "0.1"),
)


def run_logged_engine(log: str, argv: list[str]) -> int:
    """The real engine, which notes the custom_id of each line that it has answered."""
    from blendserve.cli import serve
    from blendserve.runtime.line_client import LineClient

    start = LineClient.start

    def start_logged(self: LineClient, line: Any, *args: Any) -> Any:
        task = start(self, line, *args)

        def note(done: Any) -> None:
            if not done.cancelled() and done.exception() is None:
                with open(log, "a") as file:
                    file.write(line.custom_id + "\n")

        task.add_done_callback(note)
        return task

    LineClient.start = start_logged  # type: ignore[method-assign]
    return serve.run_engine(argv)


class Job:
    """One job, started again after each death. `model`: of the real engine; None for the fake."""

    def __init__(self, folder: Path, lines: int, model: Path | None) -> None:
        self.lines = lines
        self.folder = folder
        self.source, self.log = folder / "in.jsonl", folder / "computed"
        self.engine = [str(FAKE_ENGINE), "--delay", "0.05", "--log", str(self.log)]
        self.flags = ["--served-model-name", "fake-model"]
        if model is not None:
            self.engine = [__file__, "engine", str(self.log)]
            self.flags += ["--model-path", str(model), *_REAL_FLAGS]
        self.log.touch()
        write_job(self.source, lines, 300)
        self.process: subprocess.Popen[bytes] | None = None
        self.recomputed = 0

    def ensure_running(self) -> None:
        if self.process is None or self.process.poll() is not None:
            code = _RUN.format(engine=self.engine)
            output = ["-i", str(self.source), "-o", str(self.folder / "out.jsonl")]
            self.process = subprocess.Popen(
                [sys.executable, "-c", code, *output, *self.flags],
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
            with contextlib.suppress(FileNotFoundError):
                done |= {record.line["custom_id"] for record in read_records(path, self.lines)}
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


def kill_rounds(
    kills: int, lines: int, chance: random.Random, model: Path | None, start_seconds: float
) -> dict[str, Any]:
    """Jobs until so many kills are done; `start_seconds`: about what an engine takes to start."""
    done: Counter[str] = Counter()
    jobs: list[dict[str, Any]] = []
    while done.total() < kills:
        with tempfile.TemporaryDirectory() as name:
            job = Job(Path(name), lines, model)
            watched: list[tuple[set[str], int]] = []
            while True:
                job.ensure_running()
                assert job.process is not None
                target = len(job.computed()) + chance.randint(0, 90)
                instant = time.monotonic() + chance.uniform(0.0, 4 * start_seconds)
                while job.process.poll() is None and time.monotonic() < instant:
                    if len(job.computed()) >= target:
                        break
                    time.sleep(0.01)
                time.sleep(chance.uniform(0.0, 0.06))
                if job.process.poll() is not None or done.total() >= kills:
                    job.process.wait()
                    if not job.is_done():
                        # Its engine was killed before it had ever served: the run ends and says
                        # so, and the same command goes on.
                        continue
                    break
                victim = chance.choice(["front", "engine"])
                watched.append((job.committed(), len(job.computed())))
                if job.kill(victim):
                    done[victim] += 1
            computed = job.computed()
            # A result may be on its way into the journal while this looks; what it saw there
            # must never be computed afterwards.
            for committed, position in watched:
                job.recomputed += len(committed.intersection(computed[position:]))
            jobs.append({**job.check(), "exit_status": job.process.returncode})
            print(jobs[-1], dict(done), flush=True)
    return {"kills": dict(done), "jobs": jobs}


def side_by_side(
    kills: int, workers: int, lines: int, seed: str, model: Path | None, start_seconds: float
) -> dict[str, Any]:
    """The kills shared out to workers, each with a random sequence of its own."""
    shares = [kills // workers + (rank < kills % workers) for rank in range(workers)]
    with ThreadPoolExecutor(workers) as pool:
        parts = pool.map(
            lambda rank: kill_rounds(
                shares[rank], lines, random.Random(f"{seed} {rank}"), model, start_seconds
            ),
            range(workers),
        )
        results = list(parts)
    done: Counter[str] = Counter()
    for result in results:
        done.update(result["kills"])
    return {"kills": dict(done), "jobs": [job for result in results for job in result["jobs"]]}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--kills", type=int, default=52, help="with the fake engine")
    parser.add_argument("--real-kills", type=int, default=8, help="with the real one")
    parser.add_argument("--lines", type=int, default=500)
    parser.add_argument("--workers", type=int, default=1, help="jobs beside each other")
    parser.add_argument("--seed", type=int, default=6)
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        model = tiny_model.build(Path(name) / "tiny")
        fake = (options.kills, options.workers, options.lines, f"{options.seed} fake", None, 3.0)
        real = (options.real_kills, options.workers, options.lines, f"{options.seed} real")
        result = {
            "lines_per_job": options.lines,
            "fake": side_by_side(*fake),
            "real": side_by_side(*real, model, 15.0),
        }
    jobs = result["fake"]["jobs"] + result["real"]["jobs"]
    result["jobs"] = len(jobs)
    result["jobs_that_lost_or_doubled_a_line"] = sum(
        not job["multiset_is_the_input"] for job in jobs
    )
    result["committed_lines_computed_again"] = sum(
        job["committed_lines_computed_again"] for job in jobs
    )
    if options.json:
        save(options.json, result)
    broken = ("jobs_that_lost_or_doubled_a_line", "committed_lines_computed_again")
    return 1 if any(result[name] for name in broken) else 0


if __name__ == "__main__":
    if sys.argv[1:2] == ["engine"]:
        sys.exit(run_logged_engine(sys.argv[2], sys.argv[3:]))
    sys.exit(main())
