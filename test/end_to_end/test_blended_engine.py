"""What the plan promises, on a real engine: prefixes found, no memory lost, nothing left over."""

from __future__ import annotations

import random
import time
from typing import Any

import httpx
import numpy as np
import pytest
from conftest import MODEL_NAME, Server
from jobs import finish, results, submit

from blendserve.planner import PrefixTree

COMPLETIONS = "/v1/completions"
KV_TOKENS = 3000  # The pool of conftest.ENGINE_FLAGS.


def line(number: int, prompt: list[int], tokens: int, **body: Any) -> dict[str, Any]:
    body |= {"model": MODEL_NAME, "prompt": prompt, "max_tokens": tokens, "temperature": 0}
    return {
        "custom_id": f"{number}",
        "method": "POST",
        "url": COMPLETIONS,
        "body": {**body, "ignore_eos": True},
    }


def reported(server: Server) -> dict[str, Any]:
    """What the scheduler last said; nothing has run where it has not said anything."""
    reports = httpx.get(f"{server.url}/blendserve/status").json()["schedulers"]
    return dict(reports[0]) if reports else {"steps": 0, "retractions": 0}


def idle_after(server: Server, steps: int) -> dict[str, Any]:
    """The scheduler's report of a later step at which nothing ran or waited."""
    deadline = time.monotonic() + 60
    while True:
        report = reported(server)
        if report["steps"] > steps and not any(
            (*report["running"].values(), *report["queued"].values())
        ):
            return report
        assert time.monotonic() < deadline, report
        time.sleep(0.3)


@pytest.fixture(scope="module")
def exam() -> list[dict[str, Any]]:
    """Sixteen groups of four questions behind 560 tokens each: three times the pool, most prefixes
    longer than two chunks of prefill; and twelve long generations. Random order."""
    rng = random.Random(3)

    def tokens(n: int) -> list[int]:
        return [rng.randrange(300, 900) for _ in range(n)]

    lines = []
    for _ in range(16):
        prefix = tokens(560)
        lines += [(prefix + tokens(rng.randint(5, 40)), 2) for _ in range(4)]
    lines += [(tokens(10), 60) for _ in range(12)]
    rng.shuffle(lines)
    return [line(k, prompt, length) for k, (prompt, length) in enumerate(lines)]


def test_prefixes_of_three_times_the_pool_are_computed_once(
    blend: Server, exam: list[dict[str, Any]]
) -> None:
    tree = PrefixTree.build([np.array(one["body"]["prompt"], dtype=np.int32) for one in exam])
    best = tree.prompt_tokens - tree.unique_tokens
    assert tree.unique_tokens > 2.9 * KV_TOKENS
    httpx.post(f"{blend.url}/flush_cache").raise_for_status()
    before = reported(blend)
    batch = finish(blend.client, submit(blend.client, exam, COMPLETIONS))
    assert batch.usage is not None
    assert batch.usage.input_tokens_details.cached_tokens >= 0.98 * best
    # All lengths are known here, so no one's memory is ever taken away.
    assert idle_after(blend, before["steps"])["retractions"] == before["retractions"]


def test_jobs_cancelled_and_requests_dropped_leave_nothing_behind(blend: Server) -> None:
    rng = random.Random(5)
    for job in range(4):
        before = reported(blend)
        lines = [
            line(k, [rng.randrange(300, 900) for _ in range(rng.randint(1, 400))], 40)
            for k in range(40)
        ]
        batch = submit(blend.client, lines, COMPLETIONS)
        deadline = time.monotonic() + 60
        while batch.status == "validating" or not batch.request_counts:
            assert time.monotonic() < deadline, batch
            batch = blend.client.batches.retrieve(batch.id)
        # A client that goes away in the middle of its stream.
        body = {"model": MODEL_NAME, "prompt": "river stone", "max_tokens": 500, "stream": True}
        body |= {"ignore_eos": True}
        with httpx.stream("POST", f"{blend.url}{COMPLETIONS}", json=body, timeout=60) as stream:
            next(stream.iter_lines())
        if job % 2:
            blend.client.batches.cancel(batch.id)
        batch = finish(blend.client, batch)
        assert batch.status == ("cancelled" if job % 2 else "completed"), batch
        done = results(blend.client, batch.output_file_id) if batch.output_file_id else {}
        assert batch.request_counts is not None
        assert len(done) == batch.request_counts.completed
        # Free again to the last token: SGLang counts what the cache could give back as free.
        after = idle_after(blend, before["steps"])
        assert after["kv_free_tokens"] == after["kv_total_tokens"]
