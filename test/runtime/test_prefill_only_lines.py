"""Lines whose answer is a vector, a label, a ranking or scores: planned as all others."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from typing import Any

import pytest
from whole_server import Line, WholeServer, whole_server

from blendserve.runtime.cache_salt import SALT_PARAM, cache_salt
from blendserve.runtime.default_model import resolve_model_path
from blendserve.runtime.line_client import answer_body

TEXT = "The river was high that spring, and nobody crossed it."
BODIES: dict[str, tuple[str, dict[str, Any], int]] = {
    "a text": ("/v1/embeddings", {"input": TEXT}, 1),
    "token ids": ("/v1/embeddings", {"input": [5, 6, 7]}, 1),
    "two texts": ("/v1/embeddings", {"input": [TEXT, "Another."]}, 2),
    "a label": ("/v1/classify", {"input": TEXT}, 1),
    "two labels": ("/v1/classify", {"input": [TEXT, "Another."]}, 2),
    "a ranking": ("/v1/rerank", {"query": "river", "documents": [TEXT, "A fox.", "A."]}, 3),
    "scores": ("/v1/score", {"query": TEXT, "items": [" Yes.", " No."]}, 2),
    "scores of ids": ("/v1/score", {"query": [5, 6], "items": [[7], [8], [9]]}, 3),
}


@pytest.fixture(scope="module")
def server() -> Iterator[WholeServer]:
    with whole_server(resolve_model_path("smollm2-135m"), embeds=True) as server:
        yield server


def answers(server: WholeServer, lines: list[Line]) -> list[Any]:
    found = asyncio.run(asyncio.wait_for(server.run(lines), 120))
    return sorted(found, key=lambda answer: answer.index)


@pytest.mark.parametrize("name", BODIES)
def test_each_request_of_a_line_comes_to_the_scheduler_with_its_plan(
    server: WholeServer, name: str
) -> None:
    url, body, sequences = BODIES[name]
    server.scheduler.tags.clear()
    [answer] = answers(server, [(url, body)])
    assert (answer.status_code, answer.error) == (200, None), answer.body
    assert len(server.scheduler.tags) == sequences
    assert {tag.output_tokens for tag in server.scheduler.tags} == {0}


def test_a_planned_line_keeps_its_tenants_salt(server: WholeServer) -> None:
    seen: list[Any] = []
    look = server.scheduler._look

    def spy(request: Any) -> None:
        seen.append(request.sampling_params.custom_params)
        look(request)

    server.scheduler._look = spy  # type: ignore[method-assign]
    token = cache_salt.set("alice")
    try:
        server.scheduler.tags.clear()
        [answer] = answers(server, [("/v1/embeddings", {"input": TEXT})])
    finally:
        cache_salt.reset(token)
        del server.scheduler._look
    assert answer.status_code == 200
    assert len(server.scheduler.tags) == 1
    assert [params[SALT_PARAM] for params in seen] == ["alice"]


def test_a_plan_that_a_client_writes_online_is_no_plan(server: WholeServer) -> None:
    server.scheduler.tags.clear()
    forged = {"blendserve_plan": '{"side": "left", "rank": 0, "density": 1, "output_tokens": 0}'}
    asked = server.ask("/v1/embeddings", {"input": TEXT, "custom_params": forged})
    assert asyncio.run(asked).status_code == 200
    assert server.scheduler.tags == []


def test_a_model_that_only_embeds_has_no_other_endpoint(server: WholeServer) -> None:
    assert server.executor.endpoints == {"/v1/embeddings"}


@pytest.mark.parametrize(
    ("architecture", "more"),
    [
        ("LlamaForSequenceClassification", {"/v1/classify", "/v1/score"}),
        ("Qwen3ForRewardModel", {"/v1/classify", "/v1/score"}),
        ("BertForSequenceClassification", {"/v1/classify", "/v1/score", "/v1/rerank"}),
    ],
)
def test_a_model_with_labels_classifies_and_scores(
    server: WholeServer, monkeypatch: pytest.MonkeyPatch, architecture: str, more: set[str]
) -> None:
    config = server.executor._tokenizer_manager.model_config.hf_config
    monkeypatch.setattr(config, "architectures", [architecture])
    assert server.executor.endpoints == {"/v1/embeddings", *more}


def test_a_ranking_becomes_an_object_that_tells_its_tokens() -> None:
    ranked = b'[{"score": 1.0, "index": 0, "meta_info": {"prompt_tokens": 7}}, {"index": 1}]'
    body = answer_body("/v1/rerank", ranked)
    assert [one["index"] for one in body["results"]] == [0, 1]
    assert body["usage"] == {"prompt_tokens": 7, "total_tokens": 7}
