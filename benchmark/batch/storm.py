"""Many batches at once, deadly lines in some, while engines are killed, batches cancelled, and the
server is stopped and started; then every line is counted.

    python benchmark/batch/storm.py --json benchmark/results/batch-storm.json

Over a fake engine. At the end each custom_id stands on one line of its batch's output and errors,
and no line but the deadly ones is answered `engine_crashed`.
"""

from __future__ import annotations

import argparse
import contextlib
import random
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path
from typing import Any

import openai

sys.path.insert(0, str(Path(__file__).parents[1]))
sys.path.insert(0, str(Path(__file__).parents[2] / "test" / "batch"))

from batch_fakes import all_ids, chat_line, counts_of, finish, jsonl, results, submit
from front_server import FrontServer
from record import save

from blendserve.cli.engine_process import WatchSettings

WINDOWS = ("30m", "2h", "24h", "7d")
WATCH = WatchSettings(probe_seconds=0.5, pause_seconds=0.05)


class Storm:
    """One folder with its batches: by id, their number and how many lines they have."""

    def __init__(self, folder: Path, seed: int) -> None:
        self._folder = folder
        self._log = folder / "computed"
        self._log.touch()
        self._chance = random.Random(seed)
        self._made: dict[str, tuple[int, int]] = {}
        self.seen: Counter[str] = Counter()

    def server(self) -> FrontServer:
        options = ("--delay", "0.02", "--log", str(self._log))
        return FrontServer(self._folder / "batches", *options, watch=WATCH)

    def submit(self, server: FrontServer, batches: int) -> None:
        for number in range(batches):
            count = self._chance.randint(1, 150)
            names = [f"b{number}r{k}" for k in range(count)]
            deadly = self._deadly(number, count)
            lines = [chat_line(name, "die" if name == deadly else f"say {name}") for name in names]
            window = self._chance.choice(WINDOWS)
            batch = submit(server.client, jsonl(lines), completion_window=window)
            self._made[batch.id] = (number, count)

    def rage(self, server: FrontServer, seconds: float) -> None:
        server.wait_until_up()
        end = time.monotonic() + seconds
        while time.monotonic() < end:
            die = self._chance.random()
            if die < 0.08 and server.engine_pid is not None:
                with contextlib.suppress(ProcessLookupError):
                    server.kill_engine()
                    self.seen["engine kills"] += 1
            elif die < 0.15:
                with contextlib.suppress(openai.ConflictError):
                    server.client.batches.cancel(self._chance.choice(list(self._made)))
            time.sleep(self._chance.uniform(0.1, 0.5))

    def count(self, server: FrontServer) -> None:
        for batch_id, (number, count) in self._made.items():
            batch = finish(server.client, batch_id)
            self.seen[batch.status] += 1
            if counts_of(batch).total == 0:
                assert batch.status == "cancelled"
                continue
            assert all_ids(server.client, batch) == sorted(f"b{number}r{k}" for k in range(count))
            errors = results(server.client, batch.error_file_id)
            blamed = {name for name, line in errors.items() if _code(line) == "engine_crashed"}
            assert blamed <= {self._deadly(number, count)}
            self.seen["deadly lines found"] += len(blamed)
            self.seen["lines"] += count
        computed = Counter(self._log.read_text().split())
        self.seen["lines computed twice"] = sum(1 for times in computed.values() if times > 1)

    @staticmethod
    def _deadly(number: int, count: int) -> str | None:
        """Every fifth batch has a line that ends the engine."""
        return f"b{number}r{count // 2}" if number % 5 == 0 else None


def _code(line: dict[str, Any]) -> str | None:
    return (line["error"] or {}).get("code")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=4, help="each with a fresh directory")
    parser.add_argument("--batches", type=int, default=14)
    parser.add_argument("--servers", type=int, default=3, help="starts of the server in a round")
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    total: Counter[str] = Counter()
    for seed in range(options.rounds):
        with tempfile.TemporaryDirectory() as name:
            storm = Storm(Path(name), seed)
            for start in range(options.servers):
                with storm.server() as server:
                    if start == 0:
                        storm.submit(server, options.batches)
                    storm.rage(server, random.Random(seed).uniform(3.0, 8.0))
            with storm.server() as server:
                storm.count(server)
        print(seed, dict(storm.seen), flush=True)
        total += storm.seen
    result = {
        "rounds": options.rounds,
        "batches_per_round": options.batches,
        "server_starts_per_round": options.servers + 1,
        "seen": dict(total),
    }
    if options.json:
        save(options.json, result)


if __name__ == "__main__":
    main()
