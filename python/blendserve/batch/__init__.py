"""The batch room: OpenAI's Files and Batches API over a durable local directory.

It speaks to an `Executor` and to nothing below it: no engine, no tensor library, no planner is
imported here. The server builds a `BatchStore` and a `BatchService` and includes the router:

    store = BatchStore(batch_dir)
    service = BatchService(store, executor)
    app.include_router(build_router(service))
    await service.start()
"""

from blendserve.batch.api import build_router, tenant_of
from blendserve.batch.bodies import content_faults, steering_faults, steering_headers
from blendserve.batch.directory import BatchDirectoryError
from blendserve.batch.engine_routes import EngineInfo, build_engine_router
from blendserve.batch.errors import ApiError, error_response
from blendserve.batch.executor import (
    BatchLine,
    EngineUnavailable,
    Executor,
    LineError,
    LineFault,
    LineResult,
    LineSource,
)
from blendserve.batch.health import build_health_router
from blendserve.batch.keys import ADMIN_SCOPE_KEY, ApiKeys, Holder, KeyFileError, KeyGuard
from blendserve.batch.limits import BatchLimits
from blendserve.batch.objects import BatchFault, BatchObject
from blendserve.batch.origin import KnownHosts, OriginGuard
from blendserve.batch.own_routes import OwnRoutes, is_own
from blendserve.batch.page import build_page_router
from blendserve.batch.progress import Progress, progress_of_programs, without_owner
from blendserve.batch.remote import (
    CACHE_SALT_HEADER,
    EngineAddress,
    RemoteExecutor,
    engine_client,
)
from blendserve.batch.service import BatchService
from blendserve.batch.store import BatchStore
from blendserve.batch.upload import timely
from blendserve.batch.webhooks import WebhookError, Webhooks

__all__ = [
    "ADMIN_SCOPE_KEY",
    "CACHE_SALT_HEADER",
    "ApiError",
    "ApiKeys",
    "BatchDirectoryError",
    "BatchFault",
    "BatchLimits",
    "BatchLine",
    "BatchObject",
    "BatchService",
    "BatchStore",
    "EngineAddress",
    "EngineInfo",
    "EngineUnavailable",
    "Executor",
    "Holder",
    "KeyFileError",
    "KeyGuard",
    "KnownHosts",
    "LineError",
    "LineFault",
    "LineResult",
    "LineSource",
    "OriginGuard",
    "OwnRoutes",
    "Progress",
    "RemoteExecutor",
    "WebhookError",
    "Webhooks",
    "build_engine_router",
    "build_health_router",
    "build_page_router",
    "build_router",
    "content_faults",
    "engine_client",
    "error_response",
    "is_own",
    "progress_of_programs",
    "steering_faults",
    "steering_headers",
    "tenant_of",
    "timely",
    "without_owner",
]
