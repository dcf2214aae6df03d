"""In SGLang's real scheduler: whoever fits passes heads that do not; scoring fills its steps."""

from __future__ import annotations

import os
import random
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from unittest import mock

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
from hypothesis import given, settings
from hypothesis import strategies as st

from blendserve.planner import HARDWARE, MODEL_SPECS, CostModel, Side, StepPace
from blendserve.runtime.plan_tag import PlanTag

LEFT, RIGHT = Side.LEFT, Side.RIGHT


@pytest.fixture(scope="module")
def engine() -> Iterator[BareScheduler]:
    with mock.patch.dict(os.environ, {"BLENDSERVE_ENABLED": "1"}):
        yield the_scheduler()


@pytest.fixture(autouse=True)
def nothing_is_left(engine: BareScheduler) -> Iterator[None]:
    engine.live.flush_cache()
    engine.finished.clear()
    yield
    live = engine.live
    assert engine.step() is None
    assert not live.blend.running
    assert len(live.blend) == len(live.waiting_queue) == 0


def submit(
    engine: BareScheduler,
    rid: str,
    side: Side,
    prompt: int,
    length: int,
    limit: int | None = None,
    expected: tuple[int, ...] = (),
) -> None:
    """A request of so many random tokens; `expected` lengths where it is not known."""
    rng = random.Random(rid)
    mean = sum(expected) / len(expected) if expected else float(length)
    tag = PlanTag(side, 0, 50.0 if side is LEFT else 0.1, mean, likely_output_tokens=expected)
    tokens = [rng.randrange(FIRST_TOKEN, VOCABULARY) for _ in range(prompt)]
    engine.submit(rid, tokens, length, limit, tag)


def steps_until(engine: BareScheduler, rid: str, most: int) -> int:
    for step in range(most):
        if rid in engine.finished:
            return step
        assert engine.step() is not None, "never idle while something waits"
    raise AssertionError(f"{rid} has not ended after {most} steps")


@pytest.mark.parametrize("mixed", [True, False])
@pytest.mark.parametrize("sides", [(RIGHT, RIGHT), (LEFT, RIGHT), (RIGHT, LEFT)])
def test_short_requests_do_not_wait_for_a_head_without_limit(
    engine: BareScheduler, sides: tuple[Side, Side], mixed: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A line of 804 tokens that goes on to the end of the pool; one without max_tokens; two short
    ones behind it."""
    monkeypatch.setattr(engine.live, "is_mixed_chunk", mixed)
    submit(engine, "endless", RIGHT, 804, 10**6)
    engine.step()
    submit(engine, "no limit", sides[0], 12, 30, 10**6, (KV_TOKENS,))
    for k in range(2):
        submit(engine, f"short-{k}", sides[1], 14, 6, 6, (6,))
    for k in range(2):
        assert steps_until(engine, f"short-{k}", 60) <= 60
    assert "no limit" not in engine.finished
    steps_until(engine, "no limit", 2 * KV_TOKENS)
    assert engine.finished == {
        # As SGLang does it: cut off where the pool ends.
        "endless": KV_TOKENS - 804 - 2,
        "no limit": 30,
        "short-0": 6,
        "short-1": 6,
    }


@pytest.mark.parametrize("mixed", [True, False])
def test_batch_work_passes_online_requests_that_find_no_memory_within_a_bound(
    engine: BareScheduler, mixed: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As lines without a plan and without max_tokens do beside those that are planned."""
    monkeypatch.setattr(engine.live, "is_mixed_chunk", mixed)
    engine.submit("long", range(FIRST_TOKEN, FIRST_TOKEN + 100), 400, 10**6)
    engine.step()
    for k in range(3):
        engine.submit(f"no limit-{k}", [FIRST_TOKEN + k] * 20, 30, KV_TOKENS)
    sent = steps = 0
    while "long" not in engine.finished:
        while len(engine.live.blend) < 3:
            submit(engine, f"short-{sent}", RIGHT, 14, 6, 6, (6,))
            sent += 1
        assert engine.step() is not None
        steps += 1
        assert steps < 10 * KV_TOKENS
    assert len(engine.finished) > 20, "those that fitted went ahead all the time"
    assert not any(rid.startswith("no limit") for rid in engine.finished)
    # What it waited for has ended, so nothing goes before it any more.
    before = set(engine.live.blend.running)
    while True:
        batch = engine.step()  # None where the last one has ended: SGLang makes an empty round.
        if batch and any(req.rid == "no limit-0" for req in batch.reqs):
            break
        assert set(engine.live.blend.running) <= before
        steps += 1
        assert steps < 10 * KV_TOKENS
    ended = {f"no limit-{k}" for k in range(3)} | {f"short-{sent - 1}"}
    while ended - engine.finished.keys():
        engine.step()
        steps += 1
        assert steps < 10 * KV_TOKENS


def test_a_prompt_larger_than_the_pool_is_answered_at_once(engine: BareScheduler) -> None:
    submit(engine, "running", RIGHT, 100, 300)
    engine.step()
    submit(engine, "too large", LEFT, KV_TOKENS + 1, 5)
    submit(engine, "short", LEFT, 20, 5)
    steps_until(engine, "too large", 3)
    steps_until(engine, "short", 20)
    steps_until(engine, "running", 400)


def test_a_large_head_is_not_passed_for_ever(engine: BareScheduler) -> None:
    """The bound: what ran when it came to stand first, and what started before that had ended."""
    submit(engine, "first", RIGHT, 100, 200)
    engine.step()
    submit(engine, "large", LEFT, KV_TOKENS - 300, 200)
    sent = 0
    steps = 0
    while "large" not in engine.live.blend.running:
        while len(engine.live.blend.waiting[LEFT]) < 8:
            submit(engine, f"small-{sent}", LEFT, 50, 40)
            sent += 1
        engine.step()
        steps += 1
        assert steps < 1_000
    # 200 steps of the first, 40 of what started last; a prefill goes before decodes here.
    assert steps < 200 + 40 + sent + 5
    assert len(engine.finished) > 30, "those that fitted went ahead all the time"
    engine.live.blend.waiting[LEFT].clear()
    while engine.live.blend.running:
        engine.step()


requests = st.lists(
    st.tuples(st.sampled_from(Side), st.integers(1, 1_500), st.integers(1, 300)), max_size=12
)


@settings(deadline=None, database=None, max_examples=12)
@given(requests)
def test_every_request_starts_and_the_engine_is_never_idle(
    jobs: list[tuple[Side, int, int]],
) -> None:
    engine = the_scheduler()
    engine.finished.clear()
    for k, (side, prompt, length) in enumerate(jobs):
        submit(engine, f"{k}", side, prompt, length)
    for _ in range(sum(length + prompt // CHUNK + 2 for _, prompt, length in jobs)):
        if len(engine.finished) == len(jobs):
            break
        assert engine.step() is not None
    assert engine.finished == {f"{k}": length for k, (_, _, length) in enumerate(jobs)}
    engine.live.flush_cache()


@pytest.mark.parametrize("page_size", [1, 16])
def test_a_job_through_pages(page_size: int) -> None:
    """Another scheduler, with another page size, needs a process of its own."""
    script = Path(__file__).parent / "paged_job.py"
    done = subprocess.run(
        [sys.executable, script, f"{page_size}"],
        env={**os.environ, "BLENDSERVE_ENABLED": "1"},
        capture_output=True,
        text=True,
        timeout=400,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-3_000:]


def test_a_scoring_job_fills_its_steps(
    engine: BareScheduler, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Where nothing decodes there is nothing to pace for."""
    model, device = MODEL_SPECS["llama-3.1-8b"], HARDWARE["a100-80g-sxm"]
    pace = StepPace.of(CostModel.attained(model, device).step_costs, chunk_tokens=CHUNK)
    live, prompt, count = engine.live, 90, 120
    monkeypatch.setattr(live, "is_mixed_chunk", True)
    pace_steps(monkeypatch, engine, pace)
    rng = random.Random(1)
    for k in range(count):
        tag = PlanTag(
            LEFT,
            0,
            700.0,
            1.0,
            compute_seconds=(prompt + 1) * pace.token_seconds,
            memory_seconds=(prompt + 1) * pace.context_seconds,
        )
        tokens = [rng.randrange(FIRST_TOKEN, VOCABULARY) for _ in range(prompt)]
        engine.submit(f"{k}", tokens, 1, None, tag)
    steps = 0
    while len(engine.finished) < count:
        engine.step()
        steps += 1
    assert steps <= 1.05 * -(-count * prompt // CHUNK) + 1
