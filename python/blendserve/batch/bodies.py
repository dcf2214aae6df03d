"""What can be told from a request body alone, without a model or a tokenizer."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from blendserve.batch.executor import LineFault
from blendserve.batch.limits import BatchLimits

# The field that carries the prompt, and the JSON types it may have.
_PROMPT_FIELDS: dict[str, tuple[str, tuple[type, ...]]] = {
    "/v1/chat/completions": ("messages", (list,)),
    "/v1/completions": ("prompt", (str, list)),
    "/v1/embeddings": ("input", (str, list)),
    "/v1/responses": ("input", (str, list)),
}
# The least value that each may have.
_COUNTS = {"n": 1, "max_tokens": 0, "max_completion_tokens": 0, "max_output_tokens": 0}
_MAX_CHOICES = 128
_MEDIA_FIELDS = ("image_url", "video_url", "audio_url", "file_url")


def body_faults(endpoint: str, body: dict[str, Any], limits: BatchLimits) -> Iterator[LineFault]:
    """All faults of a body but those of its model, which concern the file as a whole."""
    yield from _prompt_faults(endpoint, body)
    if body.get("stream"):
        yield LineFault(
            "invalid_value", "A batch cannot stream; leave `stream` out.", "body.stream"
        )
    if endpoint == "/v1/responses" and body.get("background"):
        yield LineFault(
            "invalid_value",
            "A batch waits for its answers; leave `background` out.",
            "body.background",
        )
    for name, least in _COUNTS.items():
        value = body.get(name)
        if value is None:
            continue
        if type(value) is not int or value < least:
            yield LineFault(
                "invalid_value", f"{name} must be a whole number from {least}.", f"body.{name}"
            )
        elif name == "n" and value > _MAX_CHOICES:
            yield LineFault("invalid_value", f"n must not exceed {_MAX_CHOICES}.", "body.n")
    if not limits.allow_remote_urls and (param := _remote_url(body)) is not None:
        yield LineFault(
            "remote_url_not_allowed",
            "This server fetches no remote media; send the content itself as a data: URL.",
            param,
        )


def _prompt_faults(endpoint: str, body: dict[str, Any]) -> Iterator[LineFault]:
    if endpoint not in _PROMPT_FIELDS:
        return
    name, types = _PROMPT_FIELDS[endpoint]
    value = body.get(name)
    if value is None:
        yield LineFault("missing_required_parameter", f"body.{name} is missing.", f"body.{name}")
    elif not isinstance(value, types):
        expected = " or ".join("a list" if kind is list else "a string" for kind in types)
        yield LineFault("invalid_type", f"{name} must be {expected}.", f"body.{name}")
    elif not value:
        yield LineFault("invalid_value", f"{name} must not be empty.", f"body.{name}")


def _remote_url(body: dict[str, Any]) -> str | None:
    """The place of the first media part whose content the server would have to fetch."""
    for field in ("messages", "input"):
        entries = body.get(field)
        for position, entry in enumerate(entries if isinstance(entries, list) else []):
            content = entry.get("content") if isinstance(entry, dict) else None
            for part in content if isinstance(content, list) else []:
                name = _remote_field(part)
                if name is not None:
                    return f"body.{field}[{position}].content.{name}"
    return None


def _remote_field(part: Any) -> str | None:
    if not isinstance(part, dict):
        return None
    for name in _MEDIA_FIELDS:
        value = part.get(name)
        url = value.get("url") if isinstance(value, dict) else value
        # Engines also take bare paths of the server's own disk, so only data: is let through.
        if isinstance(url, str) and not url.lower().startswith("data:"):
            return name
    return None
