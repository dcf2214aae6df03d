"""The database schema. Times are unix seconds; `seq` orders objects by creation.

`tenant` is the name of the API key that made an object, "" where keys are not asked for.
"""

from __future__ import annotations

from typing import Literal

from sqlalchemy import Computed, ForeignKey, Index
from sqlalchemy.orm import DeclarativeBase, Mapped, mapped_column

SCHEMA_VERSION = 5

BatchStatus = Literal[
    "validating",
    "failed",
    "in_progress",
    "finalizing",
    "completed",
    "expired",
    "cancelling",
    "cancelled",
]
BatchEnding = Literal["completed", "failed", "expired", "cancelled"]
OPEN_STATUSES = ("validating", "in_progress", "finalizing", "cancelling")
TERMINAL_STATUSES = ("completed", "failed", "expired", "cancelled")
BatchStage = Literal["validate", "run", "publish"]
STAGES: tuple[BatchStage, ...] = ("validate", "run", "publish")
STAGE_SQL = (
    "CASE WHEN status IN ('completed', 'failed', 'expired', 'cancelled') THEN NULL "
    "WHEN ending IS NOT NULL THEN 'publish' WHEN status = 'validating' THEN 'validate' "
    "WHEN status = 'in_progress' THEN 'run' END"
)


class Base(DeclarativeBase):
    pass


class FileRow(Base):
    """A file. Deleted ones stay as tombstones, so that a page cursor naming one still works.

    Its bytes lie under their digest; files with the same bytes share them.
    """

    __tablename__ = "files"
    __table_args__ = (
        Index("files_of_tenant", "tenant"),
        Index("files_by_expiry", "deleted_at", "expires_at"),
        {"sqlite_autoincrement": True},
    )

    seq: Mapped[int] = mapped_column(primary_key=True)
    id: Mapped[str] = mapped_column(unique=True)
    tenant: Mapped[str] = mapped_column(default="")
    purpose: Mapped[str]
    filename: Mapped[str]
    size_bytes: Mapped[int]
    sha256: Mapped[str] = mapped_column(index=True)
    created_at: Mapped[int]
    expires_at: Mapped[int | None]
    deleted_at: Mapped[int | None]


class BatchRow(Base):
    """A batch. `ending` is the terminal status it heads for, set once and before it gets there.

    `stage` says who has the batch, and follows from the two: the validator (validating, no
    ending), the runner (in_progress, no ending), the publisher (an ending, and not there yet), or
    nobody (None).
    """

    __tablename__ = "batches"
    __table_args__ = (
        # Each begins with what is asked for by its value, so a look costs the same however many
        # batches there are.
        Index("batches_by_stage", "stage", "tenant", "fingerprint", "expires_at", "seq"),
        Index("batches_by_expiry", "stage", "expires_at"),
        Index("batches_of_tenant", "tenant"),
        Index("batches_by_input", "input_file_id", "status"),
        {"sqlite_autoincrement": True},
    )

    seq: Mapped[int] = mapped_column(primary_key=True)
    id: Mapped[str] = mapped_column(unique=True)
    tenant: Mapped[str] = mapped_column(default="")
    endpoint: Mapped[str]
    input_file_id: Mapped[str] = mapped_column(ForeignKey("files.id"))
    completion_window: Mapped[str]
    reuse_results: Mapped[bool] = mapped_column(default=False)
    status: Mapped[str]
    ending: Mapped[str | None]
    model: Mapped[str | None]
    metadata_json: Mapped[str | None]
    errors_json: Mapped[str | None]
    output_expires_after_seconds: Mapped[int | None]

    created_at: Mapped[int]
    expires_at: Mapped[int]
    in_progress_at: Mapped[int | None]
    finalizing_at: Mapped[int | None]
    completed_at: Mapped[int | None]
    failed_at: Mapped[int | None]
    expired_at: Mapped[int | None]
    cancelling_at: Mapped[int | None]
    cancelled_at: Mapped[int | None]

    # Known once validation is through; the fingerprint is that of the engine it was made with.
    total: Mapped[int | None]
    fingerprint: Mapped[str | None]
    # Final values: while a batch runs, its journal has the truth.
    completed: Mapped[int] = mapped_column(default=0)
    failed: Mapped[int] = mapped_column(default=0)
    input_tokens: Mapped[int] = mapped_column(default=0)
    cached_tokens: Mapped[int] = mapped_column(default=0)
    output_tokens: Mapped[int] = mapped_column(default=0)
    reasoning_tokens: Mapped[int] = mapped_column(default=0)
    output_file_id: Mapped[str | None]
    error_file_id: Mapped[str | None]

    stage: Mapped[str | None] = mapped_column(Computed(STAGE_SQL, persisted=False), deferred=True)


class IdempotencyRow(Base):
    """The batch that an Idempotency-Key created, and a digest of the request that did."""

    __tablename__ = "idempotency_keys"

    tenant: Mapped[str] = mapped_column(primary_key=True)
    key: Mapped[str] = mapped_column(primary_key=True)
    request_sha256: Mapped[str]
    batch_id: Mapped[str] = mapped_column(ForeignKey("batches.id"))
    created_at: Mapped[int]


class WebhookRow(Base):
    """Somebody is to be told when a batch has ended. Made with the batch, removed once told."""

    __tablename__ = "webhooks"
    __table_args__ = (Index("webhooks_by_time", "due_at"),)

    batch_id: Mapped[str] = mapped_column(ForeignKey("batches.id"), primary_key=True)
    # None: wherever the server's own setting says when it is sent.
    url: Mapped[str | None]
    attempts: Mapped[int] = mapped_column(default=0)
    due_at: Mapped[int] = mapped_column(default=0)
