"""Blended scheduling changes when a request runs, and never what it answers."""

from __future__ import annotations

import concurrent.futures
import threading
import time
from typing import Any

import httpx
import pytest
from conftest import MODEL_NAME, Server
from jobs import finish, mixed_requests, results, submit

# Output tokens of the requests that are aborted on the way.
LONG = 300
ENDPOINTS = ("/v1/chat/completions", "/v1/completions")


def comparable(body: dict[str, Any]) -> dict[str, Any]:
    """A response body without what differs between two identical online calls: its id, its time,
    and how much of its prompt happened to be in the cache."""
    usage = {k: v for k, v in body["usage"].items() if k != "prompt_tokens_details"}
    return {**{k: v for k, v in body.items() if k not in ("id", "created")}, "usage": usage}


@pytest.fixture(scope="module")
def lines() -> list[dict[str, Any]]:
    return mixed_requests(MODEL_NAME)


@pytest.fixture(scope="module")
def online(stock: Server, lines: list[dict[str, Any]]) -> dict[str, dict[str, Any]]:
    """What stock SGLang answers online, all sent at once."""

    def call(line: dict[str, Any]) -> tuple[str, dict[str, Any]]:
        response = httpx.post(stock.url + line["url"], json=line["body"], timeout=300)
        assert response.status_code == 200, response.text
        return line["custom_id"], response.json()

    with concurrent.futures.ThreadPoolExecutor(len(lines)) as threads:
        return dict(threads.map(call, lines))


@pytest.mark.parametrize("endpoint", ENDPOINTS)
def test_batched_answers_are_the_bodies_that_stock_sglang_gives_online(
    blend: Server,
    online: dict[str, dict[str, Any]],
    lines: list[dict[str, Any]],
    endpoint: str,
) -> None:
    chosen = [line for line in lines if line["url"] == endpoint]
    batch = finish(blend.client, submit(blend.client, chosen, endpoint))
    assert batch.status == "completed", batch.errors
    answers = results(blend.client, batch.output_file_id)
    assert answers.keys() == {line["custom_id"] for line in chosen}
    for custom_id, answer in answers.items():
        assert answer["response"]["status_code"] == 200
        assert comparable(answer["response"]["body"]) == comparable(online[custom_id])


def prompt_of(line: dict[str, Any]) -> str:
    return str(line["body"].get("prompt") or line["body"]["messages"][0]["content"])


def call_generate(server: Server, rank: int, line: dict[str, Any]) -> dict[str, Any]:
    """One line through the engine's own route, where the token ids themselves can be seen."""
    body = line["body"]
    sampling = {
        "temperature": 0,
        "max_new_tokens": body["max_tokens"],
        "ignore_eos": body["ignore_eos"],
    }
    request = {"text": prompt_of(line), "sampling_params": sampling, "rid": f"rid-{rank:04d}"}
    response = httpx.post(f"{server.url}/generate", json=request, timeout=300)
    # An abort that meets a request before it has run is answered as a client's error.
    return dict(response.json())


def as_completion(rank: int, line: dict[str, Any]) -> dict[str, Any]:
    """The same request as a line of a batch; only those are planned."""
    body = line["body"]
    kept = {name: body[name] for name in ("model", "max_tokens", "ignore_eos")}
    completion = {**kept, "prompt": prompt_of(line), "temperature": 0}
    return {**line, "custom_id": str(rank), "url": ENDPOINTS[1], "body": completion}


def test_planned_requests_give_stock_sglangs_tokens_one_for_one(
    stock: Server, blend: Server
) -> None:
    """300 requests: planned ones, online ones in between, and some aborted in the middle."""
    lines = mixed_requests(MODEL_NAME, 300)
    aborted = [rank for rank in range(300) if rank % 20 == 7]
    for rank in aborted:
        lines[rank]["body"] |= {"max_tokens": LONG, "ignore_eos": True}

    # Every fifth one is online, and takes SGLang's own path.
    online_ranks = [rank for rank in range(300) if rank % 5 == 2]
    planned = [rank for rank in range(300) if rank % 5 != 2]

    def run(server: Server, ranks: list[int], aborts: bool) -> dict[int, dict[str, Any]]:
        def abort(rank: int) -> None:
            httpx.post(f"{server.url}/abort_request", json={"rid": f"rid-{rank:04d}"}, timeout=60)

        def call(rank: int) -> dict[str, Any]:
            if aborts and rank in aborted:
                # A little later each: some still wait then, some run.
                threading.Timer(0.05 + 0.01 * aborted.index(rank), abort, [rank]).start()
            return call_generate(server, rank, lines[rank])

        with concurrent.futures.ThreadPoolExecutor(64) as threads:
            return dict(zip(ranks, threads.map(call, ranks), strict=True))

    before = httpx.get(f"{blend.url}/blendserve/status").json()["schedulers"]
    taken = sum(before[0]["taken"].values()) if before else 0
    expected = run(stock, list(range(300)), aborts=False)
    job = [as_completion(rank, lines[rank]) for rank in planned]
    batch = submit(blend.client, job, ENDPOINTS[1])
    actual = run(blend, online_ranks, aborts=True)
    batch = finish(blend.client, batch)
    answers = results(blend.client, batch.output_file_id)
    for rank in planned:
        body = answers[str(rank)]["response"]["body"]
        assert body["choices"][0]["text"] == expected[rank]["text"], lines[rank]
        count = len(expected[rank]["output_ids"])
        assert body["usage"]["completion_tokens"] == count, lines[rank]
    cut_short = 0
    for rank in online_ranks:
        if rank in aborted:
            tokens = actual[rank].get("output_ids", [])
            cut_short += len(tokens) < LONG
            assert tokens == expected[rank]["output_ids"][: len(tokens)]
        else:
            assert actual[rank]["output_ids"] == expected[rank]["output_ids"], lines[rank]
    assert cut_short > len(aborted) / 2, "the aborts came too late to test anything"
    # The last report may be a moment away.
    deadline = time.monotonic() + 30
    while True:
        after = httpx.get(f"{blend.url}/blendserve/status").json()["schedulers"][0]
        if sum(after["taken"].values()) - taken == 240 or time.monotonic() > deadline:
            break
        time.sleep(0.5)
    assert sum(after["taken"].values()) - taken == 240, "planned requests went another way"
    assert after["queued"] == {"left": 0, "right": 0}


def test_a_request_without_a_plan_is_served_as_by_stock_sglang(
    blend: Server, online: dict[str, dict[str, Any]], lines: list[dict[str, Any]]
) -> None:
    for line in lines[:6]:
        response = httpx.post(blend.url + line["url"], json=line["body"], timeout=300)
        assert comparable(response.json()) == comparable(online[line["custom_id"]])


def test_the_job_made_the_engine_evict_and_split_prompts(
    blend: Server, lines: list[dict[str, Any]]
) -> None:
    """Otherwise the tests above would not have tested what they are for."""
    scheduler = httpx.get(f"{blend.url}/blendserve/status").json()["schedulers"][0]
    assert scheduler["kv_total_tokens"] == 3000
    assert scheduler["prefill_tokens"] > 2 * scheduler["kv_total_tokens"]
    assert scheduler["taken"]["left"] > 0
    assert scheduler["taken"]["right"] > 0
    assert scheduler["queued"] == {"left": 0, "right": 0}
