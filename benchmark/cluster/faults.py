"""Random faults while jobs run: no line is lost, and none is answered twice.

    python benchmark/cluster/faults.py [--faults 50] [--lines 500]

A job over three engines without a model, behind wires (test/runtime/cluster_fakes.py); while it
runs, one engine after another is killed, stops, hangs, is cut off and comes back, leaves, or joins.
Ends with an error at the first job that is not whole.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import logging
import random
import sys
import time
from collections import Counter
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[2]
sys.path += [str(ROOT / "benchmark"), str(ROOT / "test" / "runtime")]

from cluster_fakes import KEY, FakeCluster, FakeEngine  # noqa: E402
from record import save  # noqa: E402

from blendserve.batch import EngineAddress, EngineUnavailable  # noqa: E402

FAULTS = ("kill", "stop", "hang", "cut off and back", "stopped and back", "leave", "join")
FOR_GOOD = FAULTS[:3] + FAULTS[5:6]
MOST_SECONDS = 300.0


class Job:
    """One job and its faults. Suspects are asked for again, as the front does."""

    def __init__(self, seed: int, lines: int, faults: int) -> None:
        self.chance = random.Random(seed)
        self.bodies = [
            {"prompt": [n % 20, *range(500, 530), 1_000 + n], "max_tokens": n % 7 + 2}
            for n in range(lines)
        ]
        self.left = faults
        self.out: set[int] = set()
        self.done: list[str] = []
        self.answers: Counter[int] = Counter()
        self.suspected = 0

    async def run(self) -> None:
        engines = [FakeEngine(slots=6) for _ in range(3)]
        patience = {"engine_silent_seconds": 1.5, "engine_hang_seconds": 1.0}
        async with asyncio.timeout(MOST_SECONDS), FakeCluster(engines, **patience) as cluster:
            pending = list(range(len(self.bodies)))
            while pending:
                try:
                    async for result in cluster.run(self.bodies, pending=pending):
                        self.answers[result.index] += 1
                        assert result.status_code == 200, result
                        if self._is_time():
                            await self._do(cluster)
                except EngineUnavailable as told:
                    self.suspected += len(told.in_flight)
                pending = [index for index in pending if index not in self.answers]
        assert self.answers == Counter(range(len(self.bodies))), "lines are lost or doubled"

    def _is_time(self) -> bool:
        progress = len(self.answers) / len(self.bodies)
        return self.left > 0 and self.chance.random() < 0.02 + 0.2 * (progress > 0.7)

    async def _do(self, cluster: FakeCluster) -> None:
        self.left -= 1
        fault = self.chance.choice(FAULTS)
        # One that is not out for good, of which one must be left.
        number = self.chance.choice([k for k in range(len(cluster.engines)) if k not in self.out])
        wire, engine = cluster.wires[number], cluster.engines[number]
        if fault in FOR_GOOD and len(cluster.engines) - len(self.out) < 2:
            fault = "join"
        if fault in FOR_GOOD:
            self.out.add(number)
        if fault == "join":
            fresh = FakeEngine(slots=6)
            await cluster.join(fresh)
            cluster.engines.append(fresh)
        elif fault == "kill":
            wire.cut()
        elif fault == "stop":
            wire.hold()
        elif fault == "hang":
            engine.healthy, engine.slots = False, 0
        elif fault == "leave":
            await cluster.executor.cluster.remove(EngineAddress(wire.url, KEY), "it was asked to")
        elif fault == "cut off and back":
            wire.cut()
            asyncio.get_running_loop().call_later(self.chance.uniform(0, 1), wire.mend)
        else:
            wire.hold()
            asyncio.get_running_loop().call_later(self.chance.uniform(0, 3), wire.mend)
        self.done.append(fault)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--faults", type=int, default=50)
    parser.add_argument("--faults-per-job", type=int, default=5)
    parser.add_argument("--lines", type=int, default=500)
    parser.add_argument("--out", type=Path, default=ROOT / "benchmark/results/cluster-faults.json")
    options = parser.parse_args()
    logging.getLogger("blendserve").setLevel(logging.CRITICAL)
    kinds: Counter[str] = Counter()
    jobs: list[dict[str, Any]] = []
    while kinds.total() < options.faults:
        job = Job(len(jobs), options.lines, options.faults_per_job)
        began = time.monotonic()
        asyncio.run(job.run())
        kinds.update(job.done)
        jobs.append(
            {"faults": job.done, "suspects": job.suspected, "seconds": time.monotonic() - began}
        )
        print(len(jobs), job.done, flush=True)
    result = {
        "lines_per_job": options.lines,
        "jobs": len(jobs),
        "faults": dict(kinds),
        "lines_lost": 0,
        "lines_doubled": 0,
        "lines_told_as_suspects": sum(job["suspects"] for job in jobs),
    }
    save(options.out, result)
    print(json.dumps(result, indent=1))


if __name__ == "__main__":
    main()
