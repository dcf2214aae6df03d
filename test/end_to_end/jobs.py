"""Requests and batch files for the end-to-end tests."""

from __future__ import annotations

import io
import json
import random
import time
from typing import Any

from openai import OpenAI
from openai.types import Batch

ENDED = ("completed", "failed", "expired", "cancelled")
WORDS = (
    *("river", "stone", "window", "garden", "letter", "market", "winter", "engine", "bottle"),
    *("paper", "island", "music", "silver", "corner", "planet", "bridge", "orange", "ticket"),
    *("number", "mirror", "7", "42", "1999", "forest", "yellow", "doctor", "candle"),
)


def mixed_requests(model: str, count: int = 60) -> list[dict[str, Any]]:
    """Batch lines of all kinds, in random order: prompts of 1 to about 700 tokens, three shared
    prefixes, answers of 1 to 32 tokens, half of them forced to full length; half of the lines are
    chat, half are completions."""
    rng = random.Random(7)

    def words(n: int) -> str:
        return " ".join(rng.choice(WORDS) for _ in range(n))

    prefixes = [words(n) for n in (220, 110, 400)]
    lines = []
    for k in range(count):
        kind = k % 5
        if k == 3:
            prompt = "a"
        elif kind < 3:
            prompt = f"{prefixes[kind]} {words(rng.randint(1, 60))}"
        else:
            prompt = words(rng.randint(1, 560))
        body: dict[str, Any] = {
            "model": model,
            "temperature": 0,
            "max_tokens": rng.randint(1, 32),
            "ignore_eos": bool(k % 2),
        }
        if k % 4 < 2:
            url = "/v1/chat/completions"
            body["messages"] = [{"role": "user", "content": prompt}]
        else:
            url = "/v1/completions"
            body["prompt"] = prompt
        lines.append({"custom_id": f"line-{k}", "method": "POST", "url": url, "body": body})
    rng.shuffle(lines)
    return lines


def submit(client: OpenAI, lines: list[dict[str, Any]] | bytes, endpoint: str) -> Batch:
    """Upload a file of lines (or raw bytes) and create a batch of it."""
    content = lines if isinstance(lines, bytes) else jsonl(lines)
    upload = client.files.create(file=("job.jsonl", io.BytesIO(content)), purpose="batch")
    return client.batches.create(
        input_file_id=upload.id,
        endpoint=endpoint,  # type: ignore[arg-type]
        completion_window="24h",
    )


def finish(client: OpenAI, batch: Batch, seconds: float = 240.0) -> Batch:
    """Wait for a batch to end; fails after a deadline that only a hang can reach."""
    deadline = time.monotonic() + seconds
    while batch.status not in ENDED:
        assert time.monotonic() < deadline, f"{batch.status}: {batch.request_counts}"
        time.sleep(0.1)
        batch = client.batches.retrieve(batch.id)
    return batch


def results(client: OpenAI, file_id: str | None) -> dict[str, dict[str, Any]]:
    """Lines of a result file by custom_id; every custom_id must stand there once."""
    if file_id is None:
        return {}
    lines = [json.loads(line) for line in client.files.content(file_id).text.splitlines()]
    by_id = {line["custom_id"]: line for line in lines}
    assert len(by_id) == len(lines)
    return by_id


def jsonl(lines: list[dict[str, Any]]) -> bytes:
    return b"".join(json.dumps(line).encode() + b"\n" for line in lines)
