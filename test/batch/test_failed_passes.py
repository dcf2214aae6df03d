"""A pass of a batch that fails costs the line that fails alone, and no other."""

from __future__ import annotations

import asyncio
import json
import math
from collections.abc import AsyncIterator, Callable, Sequence
from pathlib import Path

import httpx
import pytest
from batch_fakes import FakeExecutor, all_ids, counts_of, finish, job, prompt_of, results, submit
from batch_server import BatchServer
from fastapi import FastAPI

from blendserve.batch.engine_routes import build_engine_router
from blendserve.batch.executor import LineResult, LineSource


class PoisonedExecutor(FakeExecutor):
    """Fails before the first answer as long as a line that says `poison` is among the pending."""

    def __init__(self) -> None:
        super().__init__(parallel=64)
        self.passes = 0

    async def run(
        self,
        job_id: str,
        lines: LineSource,
        pending: Sequence[int],
        on_start: Callable[[int], None],
        deadline: float | None = None,
    ) -> AsyncIterator[LineResult]:
        self.passes += 1
        for index in pending:
            if prompt_of(lines.read(index)).startswith("poison"):
                raise OverflowError(f"line {index} is too much \ud800")
        async for result in super().run(job_id, lines, pending, on_start, deadline):
            yield result


@pytest.mark.parametrize("poisoned", [[37], [0], [59], [3, 4, 58]])
def test_a_pass_that_fails_costs_the_line_that_fails_alone(
    tmp_path: Path, poisoned: list[int]
) -> None:
    executor = PoisonedExecutor()
    with BatchServer(tmp_path, executor) as server:
        data = job(60, dict.fromkeys(poisoned, "poison"))
        batch = finish(server.client, submit(server.client, data).id)
        assert batch.status == "completed"
        assert (counts_of(batch).completed, counts_of(batch).failed) == (
            60 - len(poisoned),
            len(poisoned),
        )
        assert all_ids(server.client, batch) == sorted(f"r{i}" for i in range(60))
        errors = results(server.client, batch.error_file_id)
        assert set(errors) == {f"r{index}" for index in poisoned}
        for index in poisoned:
            error = errors[f"r{index}"]["error"]
            assert error["code"] == "internal_error"
            assert f"OverflowError: line {index} is too much" in error["message"]
    assert executor.passes <= 2 + 2 * len(poisoned) * math.ceil(math.log2(60))


def test_where_every_line_fails_alone_each_is_answered(tmp_path: Path) -> None:
    executor = PoisonedExecutor()
    with BatchServer(tmp_path, executor) as server:
        data = job(20, dict.fromkeys(range(20), "poison"))
        batch = finish(server.client, submit(server.client, data).id)
        assert (batch.status, counts_of(batch).failed) == ("completed", 20)
        messages = [
            line["error"]["message"]
            for line in results(server.client, batch.error_file_id).values()
        ]
        assert all("OverflowError" in message for message in messages)
    assert executor.passes <= 2 + 2 * 20


def test_lines_that_a_pass_leaves_out_are_tried_alone_before_they_are_given_up(
    tmp_path: Path,
) -> None:
    executor = FakeExecutor(parallel=64)
    with BatchServer(tmp_path, executor) as server:
        data = job(40, {5: "silent", 6: "silent", 39: "silent"})
        batch = finish(server.client, submit(server.client, data).id)
        assert (counts_of(batch).completed, counts_of(batch).failed) == (37, 3)
        errors = results(server.client, batch.error_file_id)
        assert set(errors) == {"r5", "r6", "r39"}
        assert "no answer" in errors["r5"]["error"]["message"]


def test_the_engine_process_tells_the_front_why_a_pass_failed(tmp_path: Path) -> None:
    app = FastAPI()
    app.include_router(build_engine_router(PoisonedExecutor(), dict, tmp_path))
    path = tmp_path / "files" / "job.jsonl"
    path.parent.mkdir()
    path.write_bytes(job(3, {1: "poison"}))
    run = {"job_id": "b", "path": str(path), "max_line_bytes": 10_000, "pending": [[0, 3]]}

    async def ask() -> str:
        transport = httpx.ASGITransport(app)
        async with httpx.AsyncClient(transport=transport, base_url="http://engine") as client:
            return (await client.post("/blendserve/jobs", json=run)).text

    assert json.loads(asyncio.run(ask()).splitlines()[-1]) == {
        "failed": "OverflowError: line 1 is too much \\ud800"
    }
