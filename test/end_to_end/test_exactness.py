"""Blended scheduling changes when a request runs, and never what it answers."""

from __future__ import annotations

import concurrent.futures
from typing import Any

import httpx
import pytest
from conftest import MODEL_NAME, Server
from jobs import finish, mixed_requests, results, submit

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


def test_planned_requests_give_stock_sglangs_tokens_one_for_one(
    stock: Server, blend: Server, lines: list[dict[str, Any]]
) -> None:
    """The same through the engine's own route, where the token ids themselves can be seen."""

    def tokens(server: Server, planned: bool) -> list[list[int]]:
        def call(numbered: tuple[int, dict[str, Any]]) -> list[int]:
            rank, line = numbered
            body = line["body"]
            prompt = body.get("prompt") or body["messages"][0]["content"]
            sampling = {
                "temperature": 0,
                "max_new_tokens": body["max_tokens"],
                "ignore_eos": body["ignore_eos"],
            }
            if planned:
                density = len(prompt) / body["max_tokens"]
                sampling["custom_params"] = {
                    "blendserve_side": "left" if density > 60 else "right",
                    "blendserve_rank": rank,
                    "blendserve_density": density,
                    "blendserve_target": 60.0,
                    "blendserve_output_tokens": float(body["max_tokens"]),
                }
            response = httpx.post(
                f"{server.url}/generate",
                json={"text": prompt, "sampling_params": sampling},
                timeout=300,
            )
            return list(response.raise_for_status().json()["output_ids"])

        with concurrent.futures.ThreadPoolExecutor(len(lines)) as threads:
            return list(threads.map(call, enumerate(lines)))

    assert tokens(blend, planned=True) == tokens(stock, planned=False)


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
