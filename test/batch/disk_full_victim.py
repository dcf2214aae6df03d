"""A batch on a disk that fills up, and is freed in two steps: `python disk_full_victim.py DIR`.

DIR is a file system of 4 MB. Prints what was seen at each step, as JSON.
"""

from __future__ import annotations

import asyncio
import hashlib
import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from batch_fakes import CHAT, FakeExecutor, chat_line, jsonl

from blendserve.batch import BatchService, BatchStore
from blendserve.batch.objects import BatchObject, CreateBatch
from blendserve.batch.upload import Upload

LINES, LETTERS = 600, 1_500
BALLAST_BYTES, SMALLER_BALLAST_BYTES = 2_200_000, 1_100_000


async def until(look: Callable[[], Any], good: Callable[[Any], bool]) -> Any:
    while not good(seen := look()):
        await asyncio.sleep(0.02)
    return seen


async def work(root: Path) -> None:
    batches = root / "batches"
    store = BatchStore(batches)
    service = BatchService(store, FakeExecutor(parallel=8), retry_seconds=0.1)
    data = jsonl(chat_line(f"r{i}", f"say {i} " + "x" * LETTERS) for i in range(LINES))
    with store.directory.draft() as draft:
        draft.file.write(data)
        digest = hashlib.sha256(data).hexdigest()
        file = service.add_upload(Upload({"purpose": "batch"}, "a.jsonl", len(data), digest), draft)
    ballast = root / "ballast"
    ballast.write_bytes(b"x" * BALLAST_BYTES)
    request = CreateBatch(input_file_id=file.id, endpoint=CHAT, completion_window="24h")
    batch_id = service.create(request).id
    await service.start()

    paused = await until(lambda: service.progress(batch_id), lambda seen: seen.phase == "paused")
    report = {"note": paused.note, "done_when_full": paused.done, "files_when_full": names(batches)}

    ballast.write_bytes(b"x" * SMALLER_BALLAST_BYTES)
    await until(lambda: service.retrieve(batch_id), lambda seen: seen.status == "finalizing")
    await asyncio.sleep(0.5)
    report["status_when_full_again"] = service.retrieve(batch_id).status
    report["files_when_full_again"] = names(batches)

    ballast.unlink()
    ended: BatchObject = await until(
        lambda: service.retrieve(batch_id), lambda seen: seen.status == "completed"
    )
    _, stream = service.open_file(ended.output_file_id or "")
    with stream:
        report["ids"] = [json.loads(line)["custom_id"] for line in stream]
    await service.stop()
    store.close()
    print(json.dumps(report))


def names(batches: Path) -> int:
    """How many files there are to be downloaded."""
    return len(list((batches / "files").iterdir()))


if __name__ == "__main__":
    asyncio.run(work(Path(sys.argv[1])))
