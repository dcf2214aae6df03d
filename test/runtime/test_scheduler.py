"""The scheduler itself: SGLang's own code with our queues in front, and a model that answers at
once."""

from __future__ import annotations

import os
import random
from collections.abc import Iterator
from dataclasses import replace
from typing import Any
from unittest import mock

import msgspec
import pytest
from bare_scheduler import (
    CHUNK,
    FIRST_TOKEN,
    KV_TOKENS,
    VOCABULARY,
    BareScheduler,
    pace_steps,
    the_scheduler,
)

from blendserve.planner import Side, StepPace, linear_costs
from blendserve.runtime.plan_tag import PlanTag
from blendserve.runtime.trace import StepTrace, TraceStep

QUEUED = 24  # On each side, as the engine process would keep them.
GROUP = 4  # Questions behind one prefix.


@pytest.fixture(scope="module")
def engine() -> Iterator[BareScheduler]:
    with mock.patch.dict(os.environ, {"BLENDSERVE_ENABLED": "1"}):
        yield the_scheduler()


@pytest.fixture(autouse=True)
def nothing_is_left(engine: BareScheduler) -> Iterator[None]:
    """Before and after every test: no request, and the whole pool free."""
    engine.live.flush_cache()
    engine.finished.clear()
    yield
    live = engine.live
    assert engine.step() is None
    assert not live.blend.running
    assert len(live.blend) == len(live.waiting_queue) == 0
    free = live.token_to_kv_pool_allocator.available_size() + live.tree_cache.evictable_size()
    assert free == KV_TOKENS
    assert len(live.blend.account) == 0


class Request:
    """A request of a job: prompt, true length, and what the plan says of it. shared: tokens of the
    prompt that all of its group begin with."""

    def __init__(
        self,
        rid: str,
        side: Side,
        prompt: list[int],
        length: int,
        estimate: float | None = None,
        shared: int = 0,
    ) -> None:
        self.rid, self.side, self.prompt, self.length = rid, side, prompt, length
        self.known = estimate is None
        self.tag = PlanTag(
            side,
            rank=0,
            density=50.0 if side is Side.LEFT else 0.1,
            output_tokens=float(length) if estimate is None else estimate,
            likely_output_tokens=() if estimate is None else (0.4 * estimate, 1.6 * estimate),
            # As in a plan: a group's prefix is computed once, each pays its part.
            compute_seconds=PACE.token_seconds * (len(prompt) - shared + shared / GROUP + length),
            memory_seconds=PACE.context_seconds * length * (len(prompt) + length / 2),
        )

    def submit(self, engine: BareScheduler) -> None:
        limit = None if self.known else 4 * self.length + 200
        engine.submit(self.rid, self.prompt, self.length, limit, self.tag)


def tokens(rng: random.Random, count: int) -> list[int]:
    return [rng.randrange(FIRST_TOKEN, VOCABULARY) for _ in range(count)]


def exam_and_essays(rng: random.Random, groups: int, exact: bool = True) -> dict[Side, list]:
    """Left: groups of four questions behind 300 tokens. Right: prompts of 10 to 60 tokens, answers
    of 30 to 400; without `exact`, estimated at 160."""
    left, right = [], []
    for group in range(groups):
        prefix = tokens(rng, 300)
        for k in range(GROUP):
            prompt, length = prefix + tokens(rng, rng.randint(5, 60)), rng.randint(1, 4)
            rid = f"left-{group}-{k}"
            left.append(Request(rid, Side.LEFT, prompt, length, shared=len(prefix)))
    for k in range(3 * groups):
        length = int(min(400, 30 + rng.expovariate(1 / 130)))
        prompt = tokens(rng, rng.randint(10, 60))
        right.append(Request(f"right-{k}", Side.RIGHT, prompt, length, None if exact else 160.0))
    return {Side.LEFT: left, Side.RIGHT: right}


def run(engine: BareScheduler, job: dict[Side, list[Request]], steps: int = 20_000) -> float:
    """Stream a job through the queues until all have ended; the fullest that the pool was."""
    waiting = {side: list(reversed(requests)) for side, requests in job.items()}
    live, fullest = engine.live, 0.0
    for _ in range(steps):
        for side, requests in waiting.items():
            while requests and len(live.blend.waiting[side]) < QUEUED:
                request = requests.pop()
                unsent = [other.tag for others in waiting.values() for other in others]
                request.tag = replace(
                    request.tag,
                    rest_compute_seconds=sum(tag.compute_seconds for tag in unsent),
                    rest_memory_seconds=sum(tag.memory_seconds for tag in unsent),
                )
                request.submit(engine)
        batch = engine.step()
        free = live.token_to_kv_pool_allocator.available_size() + live.tree_cache.evictable_size()
        fullest = max(fullest, 1 - free / KV_TOKENS)
        if batch is None and not any(waiting.values()):
            return fullest
    raise AssertionError(f"not done after {steps} steps: {len(live.blend)} wait")


@pytest.mark.parametrize("seed", range(3))
def test_with_known_lengths_the_pool_is_filled_and_nobody_loses_memory(
    engine: BareScheduler, seed: int
) -> None:
    job = exam_and_essays(random.Random(seed), groups=12)
    before = engine.live.blend_policy.retractions
    fullest = run(engine, job)
    lengths = {request.rid: request.length for side in Side for request in job[side]}
    assert engine.finished == lengths
    assert engine.live.blend_policy.retractions == before
    assert fullest > 0.7, "a test that never fills the pool tests nothing"


# Steps of this model balance where the decodes' contexts, 3,000 tokens, meet 100 prompt tokens.
PACE = StepPace(linear_costs(1.0, 0.0, 1 / 30, 20.0), CHUNK)


@pytest.mark.parametrize("exact", [True, False])
def test_mixed_steps_carry_the_prefill_that_their_decodes_balance(
    engine: BareScheduler, monkeypatch: pytest.MonkeyPatch, exact: bool
) -> None:
    live, job = engine.live, exam_and_essays(random.Random(5), groups=24, exact=exact)
    lengths = {request.rid: request.length for side in Side for request in job[side]}
    seconds: dict[str, float] = {}
    monkeypatch.setattr(live, "is_mixed_chunk", True)
    for name, pace in (("paced", PACE), ("as SGLang does", None)):
        pace_steps(monkeypatch, engine, pace)
        taken = 0.0

        def process(batch: Any, result: Any) -> None:
            nonlocal taken
            report, contexts = live.blend_report, live.blend_policy.decodes.context_tokens
            before = report.prefill_tokens + report.decode_tokens
            type(live).process_batch_result(live, batch, result)
            tokens = report.prefill_tokens + report.decode_tokens - before
            assert tokens <= CHUNK
            compute = PACE.costs.token_seconds(tokens)
            taken += max(compute, contexts * PACE.context_seconds)

        monkeypatch.setattr(live, "process_batch_result", process)
        run(engine, job)
        assert engine.finished == lengths
        engine.finished.clear()
        live.flush_cache()
        seconds[name] = taken
    assert seconds["paced"] < 0.94 * seconds["as SGLang does"]


def test_the_contexts_of_the_decoding_requests_are_counted(engine: BareScheduler) -> None:
    job = exam_and_essays(random.Random(6), groups=6)
    for side in Side:
        for request in job[side]:
            request.submit(engine)
    for _ in range(60):
        engine.step()
        decoding = [request.req for request in engine.live.blend.running.values()]
        contexts = [
            len(req.origin_input_ids) + len(req.output_ids) for req in decoding if req.output_ids
        ]
        assert engine.live.blend_policy.decodes.context_tokens == sum(contexts)
    run(engine, {side: [] for side in Side})
    assert engine.live.blend_policy.decodes.context_tokens == 0


def test_requests_that_outlive_their_estimates_end_with_all_their_tokens(
    engine: BareScheduler,
) -> None:
    job = exam_and_essays(random.Random(7), groups=12, exact=False)
    run(engine, job)
    assert engine.finished == {r.rid: r.length for side in Side for r in job[side]}


def test_a_prefix_longer_than_a_chunk_is_computed_once_for_all_siblings(
    engine: BareScheduler,
) -> None:
    rng = random.Random(1)
    prefix = tokens(rng, 3 * CHUNK)
    job = {
        Side.LEFT: [Request(f"left-{k}", Side.LEFT, prefix + tokens(rng, 9), 2) for k in range(6)],
        Side.RIGHT: [],
    }
    report = engine.live.blend_report
    computed = report.prefill_tokens
    run(engine, job)
    assert report.prefill_tokens - computed == len(prefix) + 6 * 9


def test_an_online_request_is_in_the_next_prefill_whatever_waits(engine: BareScheduler) -> None:
    rng = random.Random(2)
    job = exam_and_essays(rng, groups=4)
    for side in Side:
        for request in job[side]:
            request.submit(engine)
    for _ in range(3):
        engine.step()
    engine.submit("online", tokens(rng, 50), 5)
    for _ in range(3):  # A prompt that is being computed in chunks may be before it.
        batch = engine.step()
        if any(req.rid == "online" for req in batch.reqs):
            break
    else:
        raise AssertionError("not started after three steps")
    run(engine, {side: [] for side in Side})
    assert engine.finished["online"] == 5


@pytest.mark.parametrize("mixed", [True, False])
def test_a_prompt_is_not_held_back_for_an_online_request_that_finds_no_room(
    engine: BareScheduler, mixed: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Where prefill goes before decodes, nothing would end that makes room for it."""
    live, rng = engine.live, random.Random(4)
    monkeypatch.setattr(live, "is_mixed_chunk", mixed)
    pace_steps(monkeypatch, engine, None)
    Request("left", Side.LEFT, tokens(rng, 6 * CHUNK), 2).submit(engine)
    engine.step()
    engine.submit("online", tokens(rng, 40), 5, limit=KV_TOKENS - CHUNK)
    steps = 0
    while live.chunked_req is not None:
        engine.step()
        steps += 1
        assert "online" not in engine.finished
    assert steps <= 6
    while len(engine.finished) < 2:
        engine.step()
        steps += 1
        assert steps < 30
    assert engine.finished == {"left": 2, "online": 5}


def test_an_online_request_gets_a_token_after_every_prefill_of_the_batch(
    engine: BareScheduler, monkeypatch: pytest.MonkeyPatch
) -> None:
    live, rng = engine.live, random.Random(5)
    monkeypatch.setattr(live, "is_mixed_chunk", False)
    pace_steps(monkeypatch, engine, None)
    engine.submit("online", tokens(rng, 20), 6)
    engine.step()
    for k in range(6):
        Request(f"left-{k}", Side.LEFT, tokens(rng, 2 * CHUNK), 2).submit(engine)
    modes = []
    while "online" not in engine.finished:
        modes.append(engine.step().forward_mode.is_extend())
    assert modes == [False, True] * 4 + [False]
    run(engine, {side: [] for side in Side})
    assert len(engine.finished) == 7


def test_aborts_at_every_stage_leave_the_others_alone(engine: BareScheduler) -> None:
    rng = random.Random(3)
    job = exam_and_essays(rng, groups=6)
    requests = {request.rid: request for side in Side for request in job[side]}
    for request in requests.values():
        request.submit(engine)
    aborted = set()
    while len(aborted) < 12:
        engine.step()
        rid = rng.choice(sorted(requests.keys() - aborted - engine.finished.keys()))
        engine.abort(rid)
        aborted.add(rid)
    run(engine, {side: [] for side in Side})
    for rid in requests.keys() - aborted:
        assert engine.finished[rid] == requests[rid].length


def test_a_health_check_keeps_no_memory_from_a_job(engine: BareScheduler) -> None:
    engine.submit("HEALTH_CHECK_1", [11, 12, 13], 1)
    engine.step()
    online = engine.live.blend_online
    assert not online.present
    assert online.reserved_tokens(KV_TOKENS, 1.0) == 0.0


def test_an_online_request_keeps_its_share_until_the_server_is_idle(engine: BareScheduler) -> None:
    online = engine.live.blend_online
    engine.submit("online", [11, 12, 13], 3)
    engine.step()
    assert online.present
    assert online.reserved_tokens(KV_TOKENS, 1.0) > 0
    run(engine, {side: [] for side in Side})
    assert online.reserved_tokens(KV_TOKENS, 1.0) == 0.0


def test_a_trace_tells_chunks_and_decodes(engine, tmp_path):
    file = tmp_path / "steps.jsonl"
    engine.live.blend_trace = StepTrace(file)
    try:
        engine.submit("a", range(FIRST_TOKEN, FIRST_TOKEN + CHUNK + 100), 3)
        while "a" not in engine.finished:
            engine.step()
    finally:
        engine.live.blend_trace = None
    steps = [msgspec.json.decode(line, type=TraceStep) for line in file.read_bytes().splitlines()]
    whole = CHUNK + 100
    assert [
        (s.prefill_requests, s.prefill_tokens, s.prefill_context_tokens, s.prefill_pairs)
        for s in steps
    ] == [
        (1, CHUNK, CHUNK, CHUNK**2),
        (1, 100, whole, whole**2 - CHUNK**2),
        *[(0, 0, 0, 0)] * 2,
    ]
    assert [s.decode_requests for s in steps] == [0, 0, 1, 1]
    assert [s.decode_context_tokens for s in steps] == [0, 0, whole + 2, whole + 3]


def test_one_prompt_in_two_cache_namespaces_is_computed_in_each(engine: BareScheduler) -> None:
    live = engine.live
    prompt = list(range(FIRST_TOKEN, FIRST_TOKEN + 60))

    def computed(rid: str, namespace: str) -> int:
        before = live.blend_report.prefill_tokens
        tag = PlanTag(Side.LEFT, 0, 1.0, output_tokens=4.0)
        engine.submit(rid, prompt, 4, tag=tag, extra_key=namespace)
        candidate = live.blend.candidate(Side.LEFT)
        assert candidate is not None
        expected = candidate.uncached_tokens
        for _ in range(20):
            engine.step()
        assert rid in engine.finished
        done = int(live.blend_report.prefill_tokens - before)
        assert done == expected, "what was planned is what was computed"
        return done

    assert computed("a", "alice") == computed("b", "bob") == 60
    assert computed("c", "alice") == 1


def test_prompts_behind_one_that_ended_with_its_prompt_share_it_all_at_once(
    engine: BareScheduler,
) -> None:
    # An answer of one token ends where its prompt does; so does an embedding.
    prefix = tokens(random.Random(1), 100)
    job = {
        Side.LEFT: [Request(f"q{k}", Side.LEFT, [*prefix, 20 + k], 1) for k in range(12)],
        Side.RIGHT: [],
    }
    before = engine.live.blend_report.steps
    run(engine, job)
    assert len(engine.finished) == 12
    # The first alone, and then the others together.
    assert engine.live.blend_report.steps - before == 2
