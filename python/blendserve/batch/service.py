"""What the API can ask for: the calls of OpenAI's Files and Batches, and a batch's progress."""

from __future__ import annotations

import asyncio
import hashlib
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import BinaryIO, Literal

import orjson

from blendserve.batch.directory import Draft
from blendserve.batch.endpoints import ENDPOINTS, did_you_mean
from blendserve.batch.errors import ApiError, bad_request, conflict, not_found
from blendserve.batch.executor import EngineUnavailable, Executor
from blendserve.batch.ids import is_batch_id, is_file_id, new_batch_id, new_file_id
from blendserve.batch.journal import RecordKind
from blendserve.batch.limits import BatchLimits
from blendserve.batch.objects import (
    BatchObject,
    CreateBatch,
    ExpiresAfter,
    FileDeleted,
    FileObject,
    Page,
    progress_of,
)
from blendserve.batch.partial_results import PartialResults
from blendserve.batch.progress import Progress
from blendserve.batch.store import BatchStore
from blendserve.batch.surroundings import SavedRecords
from blendserve.batch.tables import TERMINAL_STATUSES, BatchRow, FileRow, WebhookRow
from blendserve.batch.upload import Upload
from blendserve.batch.webhooks import Webhooks, WebhookSender
from blendserve.batch.windows import window_seconds
from blendserve.batch.worker import BatchWorker

_MAX_IDEMPOTENCY_KEY_CHARS = 255
_CANCELLABLE = ("validating", "in_progress")
# As the digests of the first release have them.
_FIRST_OPTIONS = {"metadata": None, "output_expires_after": None, "reuse_results": False}


class BatchService:
    """Batches over one store and one executor.

    `start` and `stop` belong to the event loop of the server; all other methods block briefly
    (SQLite, small files) and are for worker threads. They raise ApiError for a client's fault.
    `clock` gives unix seconds; `retry_seconds` is the pause after a full disk; `on_saved` is called
    on a worker thread with a batch's id and its results, once they are durable; `in_order` sorts
    result files as the input is. `webhooks`: who is told when batches end; nobody by default.
    """

    def __init__(
        self,
        store: BatchStore,
        executor: Executor,
        limits: BatchLimits | None = None,
        *,
        clock: Callable[[], float] = time.time,
        retry_seconds: float = 5.0,
        on_saved: SavedRecords | None = None,
        in_order: bool = False,
        webhooks: Webhooks | None = None,
    ) -> None:
        self.store = store
        self.executor = executor
        self.limits = limits if limits is not None else BatchLimits()
        self._clock = clock
        self._worker = BatchWorker(
            store, executor, self.limits, self.now, retry_seconds, on_saved, in_order
        )
        self._webhooks = webhooks if webhooks is not None else Webhooks()
        self._sender = WebhookSender(store, self._webhooks, clock)
        self._partial = PartialResults(store, self._worker.durable_bytes)
        self._loop: asyncio.AbstractEventLoop | None = None

    def now(self) -> int:
        """The time in whole unix seconds."""
        return int(self._clock())

    async def start(self) -> None:
        """Takes up every batch that is not at its end: after a crash as after a clean stop."""
        self._loop = asyncio.get_running_loop()
        await self._worker.start()
        self._sender.start()

    async def stop(self) -> None:
        """Aborts what is in flight and saves what has arrived; batches go on at the next start.

        The store stays open: whoever opened it closes it.
        """
        self._loop = None
        await self._sender.stop()
        await self._worker.stop()

    def nudge(self) -> None:
        """Lets the service look for work now, e.g. after its clock was changed. Any thread."""
        self._on_loop(self._worker.wake)

    def engine_recovered(self) -> None:
        """Tells that the engine answers again after EngineUnavailable. Any thread."""
        self._on_loop(self._worker.engine_recovered)

    # -- files

    def add_upload(self, upload: Upload, draft: Draft, tenant: str = "") -> FileObject:
        """Makes a received upload a file; its bytes are durable when this returns."""
        purpose = upload.fields.get("purpose")
        if purpose is None:
            raise bad_request(
                "The field `purpose` is missing.",
                code="missing_required_parameter",
                param="purpose",
            )
        if purpose != "batch":
            raise bad_request(
                f"This server keeps files of purpose 'batch' only, not {purpose[:80]!r}.",
                code="invalid_purpose",
                param="purpose",
            )
        filename = upload.filename or ""
        if not filename.lower().endswith(".jsonl"):
            raise bad_request(
                f"The input of a batch is a .jsonl file; this one is named {filename[:80]!r}.",
                code="invalid_file_format",
                param="file",
            )
        expires_after = _expires_after(upload)
        now = self.now()
        row = FileRow(
            id=new_file_id(),
            tenant=tenant,
            purpose=purpose,
            filename=filename,
            size_bytes=upload.size_bytes,
            sha256=upload.sha256,
            created_at=now,
            expires_at=None if expires_after is None else now + expires_after.seconds,
        )
        return FileObject.of(self.store.add_file(row, draft))

    def retrieve_file(self, file_id: str, tenant: str = "") -> FileObject:
        return FileObject.of(self._file(file_id, tenant))

    def open_file(self, file_id: str, tenant: str = "") -> tuple[FileObject, BinaryIO]:
        """A file and its bytes, which stay readable even if it is deleted meanwhile."""
        row = self._file(file_id, tenant)
        try:
            return FileObject.of(row), open(self.store.directory.content(row.sha256), "rb")
        except FileNotFoundError as error:
            raise not_found("file", file_id, param="file_id") from error

    def list_files(
        self,
        *,
        after: str | None,
        limit: int,
        order: Literal["asc", "desc"],
        purpose: str | None,
        tenant: str = "",
    ) -> Page[FileObject]:
        rows, has_more = self.store.list_files(
            now=self.now(), tenant=tenant, after=after, limit=limit, order=order, purpose=purpose
        )
        return Page[FileObject].of([FileObject.of(row) for row in rows], has_more)

    def delete_file(self, file_id: str, tenant: str = "") -> FileDeleted:
        """Deletes a file; ApiError 409 while a batch reads it."""
        self.store.delete_file(self._file(file_id, tenant).id, self.now())
        return FileDeleted(id=file_id)

    # -- batches

    def create(
        self, request: CreateBatch, idempotency_key: str | None = None, tenant: str = ""
    ) -> BatchObject:
        """Creates a batch, which is validated at once and run after those before it."""
        endpoints = self._endpoints()
        if self.limits.mixed_endpoints:
            endpoints |= ENDPOINTS
        if request.endpoint not in endpoints:
            known = ", ".join(sorted(endpoints))
            raise bad_request(
                f"There is no endpoint {request.endpoint[:80]!r} for batches; "
                f"this server has {known}.{did_you_mean(request.endpoint, endpoints)}",
                code="invalid_endpoint",
                param="endpoint",
            )
        if not is_file_id(request.input_file_id):
            raise not_found("file", request.input_file_id, param="input_file_id")
        now = self.now()
        lifetime = request.output_expires_after
        row = BatchRow(
            id=new_batch_id(),
            tenant=tenant,
            endpoint=request.endpoint,
            input_file_id=request.input_file_id,
            completion_window=request.completion_window,
            reuse_results=request.reuse_results,
            status="validating",
            metadata_json=(
                None if request.metadata is None else orjson.dumps(request.metadata).decode()
            ),
            output_expires_after_seconds=None if lifetime is None else lifetime.seconds,
            created_at=now,
            expires_at=now + window_seconds(request.completion_window),
        )
        idempotency = _idempotency(idempotency_key, request)
        made = self.store.add_batch(
            row,
            now=now,
            max_open=self.limits.max_open_batches,
            idempotency=idempotency,
            webhook=self._webhook_of(row.id, request),
        )
        if made.id != row.id:
            return self.retrieve(made.id, tenant)
        self.nudge()
        return self._shown(made, None)

    def retrieve(self, batch_id: str, tenant: str = "") -> BatchObject:
        live = self._live_of(batch_id)
        return self._shown(self._batch(batch_id, tenant), live)

    def results(
        self, batch_id: str, kind: RecordKind, after: int, tenant: str = ""
    ) -> tuple[BatchObject, Iterator[bytes]]:
        """The lines of a result file that are durable so far, behind the first `after`, and the
        batch as it was before they were looked for: if it has ended, these are all."""
        while True:
            live = self._live_of(batch_id)
            row = self._batch(batch_id, tenant)
            try:
                lines = self._partial.lines(row, kind, after, self.now())
            except FileNotFoundError as error:
                raise not_found("file", f"{row.id}_{kind}.jsonl") from error
            if lines is not None:
                return self._shown(row, live), lines

    def list(self, *, after: str | None, limit: int, tenant: str = "") -> Page[BatchObject]:
        live = self._worker.live.copy()
        rows, has_more = self.store.list_batches(tenant=tenant, after=after, limit=limit)
        return Page[BatchObject].of([self._shown(row, live.get(row.id)) for row in rows], has_more)

    def cancel(self, batch_id: str, tenant: str = "") -> BatchObject:
        """Begins to cancel; finished lines are kept. Cancelling twice is no error.

        ApiError 409 once the batch is at its end or on the way to another one.
        """
        live = self._live_of(batch_id)
        self._batch(batch_id, tenant)
        row = self.store.advance(
            batch_id,
            _CANCELLABLE,
            status="cancelling",
            ending="cancelled",
            cancelling_at=self.now(),
        )
        if row is None:
            row = self._batch(batch_id, tenant)
            if row.ending != "cancelled":
                about_to = "" if row.status in TERMINAL_STATUSES else "about to be "
                raise conflict(
                    f"A batch that is {about_to}{row.ending or row.status} cannot be cancelled.",
                    code="batch_not_cancellable",
                )
        self._on_loop(self._worker.interrupt, [batch_id])
        return self._shown(row, live)

    def progress(self, batch_id: str, tenant: str = "") -> Progress:
        """A snapshot of a batch's counts, tokens and phase, for a status page."""
        live = self._live_of(batch_id)
        row = self._batch(batch_id, tenant)
        return progress_of(row, self._paused(row, live))

    def live_progress(self, batch_id: str) -> Progress:
        """The counts of an open batch, whoever's it is; zeros for any other."""
        return self._live_of(batch_id) or Progress()

    # -- inside

    def _live_of(self, batch_id: str) -> Progress | None:
        """The live counts of an open batch. To be read before its row, never after it.

        They are dropped once the row has the final counts: whoever reads the row first may find
        it still open and its live counts gone.
        """
        return self._worker.live.get(batch_id)

    def _shown(self, row: BatchRow, live: Progress | None) -> BatchObject:
        return BatchObject.of(row, self._paused(row, live))

    def _paused(self, row: BatchRow, live: Progress | None) -> Progress | None:
        """The live counts, with why the batch waits if it does so for an engine."""
        if row.status != "in_progress" or row.ending is not None:
            return live
        if live is not None and live.phase == "running":
            return live
        note = self._worker.waits_for(row)
        if note is None:
            return live
        return replace(live or Progress(total=row.total or 0), phase="paused", note=note)

    def _webhook_of(self, batch_id: str, request: CreateBatch) -> WebhookRow | None:
        url = self._webhooks.wanted_by(request.metadata)
        if url is None and not self._webhooks.url:
            return None
        return WebhookRow(batch_id=batch_id, url=url)

    def _endpoints(self) -> frozenset[str]:
        try:
            return self.executor.endpoints
        except EngineUnavailable:
            # It loads. Validation waits for it, and refuses what it turns out not to serve.
            return ENDPOINTS

    def _file(self, file_id: str, tenant: str) -> FileRow:
        row = self.store.find_file(file_id, self.now(), tenant) if is_file_id(file_id) else None
        if row is None:
            raise not_found("file", file_id, param="file_id")
        return row

    def _batch(self, batch_id: str, tenant: str) -> BatchRow:
        row = self.store.find_batch(batch_id) if is_batch_id(batch_id) else None
        if row is None or row.tenant != tenant:
            raise not_found("batch", batch_id, param="batch_id")
        return row

    def _on_loop(self, function: Callable[..., None], *args: object) -> None:
        loop = self._loop
        # Before the start there is nobody to tell: starting looks for work anyway.
        if loop is not None and not loop.is_closed():
            loop.call_soon_threadsafe(function, *args)


def _idempotency(key: str | None, request: CreateBatch) -> tuple[str, str] | None:
    if key is None:
        return None
    if not 0 < len(key) <= _MAX_IDEMPOTENCY_KEY_CHARS:
        raise ApiError(
            400,
            f"An Idempotency-Key has 1 to {_MAX_IDEMPOTENCY_KEY_CHARS} characters.",
            code="invalid_idempotency_key",
        )
    # Fields that came later count where they are given, so that a new one changes no digest.
    given = {**_FIRST_OPTIONS, **request.model_dump(exclude_defaults=True)}
    canonical = orjson.dumps(given, option=orjson.OPT_SORT_KEYS)
    return key, hashlib.sha256(canonical).hexdigest()


def _expires_after(upload: Upload) -> ExpiresAfter | None:
    prefix = "expires_after["
    given = {
        name[len(prefix) : -1]: value
        for name, value in upload.fields.items()
        if name.startswith(prefix) and name.endswith("]")
    }
    if not given:
        return None
    try:
        return ExpiresAfter.model_validate({**given, "seconds": int(given.get("seconds", ""))})
    except ValueError as error:
        raise bad_request(
            'expires_after needs anchor "created_at" and seconds from 3600 to 2592000.',
            code="invalid_value",
            param="expires_after",
        ) from error
