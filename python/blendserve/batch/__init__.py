"""The batch room: OpenAI's Files and Batches API over a durable local directory.

It speaks to an `Executor` and to nothing below it: no engine, no tensor library, no planner is
imported here. The server builds a `BatchStore` and a `BatchService` and includes the router:

    store = BatchStore(batch_dir)
    service = BatchService(store, executor)
    app.include_router(build_router(service))
    await service.start()
"""

from blendserve.batch.api import build_router
from blendserve.batch.directory import BatchDirectoryError
from blendserve.batch.executor import (
    BatchLine,
    EngineUnavailable,
    Executor,
    LineError,
    LineFault,
    LineResult,
    LineSource,
)
from blendserve.batch.limits import BatchLimits
from blendserve.batch.progress import Progress
from blendserve.batch.service import BatchService
from blendserve.batch.store import BatchStore

__all__ = [
    "BatchDirectoryError",
    "BatchLimits",
    "BatchLine",
    "BatchService",
    "BatchStore",
    "EngineUnavailable",
    "Executor",
    "LineError",
    "LineFault",
    "LineResult",
    "LineSource",
    "Progress",
    "build_router",
]
