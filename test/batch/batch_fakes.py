"""A fake engine that follows orders hidden in the prompt, and helpers for jobs and polling."""

from __future__ import annotations

import asyncio
import json
import os
import time
from collections.abc import AsyncIterator, Callable, Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, TypeVar

from blendserve.batch import EngineUnavailable, LineError, LineFault, LineResult
from blendserve.batch.executor import BatchLine, LineSource

if TYPE_CHECKING:
    # Not at run time: the process that is killed and started again has no use for the SDK.
    from openai import OpenAI
    from openai.types import Batch, BatchError, BatchRequestCounts, BatchUsage

CHAT: Literal["/v1/chat/completions"] = "/v1/chat/completions"
ENDPOINTS = frozenset({CHAT, "/v1/completions", "/v1/embeddings"})
ENDED = {"completed", "failed", "expired", "cancelled"}
DEADLINE_SECONDS = 60.0

Value = TypeVar("Value")


class FakeExecutor:
    """Echoes prompts. A prompt's first word is an order: `fail`, `silent`, `crash`, ...

    `gate` (a number of answers per job, None for no limit) holds answers back; `log` gets the
    custom_id of every line that is computed, so that a test can see what a restart did again.
    `began` and `running` have the ids of the jobs that were given to it, and that it runs now.
    """

    def __init__(
        self,
        *,
        fingerprint: str = "fake-model/float32",
        delay_seconds: float = 0.0,
        parallel: int = 4,
        log: Path | None = None,
    ) -> None:
        self.endpoints = ENDPOINTS
        self.models = frozenset({"fake-model", "other-model"})
        self.fingerprint = fingerprint
        self.delay_seconds = delay_seconds
        self.parallel = parallel
        self.gate: int | None = None
        self.computed: list[str] = []
        self.began: list[str] = []
        self.running: set[str] = set()
        self.aborted = 0
        self.crashes_left = 1
        self.busy_answers = 2
        self.slow_check_seconds = 0.0
        self._log = log

    def check(self, line: BatchLine) -> LineFault | None:
        time.sleep(self.slow_check_seconds)
        order = prompt_of(line)
        if order.startswith("break-the-check"):
            raise TypeError(order)
        if order.startswith("too-long"):
            return LineFault("token_limit_exceeded", "9000 tokens are more than 4096.", "body")
        return None

    async def run(
        self,
        job_id: str,
        lines: LineSource,
        pending: Sequence[int],
        on_start: Callable[[int], None],
        deadline: float | None = None,
    ) -> AsyncIterator[LineResult]:
        answered = 0
        waiting = list(pending)
        self.began.append(job_id)
        self.running.add(job_id)
        try:
            while waiting:
                if self.gate is not None and answered >= self.gate:
                    await asyncio.sleep(0.005)
                    continue
                wave, waiting = waiting[: self.parallel], waiting[self.parallel :]
                for index in wave:
                    on_start(index)
                await asyncio.sleep(self.delay_seconds)
                # Out of order on purpose: order is not promised.
                for index in reversed(wave):
                    result = self._answer(lines.read(index))
                    if result is not None:
                        answered += 1
                        yield result
        finally:
            self.aborted += len(waiting)
            self.running.discard(job_id)

    def _answer(self, line: BatchLine) -> LineResult | None:
        prompt = prompt_of(line)
        order = prompt.split(" ", 1)[0]
        request_id = f"req-{line.index}"
        if order == "crash" and self.crashes_left > 0:
            self.crashes_left -= 1
            raise EngineUnavailable("the engine was killed")
        if order == "bug":
            raise ValueError(prompt)
        if order in ("silent", "die", "hang"):
            return None
        if order == "busy" and self.busy_answers > 0:
            self.busy_answers -= 1
            return LineResult(line.index, request_id, 503, {"error": {"message": "busy"}})
        self.computed.append(line.custom_id)
        if self._log is not None:
            with open(self._log, "a") as log:
                log.write(line.custom_id + "\n")
        if order == "timeout":
            error = LineError("request_timeout", "No answer within 10 s.")
            return LineResult(line.index, request_id, error=error)
        if order == "fail":
            body: dict[str, Any] = {"error": {"message": "no", "code": 400}}
            return LineResult(line.index, request_id, 400, body)
        if order == "unwritable":
            return LineResult(line.index, request_id, 200, {"text": "\ud800"})
        body = {
            "id": request_id,
            "choices": [{"message": {"role": "assistant", "content": prompt[::-1]}}],
            "usage": {
                "prompt_tokens": 10,
                "completion_tokens": 3,
                "total_tokens": 13,
                "prompt_tokens_details": {"cached_tokens": 4},
            },
        }
        return LineResult(line.index, request_id, 200, body)


def prompt_of(line: BatchLine) -> str:
    messages = line.body.get("messages")
    return str(messages[0]["content"]) if messages else str(line.body.get("prompt", ""))


def chat_line(custom_id: str, prompt: str = "hello", **body: Any) -> dict[str, Any]:
    message = {"role": "user", "content": prompt}
    return {
        "custom_id": custom_id,
        "method": "POST",
        "url": CHAT,
        "body": {"model": "fake-model", "messages": [message], "max_tokens": 8, **body},
    }


def jsonl(lines: Iterable[Any]) -> bytes:
    return b"".join(
        (line if isinstance(line, bytes) else json.dumps(line).encode()) + b"\n" for line in lines
    )


def job(count: int, prompts: dict[int, str] | None = None) -> bytes:
    """`count` chat lines r0, r1, ...; `prompts` gives some of them other prompts."""
    return jsonl(chat_line(f"r{i}", (prompts or {}).get(i, f"say {i}")) for i in range(count))


def submit(client: OpenAI, data: bytes, **options: Any) -> Batch:
    file = client.files.create(file=("job.jsonl", data), purpose="batch")
    return client.batches.create(
        **{
            "input_file_id": file.id,
            "endpoint": CHAT,
            "completion_window": "24h",
            **options,
        }
    )


def until(look: Callable[[], Value], good: Callable[[Value], bool]) -> Value:
    """Looks again until it is good; fails after a deadline that only a hang can reach."""
    deadline = time.monotonic() + DEADLINE_SECONDS
    while not good(value := look()):
        assert time.monotonic() < deadline, f"still not there: {value!r}"
        time.sleep(0.01)
    return value


def counts_of(batch: Batch) -> BatchRequestCounts:
    assert batch.request_counts is not None
    return batch.request_counts


def usage_of(batch: Batch) -> BatchUsage:
    assert batch.usage is not None
    return batch.usage


def faults_of(batch: Batch) -> list[BatchError]:
    assert batch.errors is not None
    assert batch.errors.object == "list"
    assert batch.errors.data is not None
    return batch.errors.data


def check_counts(batch: Batch) -> None:
    counts = counts_of(batch)
    assert counts.completed + counts.failed <= counts.total
    if batch.status in ENDED:
        assert counts.completed + counts.failed == counts.total


def finish(client: OpenAI, batch_id: str) -> Batch:
    """Polls to the end; the counts must add up in every state that is seen on the way."""

    def look() -> Batch:
        batch = client.batches.retrieve(batch_id)
        check_counts(batch)
        return batch

    return until(look, lambda batch: batch.status in ENDED)


def results(client: OpenAI, file_id: str | None) -> dict[str, dict[str, Any]]:
    """The lines of a result file by custom_id; a duplicate fails the test."""
    if file_id is None:
        return {}
    lines = [json.loads(line) for line in client.files.content(file_id).text.splitlines()]
    by_id = {line["custom_id"]: line for line in lines}
    assert len(by_id) == len(lines)
    return by_id


def all_ids(client: OpenAI, batch: Batch) -> list[str]:
    outputs = results(client, batch.output_file_id)
    errors = results(client, batch.error_file_id)
    return sorted([*outputs, *errors])


def open_descriptors() -> int:
    return len(os.listdir("/proc/self/fd"))
