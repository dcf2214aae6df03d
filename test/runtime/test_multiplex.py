"""PD multiplexing on a CPU: SGLang's own loop, with streams that do nothing."""

from __future__ import annotations

import os
import random
from collections.abc import Iterator
from contextlib import nullcontext
from types import SimpleNamespace
from typing import Any
from unittest import mock

import pytest
from bare_scheduler import FIRST_TOKEN, KV_TOKENS, VOCABULARY, BareScheduler, the_scheduler
from sglang.srt.multiplex import multiplexing_mixin, pdmux_context

from blendserve.planner import Side, StepPace, best_split, linear_costs, separate_parts
from blendserve.runtime.plan_tag import PlanTag

# As for a GPU of 108 multiprocessors; the first and the last are those of one part alone.
SM_COUNTS = [(108, 0), (88, 20), (76, 32), (54, 54), (32, 76), (0, 108)]
PACE = StepPace(linear_costs(1.0, 0.0, 1 / 30, 2.0), chunk_tokens=0)


class JobDone(Exception):
    """Leaves SGLang's endless loop."""


class Stream:
    def synchronize(self) -> None:
        pass

    def record_event(self) -> Any:
        return SimpleNamespace(query=lambda: True)


@pytest.fixture(scope="module")
def engine() -> Iterator[BareScheduler]:
    with mock.patch.dict(os.environ, {"BLENDSERVE_ENABLED": "1"}):
        yield the_scheduler()


@pytest.fixture
def multiplexed(engine: BareScheduler, monkeypatch: pytest.MonkeyPatch) -> Any:
    """The scheduler as ``--enable-pdmux`` leaves it; `picked` holds the stream groups in turn."""
    live = engine.live
    live.flush_cache()
    engine.finished.clear()
    groups = [(Stream(), Stream()) for _ in SM_COUNTS]
    monkeypatch.setattr(pdmux_context, "STREAM_GROUPS", groups)
    monkeypatch.setattr(pdmux_context, "CURRENT_STREAM_IDX", 0)
    monkeypatch.setattr(multiplexing_mixin, "pdmux_prefill_tp_group", nullcontext)
    picked: list[int] = []
    runner = live.tp_worker.model_runner
    monkeypatch.setattr(runner, "update_decode_attn_backend", picked.append, raising=False)
    for name, value in {
        "enable_pdmux": True,
        "chunked_prefill_size": None,
        "split_prefill_batch": None,
        "pdmux_config": pdmux_context.PDMuxConfig(split_forward_token_budget=1),
        "stream_groups": groups,
        "sm_counts": SM_COUNTS,
        "real_sm_group_num": len(groups),
        "blend_pace": PACE,
        "picked": picked,
    }.items():
        monkeypatch.setattr(live, name, value, raising=False)
    # Three layers, of which one round of the loop computes one.
    monkeypatch.setattr(live.model_config, "num_hidden_layers", 3)
    monkeypatch.setattr(live.tp_worker, "forward_batch_split_prefill", engine._forward)
    return live


def requests(
    rng: random.Random, side: Side, count: int
) -> list[tuple[str, list[int], int, PlanTag]]:
    made = []
    for k in range(count):
        prompt = [rng.randrange(FIRST_TOKEN, VOCABULARY) for _ in range(rng.randint(20, 200))]
        length = rng.randint(1, 3) if side is Side.LEFT else rng.randint(20, 120)
        tag = PlanTag(
            side,
            rank=0,
            density=50.0 if side is Side.LEFT else 0.1,
            output_tokens=float(length),
            compute_seconds=PACE.token_seconds * (len(prompt) + length),
            memory_seconds=PACE.context_seconds * length * (len(prompt) + length / 2),
        )
        made.append((f"{side.value}-{k}", prompt, length, tag))
    return made


def run(engine: BareScheduler, job: list[tuple[str, list[int], int, PlanTag | None]]) -> None:
    """SGLang's own loop, until the job is done."""
    live, rounds = engine.live, 0
    for rid, prompt, length, tag in job:
        engine.submit(rid, prompt, length, tag=tag)

    def ingest() -> None:
        nonlocal rounds
        rounds += 1
        assert rounds < 5_000, f"not done: {len(live.blend)} wait"
        if len(engine.finished) == len(job) and live.running_batch.is_empty():
            raise JobDone

    with mock.patch.object(live, "ingest_requests", ingest), pytest.raises(JobDone):
        live.event_loop_pdmux()
    live.last_batch = None


def test_a_job_runs_to_its_end_and_nothing_of_it_stays_booked(
    engine: BareScheduler, multiplexed: Any
) -> None:
    rng = random.Random(1)
    job = requests(rng, Side.LEFT, 150) + requests(rng, Side.RIGHT, 30)
    report = multiplexed.blend_report
    before = report.prefill_tokens + report.cached_tokens
    run(engine, job)
    assert engine.finished == {rid: length for rid, _, length, _ in job}
    assert multiplexed.is_fully_idle()
    assert not multiplexed.blend.running
    assert len(multiplexed.blend.account) == 0
    prompts = sum(len(prompt) for _, prompt, _, _ in job)
    assert report.prefill_tokens + report.cached_tokens - before == prompts
    free = multiplexed.token_to_kv_pool_allocator.available_size()
    assert free + multiplexed.tree_cache.evictable_size() == KV_TOKENS
    inner = set(multiplexed.picked) - {0, len(SM_COUNTS) - 1}
    assert len(inner) > 1, "a split that never changes follows nothing"


def test_the_split_follows_what_is_left(engine: BareScheduler, multiplexed: Any) -> None:
    """In the midst of a job, whose rest then changes."""
    job = requests(random.Random(2), Side.RIGHT, 40)
    live, shares = multiplexed, []
    adjust = live.adjust_stream_groups

    def look(running_batch: Any) -> Any:
        if live.blend_policy.decodes.context_tokens and live.split_prefill_batch is not None:
            for compute in (1e3, 1e4, 1e5, 1e6):
                with mock.patch.object(live, "blend_rest", (compute, 1e4)):
                    index, group = adjust(running_batch)
                    expected = best_split(
                        *separate_parts(
                            PACE,
                            live._density_left(),
                            live.blend_policy.decodes.context_tokens,
                            running_batch.batch_size(),
                        ),
                        SM_COUNTS[1:-1],
                    )
                assert index == 1 + expected == pdmux_context.CURRENT_STREAM_IDX
                assert group is live.stream_groups[index]
                shares.append(SM_COUNTS[index][1])
        return adjust(running_batch)

    with mock.patch.object(live, "adjust_stream_groups", look):
        run(engine, job)
    assert shares, "decodes and a prefill batch never met"
    for decodes in (shares[at : at + 4] for at in range(0, len(shares), 4)):
        assert decodes == sorted(decodes, reverse=True)
        assert decodes[0] > decodes[-1]


def test_a_prefill_batch_on_its_way_is_not_idle(engine: BareScheduler, multiplexed: Any) -> None:
    assert multiplexed.is_fully_idle()
    with mock.patch.object(multiplexed, "split_prefill_batch", object()):
        assert not multiplexed.is_fully_idle()


def test_requests_without_a_plan_get_the_split_that_sglang_picks(
    engine: BareScheduler, multiplexed: Any
) -> None:
    online = [
        (rid, prompt, length, None)
        for rid, prompt, length, _ in requests(random.Random(3), Side.RIGHT, 20)
    ]
    with mock.patch("blendserve.runtime.multiplex.best_split", side_effect=AssertionError):
        run(engine, online)
    assert engine.finished == {rid: length for rid, _, length, _ in online}
