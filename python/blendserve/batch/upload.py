"""Receiving a multipart upload: straight to disk in chunks, and never more than is allowed."""

from __future__ import annotations

import asyncio
import hashlib
from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from python_multipart.exceptions import FormParserError
from python_multipart.multipart import MultipartParser, parse_options_header
from starlette.requests import ClientDisconnect, Request

from blendserve.batch.directory import Draft
from blendserve.batch.errors import ApiError, bad_request
from blendserve.batch.limits import BatchLimits

if TYPE_CHECKING:
    from python_multipart.multipart import MultipartCallbacks

_MAX_FIELD_BYTES = 4 * 1024
_MAX_PARTS = 16
_WRITE_BLOCK_BYTES = 1 << 20
_MAX_FILENAME_CHARS = 255
# Of a form beside its file: boundaries, headers, fields, and what comes after the last boundary.
_MAX_REST_BYTES = 64 * 1024
# So much must come in the time that an upload may be silent; a drip would otherwise never end.
_PACE_BYTES = 64 * 1024


@dataclass
class Upload:
    """What came in: the form's fields, and the file's name, size and digest."""

    fields: dict[str, str] = field(default_factory=dict)
    filename: str | None = None
    size_bytes: int = 0
    sha256: str = ""


async def receive_upload(
    request: Request, open_draft: Callable[[], Draft], limits: BatchLimits
) -> tuple[Upload, Draft]:
    """Writes the part named `file` into a draft, opened when that part begins, and returns it with
    the rest of the form.

    Raises ApiError: 400 for a broken form or a file above `max_file_bytes`, 413 for a form with too
    much beside its file, 408 for an upload that falls silent; and OSError when the disk is full.
    Disk writes happen in a worker thread.
    """
    content_type, options = parse_options_header(request.headers.get("content-type"))
    boundary = options.get(b"boundary")
    if content_type != b"multipart/form-data" or not boundary:
        raise bad_request(
            "Upload the file as multipart/form-data with the fields `file` and `purpose`.",
            code="invalid_content_type",
        )
    receiver = _FormReceiver(open_draft, limits.max_file_bytes)
    seen = 0
    try:
        parser = MultipartParser(boundary, receiver.callbacks())
        block = bytearray()
        async for chunk in timely(request.stream(), limits.upload_idle_seconds):
            seen += len(chunk)
            block += chunk
            if len(block) >= _WRITE_BLOCK_BYTES:
                await asyncio.to_thread(parser.write, bytes(block))
                block.clear()
                if seen - receiver.file_bytes > _MAX_REST_BYTES:
                    raise ApiError(
                        413,
                        f"The form has more than {_MAX_REST_BYTES} bytes beside its file.",
                        code="body_too_large",
                    )
        await asyncio.to_thread(parser.write, bytes(block))
        parser.finalize()
    except FormParserError as error:
        raise bad_request(f"The form cannot be read: {error}", code="invalid_form") from error
    except ClientDisconnect as error:
        raise bad_request("The upload ended early.", code="upload_incomplete") from error
    if not receiver.is_complete:
        raise bad_request("The form ends before its last boundary.", code="invalid_form")
    return receiver.result()


async def timely(stream: AsyncIterator[bytes], idle_seconds: float) -> AsyncIterator[bytes]:
    """The blocks of a request's body; raises ApiError 408 when they come too slowly."""
    clock = asyncio.get_running_loop().time
    patience, received = idle_seconds, 0
    while True:
        before = clock()
        try:
            chunk = await asyncio.wait_for(anext(stream), patience)
        except StopAsyncIteration:
            return
        except TimeoutError as error:
            raise too_slow(idle_seconds) from error
        # Only what the client lets us wait for, and not our own disk, wears the patience down.
        patience -= clock() - before
        yield chunk
        received += len(chunk)
        if received >= _PACE_BYTES:
            patience, received = idle_seconds, 0


def too_slow(idle_seconds: float) -> ApiError:
    """The error of a request that falls silent, or comes a few bytes at a time."""
    return ApiError(
        408,
        f"The request came too slowly: less than {_PACE_BYTES} bytes in {idle_seconds:g} s.",
        code="upload_timeout",
    )


class _FormReceiver:
    """The parser's callbacks: small parts become fields, the part `file` goes to the draft."""

    def __init__(self, open_draft: Callable[[], Draft], max_file_bytes: int) -> None:
        self._open_draft = open_draft
        self._draft: Draft | None = None
        self._parts = 0
        self._max_file_bytes = max_file_bytes
        self._digest = hashlib.sha256()
        self._upload = Upload()
        self._header_name = b""
        self._header_value = b""
        self._disposition = b""
        self._name = ""
        self._value = bytearray()
        self._in_file = False
        self.is_complete = False

    def callbacks(self) -> MultipartCallbacks:
        return {
            "on_part_begin": self._on_part_begin,
            "on_header_field": self._on_header_field,
            "on_header_value": self._on_header_value,
            "on_header_end": self._on_header_end,
            "on_headers_finished": self._on_headers_finished,
            "on_part_data": self._on_part_data,
            "on_part_end": self._on_part_end,
            "on_end": self._on_end,
        }

    @property
    def file_bytes(self) -> int:
        """That the file has so far."""
        return self._upload.size_bytes

    def result(self) -> tuple[Upload, Draft]:
        if self._draft is None:
            raise bad_request(
                "The form has no part `file` with a file name.",
                code="missing_required_parameter",
                param="file",
            )
        self._upload.sha256 = self._digest.hexdigest()
        return self._upload, self._draft

    def _on_part_begin(self) -> None:
        self._parts += 1
        if self._parts > _MAX_PARTS:
            raise bad_request("The form has too many parts.", code="invalid_form")
        self._disposition = b""
        self._value.clear()

    def _on_header_field(self, data: bytes, start: int, end: int) -> None:
        self._header_name += data[start:end]

    def _on_header_value(self, data: bytes, start: int, end: int) -> None:
        self._header_value += data[start:end]

    def _on_header_end(self) -> None:
        if self._header_name.lower() == b"content-disposition":
            self._disposition = self._header_value
        self._header_name = self._header_value = b""

    def _on_headers_finished(self) -> None:
        _, options = parse_options_header(self._disposition)
        name, filename = options.get(b"name"), options.get(b"filename")
        if name is None:
            raise bad_request("A part of the form has no name.", code="invalid_form")
        self._name = name.decode("utf-8", "replace")
        self._in_file = self._name == "file" and filename is not None
        if self._in_file and filename is not None:
            if self._draft is not None:
                raise bad_request("Send one file at a time.", code="invalid_form", param="file")
            self._upload.filename = _display_name(filename)
            self._draft = self._open_draft()

    def _on_part_data(self, data: bytes, start: int, end: int) -> None:
        if not self._in_file or self._draft is None:
            self._value += data[start:end]
            if len(self._value) > _MAX_FIELD_BYTES:
                raise bad_request(
                    f"The field {self._name[:80]!r} is longer than {_MAX_FIELD_BYTES} bytes.",
                    code="invalid_form",
                )
            return
        self._upload.size_bytes += end - start
        if self._upload.size_bytes > self._max_file_bytes:
            raise bad_request(
                f"The file is larger than {self._max_file_bytes} bytes. Split it into several "
                "batches, or raise the server's limit.",
                code="file_too_large",
                param="file",
            )
        part = data[start:end]
        self._digest.update(part)
        self._draft.file.write(part)

    def _on_part_end(self) -> None:
        if self._in_file:
            return
        self._upload.fields[self._name] = self._value.decode("utf-8", "replace")

    def _on_end(self) -> None:
        self.is_complete = True


def _display_name(filename: bytes) -> str:
    """The client's file name, for show only: no folders, no control characters."""
    text = filename.decode("utf-8", "replace").replace("\\", "/").rsplit("/", 1)[-1]
    return "".join(char for char in text if char.isprintable())[-_MAX_FILENAME_CHARS:]
