"""The database schema. Times are unix seconds; `seq` orders objects by creation.

`tenant` is the name of the API key that made an object, "" where keys are not asked for.
"""

from __future__ import annotations

from typing import Literal

from sqlalchemy import ForeignKey, Index
from sqlalchemy.orm import DeclarativeBase, Mapped, mapped_column

SCHEMA_VERSION = 3

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
TERMINAL_STATUSES = ("completed", "failed", "expired", "cancelled")


class Base(DeclarativeBase):
    pass


class FileRow(Base):
    """A file. Deleted ones stay as tombstones, so that a page cursor naming one still works.

    Its bytes lie under their digest; files with the same bytes share them.
    """

    __tablename__ = "files"
    __table_args__ = {"sqlite_autoincrement": True}  # noqa: RUF012 - SQLAlchemy reads it as is

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

    The pair (status, ending) says who has the batch: the validator (validating, None), the runner
    (in_progress, None), the publisher (any status that is not terminal, an ending), or nobody.
    """

    __tablename__ = "batches"
    __table_args__ = (
        Index("batches_by_status", "status", "ending"),
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


class IdempotencyRow(Base):
    """The batch that an Idempotency-Key created, and a digest of the request that did."""

    __tablename__ = "idempotency_keys"

    tenant: Mapped[str] = mapped_column(primary_key=True)
    key: Mapped[str] = mapped_column(primary_key=True)
    request_sha256: Mapped[str]
    batch_id: Mapped[str] = mapped_column(ForeignKey("batches.id"))
    created_at: Mapped[int]
