"""The service's limits, in one place."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

MIN_EXPIRY_SECONDS = 3_600
MAX_EXPIRY_SECONDS = 2_592_000


@dataclass(frozen=True)
class BatchLimits:
    """Bounds on what a client may send, and on how much is done at once.

    The first two are OpenAI's; raise them at will.
    """

    max_lines: int = 50_000
    max_file_bytes: int = 200 * 1024 * 1024
    max_line_bytes: int = 64 * 1024 * 1024
    """A third more than the pictures in it, which are base64."""
    max_json_bytes: int = 256 * 1024
    """Size of a JSON request body, which only ever holds ids and metadata."""
    max_listed_faults: int = 1_000
    """Bad lines named one by one; the rest are counted in a last entry."""
    upload_idle_seconds: float = 60.0
    """How long an upload may stay silent, or bring less than 64 KiB, before it is given up."""
    allow_remote_urls: bool = False
    """Whether a body may name http(s) media, which the server would then fetch."""
    media_root: Path | None = None
    """Folder below which a body may name media by file: URLs."""
    mixed_endpoints: bool = False
    """Whether the lines of one file may have different urls. OpenAI's may not."""
    max_running: int = 8
    """Batches that run at once. Each holds its prompts' tokens in the planner's memory."""
    max_open_batches: int = 50_000
    """Batches of one tenant that have not ended."""

    def __post_init__(self) -> None:
        for name, value in vars(self).items():
            if type(value) is int and value < 1:
                raise ValueError(f"{name} must be at least 1, got {value}")
        if self.upload_idle_seconds <= 0:
            raise ValueError("upload_idle_seconds must be positive")
