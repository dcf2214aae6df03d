"""A batch service in a process of its own, to be killed: `python batch_victim.py DIR COUNT LOG`.

Creates a batch of COUNT lines in DIR if there is none, works until it ends, and exits 0.
"""

from __future__ import annotations

import asyncio
import hashlib
import sys
from pathlib import Path

from batch_fakes import CHAT, ENDED, FakeExecutor, job

from blendserve.batch import BatchService, BatchStore
from blendserve.batch.objects import CreateBatch
from blendserve.batch.upload import Upload


async def work(batch_dir: Path, count: int, log: Path) -> None:
    store = BatchStore(batch_dir)
    service = BatchService(store, FakeExecutor(delay_seconds=0.02, log=log))
    known = service.list(after=None, limit=1).data
    if not known:
        data = job(count, {3: "fail", 11: "timeout"})
        with store.directory.draft() as draft:
            draft.file.write(data)
            digest = hashlib.sha256(data).hexdigest()
            upload = Upload({"purpose": "batch"}, "job.jsonl", len(data), digest)
            file = service.add_upload(upload, draft)
        request = CreateBatch(input_file_id=file.id, endpoint=CHAT, completion_window="24h")
        known = [service.create(request)]
    print("ready", flush=True)
    await service.start()
    while service.retrieve(known[0].id).status not in ENDED:
        await asyncio.sleep(0.005)
    await service.stop()
    store.close()


if __name__ == "__main__":
    asyncio.run(work(Path(sys.argv[1]), int(sys.argv[2]), Path(sys.argv[3])))
