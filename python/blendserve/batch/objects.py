"""The objects that clients see, field for field as OpenAI's SDK parses them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated, Generic, Literal, TypeVar

import orjson
from pydantic import BaseModel, ConfigDict, Field, StringConstraints, field_validator

from blendserve.batch.endpoints import ENDPOINTS
from blendserve.batch.limits import MAX_EXPIRY_SECONDS, MIN_EXPIRY_SECONDS
from blendserve.batch.progress import Progress, Usage
from blendserve.batch.tables import TERMINAL_STATUSES, BatchRow, BatchStatus, FileRow
from blendserve.batch.windows import window_seconds

MAX_METADATA_PAIRS = 16

MetadataKey = Annotated[str, StringConstraints(min_length=1, max_length=64)]
MetadataValue = Annotated[str, StringConstraints(max_length=512)]


class ExpiresAfter(BaseModel):
    """When a file goes: `seconds` after its creation."""

    model_config = ConfigDict(extra="forbid", strict=True)

    anchor: Literal["created_at"]
    seconds: int = Field(ge=MIN_EXPIRY_SECONDS, le=MAX_EXPIRY_SECONDS)


class CreateBatch(BaseModel):
    """The body of POST /v1/batches."""

    model_config = ConfigDict(extra="forbid", strict=True)

    input_file_id: str
    endpoint: str = Field(json_schema_extra={"enum": [*sorted(ENDPOINTS)]})
    completion_window: str = Field(json_schema_extra={"pattern": "^[1-9][0-9]{0,2}[mhd]$"})
    metadata: dict[MetadataKey, MetadataValue] | None = Field(
        default=None, max_length=MAX_METADATA_PAIRS
    )
    output_expires_after: ExpiresAfter | None = None
    reuse_results: bool = False
    """Ours: take answers of earlier batches to the same custom_id and body, by the same engine."""

    @field_validator("completion_window")
    @classmethod
    def _is_window(cls, window: str) -> str:
        window_seconds(window)
        return window


class BatchFault(BaseModel):
    """One entry of a failed batch's errors. `line` counts from 1; None means the whole file."""

    code: str
    message: str
    param: str | None = None
    line: int | None = None


class BatchFaults(BaseModel):
    object: Literal["list"] = "list"
    data: list[BatchFault]


class RequestCounts(BaseModel):
    total: int
    completed: int
    failed: int


class InputTokensDetails(BaseModel):
    cached_tokens: int


class OutputTokensDetails(BaseModel):
    reasoning_tokens: int


class BatchUsage(BaseModel):
    input_tokens: int
    input_tokens_details: InputTokensDetails
    output_tokens: int
    output_tokens_details: OutputTokensDetails
    total_tokens: int

    @classmethod
    def of(cls, usage: Usage) -> BatchUsage:
        return cls(
            input_tokens=usage.input_tokens,
            input_tokens_details=InputTokensDetails(cached_tokens=usage.cached_tokens),
            output_tokens=usage.output_tokens,
            output_tokens_details=OutputTokensDetails(reasoning_tokens=usage.reasoning_tokens),
            total_tokens=usage.input_tokens + usage.output_tokens,
        )


class BatchObject(BaseModel):
    id: str
    object: Literal["batch"] = "batch"
    endpoint: str
    model: str | None
    errors: BatchFaults | None
    input_file_id: str
    completion_window: str
    status: BatchStatus
    output_file_id: str | None
    error_file_id: str | None
    created_at: int
    in_progress_at: int | None
    expires_at: int
    finalizing_at: int | None
    completed_at: int | None
    failed_at: int | None
    expired_at: int | None
    cancelling_at: int | None
    cancelled_at: int | None
    request_counts: RequestCounts
    usage: BatchUsage
    metadata: dict[str, str] | None
    note: str | None
    """Ours: why a batch that is open does not go on for now."""

    @classmethod
    def of(cls, row: BatchRow, live: Progress | None) -> BatchObject:
        """The batch of `row`; counts come from `live` as long as it has not ended."""
        progress = progress_of(row, live)
        columns = {name: getattr(row, name) for name in cls.model_fields if hasattr(row, name)} | {
            "errors": row.errors_json and BatchFaults(data=orjson.loads(row.errors_json)),
            "request_counts": RequestCounts(
                total=progress.total, completed=progress.completed, failed=progress.failed
            ),
            "usage": BatchUsage.of(progress.usage),
            "note": progress.note,
            "metadata": None if row.metadata_json is None else orjson.loads(row.metadata_json),
        }
        return cls.model_validate(columns)


class FileObject(BaseModel):
    id: str
    object: Literal["file"] = "file"
    bytes: int
    created_at: int
    expires_at: int | None
    filename: str
    purpose: str
    # Deprecated by OpenAI, but the SDK's wait_for_processing polls it.
    status: Literal["processed"] = "processed"
    status_details: str | None = None

    @classmethod
    def of(cls, row: FileRow) -> FileObject:
        return cls(
            id=row.id,
            bytes=row.size_bytes,
            created_at=row.created_at,
            expires_at=row.expires_at,
            filename=row.filename,
            purpose=row.purpose,
        )


class FileDeleted(BaseModel):
    id: str
    object: Literal["file"] = "file"
    deleted: Literal[True] = True


Item = TypeVar("Item", BatchObject, FileObject)


class Page(BaseModel, Generic[Item]):
    """One page of a list; the next one begins `after` its last id."""

    object: Literal["list"] = "list"
    data: list[Item]
    first_id: str | None
    last_id: str | None
    has_more: bool

    @classmethod
    def of(cls, items: Sequence[Item], has_more: bool) -> Page[Item]:
        return cls(
            data=list(items),
            first_id=items[0].id if items else None,
            last_id=items[-1].id if items else None,
            has_more=has_more,
        )


class ErrorBody(BaseModel):
    message: str
    type: str
    param: str | None
    code: str | None


class ErrorObject(BaseModel):
    error: ErrorBody


def progress_of(row: BatchRow, live: Progress | None) -> Progress:
    """What to tell of a batch: the live counts while it is open, the final ones afterwards."""
    if row.status in TERMINAL_STATUSES:
        return Progress(
            total=row.total or 0,
            completed=row.completed,
            failed=row.failed,
            usage=Usage(
                row.input_tokens, row.cached_tokens, row.output_tokens, row.reasoning_tokens
            ),
            phase="ended",
        )
    return live if live is not None else Progress(total=row.total or 0)
