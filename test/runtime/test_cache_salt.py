"""Whose KV a request may share: the salt goes on every request, and plans respect it."""

from __future__ import annotations

import asyncio
import os
from array import array
from collections.abc import AsyncIterator
from types import SimpleNamespace
from typing import Any
from unittest import mock

import httpx
import numpy as np
import pytest
from bare_scheduler import the_scheduler
from cache_engine import CacheEngine
from fastapi import FastAPI
from queue_policy import separate_steps
from sglang.srt.managers.io_struct import (
    AbortReq,
    EmbeddingReqInput,
    GenerateReqInput,
    TokenizedEmbeddingReqInput,
)
from sglang.srt.managers.schedule_batch import Req
from sglang.srt.sampling.sampling_params import SamplingParams

from blendserve.batch import CACHE_SALT_HEADER
from blendserve.planner import Side
from blendserve.runtime.cache_salt import (
    SALT_PARAM,
    SaltReader,
    add_salt,
    cache_salt,
    salted,
    take_salt,
)
from blendserve.runtime.pacing import is_batch_line
from blendserve.runtime.plan_tag import KEY
from blendserve.runtime.side_queues import SideQueues
from blendserve.runtime.started_prompts import (
    Prompt,
    StartedPrompts,
    beginning_of,
    namespace_of,
)

TOKENS = np.arange(100, 140, dtype=np.int64)


def generate(**fields: Any) -> Any:
    return GenerateReqInput(text="a", **fields)


def test_a_salt_stands_before_what_a_client_gave() -> None:
    for given, expected in (
        (None, "S/"),
        ("mine", "S/mine"),
        (["a", "b"], ["S/a", "S/b"]),
        ("", "S/"),
    ):
        request = generate(cache_salt=given, extra_key="theirs")
        add_salt(request, "S")
        assert (request.cache_salt, request.extra_key) == (expected, "theirs")
    older = SimpleNamespace(extra_key="mine")
    add_salt(older, "S")
    assert older.extra_key == "S/mine"
    for wrong in (5, [None, 7], {"a": 1}):
        with pytest.raises(ValueError, match="strings"):
            add_salt(generate(cache_salt=wrong), "S")


@pytest.mark.parametrize("texts", ["a", ["a", "b"]])
def test_an_embedding_request_gets_its_salt_in_the_scheduler(texts: Any) -> None:
    request = EmbeddingReqInput(text=texts)
    add_salt(request, "S")
    request.normalize_batch_and_arguments()
    one = request if request.is_single else request[0]
    params = SamplingParams(**one.sampling_params)
    req = Req("r", "a", array("q", [1, 2]), params)
    take_salt(req)
    assert req.extra_key == "/S"
    assert req.sampling_params.custom_params is None
    take_salt(plain := Req("p", "a", array("q", [1, 2]), SamplingParams()))
    assert plain.extra_key is None


def test_every_request_is_salted_as_its_header_says_and_forged_plans_are_refused() -> None:
    seen: list[Any] = []

    async def engine(obj: Any, request: Any = None) -> AsyncIterator[Any]:
        seen.append((obj.cache_salt, obj.sampling_params))
        yield obj

    guarded = salted(engine)
    app = FastAPI()

    @app.post("/ask")
    async def ask(custom: dict[str, Any]) -> str:
        params = {"custom_params": custom} if custom else {}
        try:
            async for _ in guarded(generate(sampling_params=params)):
                pass
        except ValueError as error:
            return str(error)
        return "served"

    app.add_middleware(SaltReader)

    async def story() -> None:
        transport = httpx.ASGITransport(app=app)
        async with httpx.AsyncClient(transport=transport, base_url="http://engine") as http:
            salt = {CACHE_SALT_HEADER: "S"}
            for headers in (salt, {}):
                assert (await http.post("/ask", json={}, headers=headers)).json() == "served"
            for name in (KEY, "blendserve_cache_salt"):
                assert name in (await http.post("/ask", json={name: "x"}, headers=salt)).json()
            # Leaked from another request's context, it would be taken for this one's.
            cache_salt.set("leaked")
            assert (await http.post("/ask", json={"a": 1})).json() == "served"
            is_batch_line.set(True)
            assert (await http.post("/ask", json={KEY: "x"})).json() == "served"

    asyncio.run(story())
    assert [salt for salt, _ in seen] == ["S/", None, None, None]


@pytest.mark.parametrize("params", [[{"custom_params": {KEY: "x"}}], {"custom_params": {KEY: 1}}])
def test_a_plan_in_any_place_is_refused(params: Any) -> None:
    with pytest.raises(ValueError, match="reserved"):
        salted(lambda obj: obj)(generate(sampling_params=params))  # type: ignore[arg-type, return-value]


# -- what is planned and what is booked


def test_prompts_of_two_namespaces_share_nothing() -> None:
    prompts = StartedPrompts()
    prompts.start("a", Side.LEFT, Prompt(TOKENS, "alice"), 0)
    prompts.prefilled("a")
    assert prompts.shared(Prompt(TOKENS, "alice")).cached_tokens == len(TOKENS) - 1
    for stranger in ("bob", ""):
        assert prompts.shared(Prompt(TOKENS, stranger)) == (0, 0, None, False)
    # Neither is one held up by what the other is about to compute, nor forgotten with it.
    prompts.start("b", Side.RIGHT, Prompt(TOKENS, "bob"), 0)
    assert not prompts.shared(Prompt(TOKENS, "alice")).blocked
    prompts.end("a")
    prompts.forget_ended(beginning_of(TOKENS, "bob"))
    assert prompts.shared(Prompt(TOKENS, "alice")).cached_tokens == len(TOKENS) - 1
    prompts.forget_ended(beginning_of(TOKENS, "alice"))
    assert prompts.shared(Prompt(TOKENS, "alice")).cached_tokens == 0


def test_the_namespace_of_a_request_is_that_of_its_nodes() -> None:
    engine = CacheEngine("blendserve", 200, 100)
    params = SamplingParams(max_new_tokens=1)
    for extra, salt in ((None, None), ("e", None), (None, "s"), ("e", "s")):
        req = Req("r", "", array("q", TOKENS.tolist()), params, extra_key=extra)
        req.cache_salt = salt
        req.init_next_round_input(engine.cache)
        key = SimpleNamespace(extra_key=extra, cache_salt=salt)
        assert namespace_of(req) == namespace_of(key)
        assert bool(namespace_of(req)) is bool(extra or salt)
    assert namespace_of(SimpleNamespace(extra_key="e")) != namespace_of(
        SimpleNamespace(extra_key=None, cache_salt="e")
    )


def test_an_eviction_is_told_with_its_namespace() -> None:
    queues = SideQueues(separate_steps(1_000))
    started = queues._prompts
    for name in ("alice", "bob"):
        started.start(name, Side.LEFT, Prompt(TOKENS, name), 0)
        started.prefilled(name)
        started.end(name)
    queues.evicted(TOKENS[:16].tolist(), "bob")
    assert started.shared(Prompt(TOKENS, "bob")).cached_tokens == 0
    assert started.shared(Prompt(TOKENS, "alice")).cached_tokens == len(TOKENS) - 1


def test_an_embedding_request_is_queued_in_its_namespace() -> None:
    with mock.patch.dict(os.environ, {"BLENDSERVE_ENABLED": "1"}):
        live = the_scheduler().live
        params = SamplingParams(max_new_tokens=0, custom_params={SALT_PARAM: "S"})
        params.normalize(None)
        live.handle_embedding_request(
            TokenizedEmbeddingReqInput(
                rid="e",
                input_text="a",
                input_ids=array("q", range(30)),
                mm_inputs=None,
                token_type_ids=None,
                sampling_params=params,
            )
        )
        queued = live.waiting_queue[-1]
        assert (queued.rid, queued.extra_key) == ("e", "/S")
        live.abort_request(AbortReq(rid="e", abort_all=False))
        assert live.waiting_queue == []
