"""Counting what a batch has done: lines, and the tokens that its answers report."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

BatchPhase = Literal["waiting", "running", "paused", "ended"]


@dataclass(frozen=True)
class Usage:
    """Tokens: of prompts, of those the ones found in the cache, of answers, of reasoning."""

    input_tokens: int = 0
    cached_tokens: int = 0
    output_tokens: int = 0
    reasoning_tokens: int = 0

    def plus(self, other: Usage) -> Usage:
        return Usage(
            self.input_tokens + other.input_tokens,
            self.cached_tokens + other.cached_tokens,
            self.output_tokens + other.output_tokens,
            self.reasoning_tokens + other.reasoning_tokens,
        )


@dataclass(frozen=True)
class Progress:
    """A snapshot of one batch. `completed + failed <= total`, and everything in it is durable.

    `recovered` of the done lines were found in the journal when this process took the batch up at
    `started_at` (unix seconds, None while it waits), so a rate is (done - recovered) / elapsed.
    `retried` counts answers that were not final (the engine was busy) and `suspects` the lines that
    wait to run alone because the engine died with them. `note` says why a batch is paused.
    """

    total: int = 0
    completed: int = 0
    failed: int = 0
    usage: Usage = Usage()
    recovered: int = 0
    retried: int = 0
    suspects: int = 0
    started_at: float | None = None
    phase: BatchPhase = "waiting"
    note: str | None = None

    @property
    def done(self) -> int:
        return self.completed + self.failed


def progress_of_programs(job: Mapping[str, Any]) -> Progress:
    """The engine's view of a job of frontend programs, in the shape of a batch's progress. It is no
    batch: the engine alone knows it, and nothing of it is durable."""
    return Progress(
        total=job["programs"],
        completed=max(job["ended"] - job["failed"], 0),
        failed=job["failed"],
        usage=Usage(job["answered_prompt_tokens"], job["answered_cached_tokens"]),
        started_at=job["started_at"],
        phase="running",
    )


def without_owner(job: Mapping[str, Any]) -> dict[str, Any]:
    """The engine's view of a job as it may be shown: the owner's name there is a secret."""
    return {name: value for name, value in job.items() if name != "owner"}


def usage_of(body: Mapping[str, Any] | None) -> Usage:
    """The tokens that a response body reports; zeros where it reports none.

    Knows the spelling of chat, completions and embeddings (prompt_tokens) and that of responses
    (input_tokens).
    """
    usage = body.get("usage") if body is not None else None
    if not isinstance(usage, Mapping):
        return Usage()
    output_details = _either(usage, "completion_tokens_details", "output_tokens_details")
    return Usage(
        input_tokens=_count(_either(usage, "prompt_tokens", "input_tokens")),
        cached_tokens=_detail(
            _either(usage, "prompt_tokens_details", "input_tokens_details"), "cached_tokens"
        ),
        output_tokens=_count(_either(usage, "completion_tokens", "output_tokens")),
        reasoning_tokens=_detail(output_details, "reasoning_tokens")
        or _count(usage.get("reasoning_tokens")),
    )


def _either(usage: Mapping[str, Any], name: str, other: str) -> Any:
    value = usage.get(name)
    return usage.get(other) if value is None else value


def _detail(details: Any, name: str) -> int:
    return _count(details.get(name)) if isinstance(details, Mapping) else 0


def _count(value: Any) -> int:
    return value if isinstance(value, int) and value > 0 else 0
