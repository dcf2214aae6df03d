"""Identifiers: a fixed prefix and 32 hex digits, so that none can be mistaken for a path."""

from __future__ import annotations

import hashlib
import re
import secrets

FILE_PREFIX = "file-"
BATCH_PREFIX = "batch_"
REQUEST_PREFIX = "batch_req_"

# \Z, not $: `$` would also accept a trailing newline.
_FILE_ID = re.compile(r"file-[0-9a-f]{32}\Z")
_BATCH_ID = re.compile(r"batch_[0-9a-f]{32}\Z")
_SHA256 = re.compile(r"[0-9a-f]{64}\Z")


def new_file_id() -> str:
    return FILE_PREFIX + secrets.token_hex(16)


def new_batch_id() -> str:
    return BATCH_PREFIX + secrets.token_hex(16)


def is_file_id(text: str) -> bool:
    return _FILE_ID.match(text) is not None


def is_batch_id(text: str) -> bool:
    return _BATCH_ID.match(text) is not None


def is_sha256(text: str) -> bool:
    return _SHA256.match(text) is not None


def derived_file_id(batch_id: str, role: str) -> str:
    """The id of a batch's `role` file: always the same, so that publishing twice is harmless."""
    return FILE_PREFIX + _digest(f"{batch_id}/{role}")


def request_line_id(batch_id: str, index: int) -> str:
    """The id of a line in an output or error file: the same after any number of restarts."""
    return REQUEST_PREFIX + _digest(f"{batch_id}/{index}")


def _digest(text: str) -> str:
    return hashlib.blake2b(text.encode(), digest_size=16).hexdigest()
