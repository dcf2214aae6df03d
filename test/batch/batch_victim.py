"""A batch service in a process of its own, to be killed: `python batch_victim.py DIR COUNT LOG`.

Creates three batches of COUNT lines in DIR if there are none, works until they end, and exits 0.
Their custom_ids are b0r0, b0r1, ..., b1r0, ...; two lines of each fail. Two of them run at once.
"""

from __future__ import annotations

import asyncio
import hashlib
import sys
from pathlib import Path

from batch_fakes import CHAT, ENDED, FakeExecutor, chat_line, jsonl

from blendserve.batch import BatchLimits, BatchService, BatchStore
from blendserve.batch.objects import CreateBatch
from blendserve.batch.upload import Upload

WINDOWS = ("24h", "7d", "2h")


async def work(batch_dir: Path, count: int, log: Path) -> None:
    store = BatchStore(batch_dir)
    executor = FakeExecutor(delay_seconds=0.02, log=log)
    service = BatchService(store, executor, BatchLimits(max_running=2))
    known = service.list(after=None, limit=3).data
    for number, window in list(enumerate(WINDOWS))[len(known) :]:
        orders = {3: "fail", 11: "timeout"}
        data = jsonl(chat_line(f"b{number}r{i}", orders.get(i, f"say {i}")) for i in range(count))
        with store.directory.draft() as draft:
            draft.file.write(data)
            digest = hashlib.sha256(data).hexdigest()
            upload = Upload({"purpose": "batch"}, "job.jsonl", len(data), digest)
            file = service.add_upload(upload, draft)
        request = CreateBatch(input_file_id=file.id, endpoint=CHAT, completion_window=window)
        known.append(service.create(request))
    print("ready", flush=True)
    await service.start()
    while any(service.retrieve(batch.id).status not in ENDED for batch in known):
        await asyncio.sleep(0.005)
    await service.stop()
    store.close()


if __name__ == "__main__":
    asyncio.run(work(Path(sys.argv[1]), int(sys.argv[2]), Path(sys.argv[3])))
