"""How fast one-line batches run while many wait: the rate must not fall with the backlog.

    python benchmark/batch/backlog.py --json benchmark/results/batch-backlog.json

Batches over one uploaded file are put into the database in one transaction, then a service over a
fake engine in this process runs for some seconds, and those that have completed are counted.
Meanwhile one batch is read again and again, as a client would. Both backlogs are run in turns,
several times, because a machine is never equally busy for long.
"""

from __future__ import annotations

import argparse
import asyncio
import hashlib
import json
import resource
import statistics
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from sqlalchemy import func, insert, select

sys.path.insert(0, str(Path(__file__).parents[1]))
sys.path.insert(0, str(Path(__file__).parents[2] / "test" / "batch"))

from batch_fakes import CHAT, FakeExecutor, job
from record import save

from blendserve.batch import BatchService, BatchStore
from blendserve.batch.ids import new_batch_id
from blendserve.batch.tables import BatchRow
from blendserve.batch.upload import Upload


def fill(store: BatchStore, service: BatchService, count: int, tenants: int) -> list[str]:
    """Waiting batches of so many tenants, over one file each; their ids."""
    data, now = job(1), int(time.time())
    digest = hashlib.sha256(data).hexdigest()
    rows: list[dict[str, Any]] = []
    for number in range(tenants):
        tenant = f"tenant-{number}" if tenants > 1 else ""
        with store.directory.draft() as draft:
            draft.file.write(data)
            upload = Upload({"purpose": "batch"}, "a.jsonl", len(data), digest)
            file = service.add_upload(upload, draft, tenant)
        rows += [
            {
                "id": new_batch_id(),
                "tenant": tenant,
                "endpoint": CHAT,
                "input_file_id": file.id,
                "completion_window": "24h",
                "status": "validating",
                "created_at": now,
                "expires_at": now + 86_400,
            }
            for _ in range(count // tenants)
        ]
    with store._writing() as session:
        session.execute(insert(BatchRow), rows)
    return [row["id"] for row in rows]


def completed(store: BatchStore) -> int:
    with store._reading() as session:
        query = select(func.count()).where(BatchRow.status == "completed")
        return session.scalar(query) or 0


async def measure(folder: Path, count: int, seconds: float, tenants: int) -> dict[str, Any]:
    store = BatchStore(folder)
    service = BatchService(store, FakeExecutor())
    ids = fill(store, service, count, tenants)
    tenant = "tenant-0" if tenants > 1 else ""
    reads: list[float] = []
    begin = time.monotonic()
    await service.start()
    # A small backlog may be through before the time is: the rate is of the time that it took.
    while (now := time.monotonic()) < begin + seconds:
        if await asyncio.to_thread(completed, store) == len(ids):
            break
        start = time.monotonic()
        await asyncio.to_thread(service.retrieve, ids[0], tenant)
        reads.append(time.monotonic() - start)
        await asyncio.sleep(0.2)
    elapsed = now - begin
    done = completed(store)
    await service.stop()
    store.close()
    return {"completed": done, "seconds": round(elapsed, 2), "slowest_read": max(reads)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--backlogs", type=int, nargs=2, default=(300, 10_000))
    parser.add_argument("--seconds", type=float, default=20.0, help="of each run, at most")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--tenants", type=int, default=1)
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    runs: dict[int, list[dict[str, Any]]] = {count: [] for count in options.backlogs}
    for _ in range(options.rounds):
        for count, seen in runs.items():
            with tempfile.TemporaryDirectory() as name:
                folder = Path(name) / "batches"
                run = asyncio.run(measure(folder, count, options.seconds, options.tenants))
            seen.append(run)
            print(count, run, flush=True)
    rates = {
        count: statistics.median(run["completed"] / run["seconds"] for run in seen)
        for count, seen in runs.items()
    }
    few, many = (rates[count] for count in options.backlogs)
    result = {
        "tenants": options.tenants,
        "batches_per_second": {str(count): round(rate, 1) for count, rate in rates.items()},
        "ratio": round(many / few, 2),
        "slowest_read_seconds": round(max(r["slowest_read"] for s in runs.values() for r in s), 3),
        "peak_memory_mb": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024,
        "runs": {str(count): seen for count, seen in runs.items()},
    }
    print(json.dumps({k: v for k, v in result.items() if k != "runs"}, indent=2))
    if options.json:
        save(options.json, result)
    assert result["ratio"] >= 0.7, result["ratio"]


if __name__ == "__main__":
    main()
