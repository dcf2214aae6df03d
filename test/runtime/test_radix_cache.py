"""The radix cache that knows the future, on SGLang's own requests, pools and allocators."""

from __future__ import annotations

import logging
from array import array
from types import SimpleNamespace

import numpy as np
import pytest
from cache_engine import COST_MODEL, CacheEngine
from hypothesis import given, settings
from hypothesis import strategies as st
from sglang.srt.mem_cache import registry
from sglang.srt.mem_cache.base_prefix_cache import EvictParams, MatchPrefixParams
from sglang.srt.mem_cache.radix_cache import RadixKey

from blendserve.planner import Job, NextUse, Side, make_plan, make_timetable
from blendserve.runtime import radix_cache
from blendserve.runtime.eviction_order import NEVER
from blendserve.runtime.plan_tag import PlanTag, UseTag
from blendserve.runtime.radix_cache import BlendRadixCache

LEFT, RIGHT = Side.LEFT, Side.RIGHT
SYSTEM = list(range(100, 120))


def planned(due, *uses, side=LEFT, since=0, job="job"):
    """custom_params; uses are (prefix tokens, due) or (prefix tokens, due, side)."""
    corners = tuple(NextUse(*use, *(LEFT,) * (3 - len(use))) for use in uses)
    tag = UseTag(job, side, due, since, corners)
    return PlanTag(side, due, 1.0, 1.0, use=tag).to_params()


def own(request, count):
    """Tokens that only this request has."""
    return list(range(1000 * (request + 1), 1000 * (request + 1) + count))


def serve(engine, rid, tokens, params=None, output=0, **kwargs):
    """Run a request from beginning to end; the tokens that it found in the cache."""
    cached = engine.start(rid, tokens, params, **kwargs)
    assert cached is not None
    if output:
        assert engine.decode(rid, own(500 + len(rid), output))
    engine.end(rid)
    return cached


def cached_tokens(engine, tokens):
    """Length of the prefix that is in the cache."""
    match = engine.cache.match_prefix(MatchPrefixParams(key=RadixKey(array("q", tokens))))
    return len(match.device_indices)


def evict(engine, tokens):
    return engine.cache.evict(EvictParams(num_tokens=tokens)).num_tokens_evicted


def nodes(engine):
    """(first token, annotation) of every node."""
    found, stack = {}, list(engine.cache.root_node.children.values())
    while stack:
        node = stack.pop()
        found[node.key.token_ids[0]] = engine.cache.annotation(node)
        stack.extend(node.children.values())
    return found


@pytest.fixture
def engine():
    return CacheEngine("blendserve", kv_tokens=400, context=300)


# -- what goes first


def test_the_prefix_that_is_needed_last_goes_first(engine):
    for request, due in enumerate((30, 10, 20)):
        serve(engine, f"r{request}", own(request, 50), planned(request, (50, due)))
    assert evict(engine, 50) == 50
    assert [cached_tokens(engine, own(request, 50)) for request in range(3)] == [0, 50, 50]
    assert evict(engine, 50) == 50
    assert [cached_tokens(engine, own(request, 50)) for request in range(3)] == [0, 50, 0]


def test_what_only_the_request_itself_had_goes_before_what_others_share(engine):
    """Prompt and output enter as one; the shared part is cut off at once."""
    serve(engine, "a", SYSTEM + own(1, 30), planned(0, (20, 5)), output=25)
    serve(engine, "b", own(2, 50))
    assert evict(engine, 55) == 55
    assert cached_tokens(engine, SYSTEM + own(1, 30)) == 20
    assert cached_tokens(engine, own(2, 50)) == 50


def test_a_staircase_is_evicted_from_its_end(engine):
    prompt = own(0, 60)
    serve(engine, "a", prompt, planned(0, (20, 3), (40, 7)))
    assert evict(engine, 20) == 20
    assert cached_tokens(engine, prompt) == 40
    steps = {note.end: note.next_use for note in nodes(engine).values()}
    assert steps == {20: 3, 40: 7}


def test_only_as_much_of_a_long_prefix_goes_as_must(engine):
    prompt = own(0, 290)
    serve(engine, "a", prompt, planned(0, (290, 3)))
    trimmed = evict(engine, 10)
    assert 10 <= trimmed < 200
    assert cached_tokens(engine, prompt) == 290 - trimmed
    assert engine.leaked_tokens() == 0


def test_the_next_request_of_a_prefix_says_who_comes_after_it(engine):
    serve(engine, "a", SYSTEM + own(0, 30), planned(0, (20, 1)))
    serve(engine, "b", SYSTEM + own(1, 30), planned(1, (20, 90)))
    serve(engine, "c", own(2, 50), planned(2, (50, 60)))
    evict(engine, 60)  # The two own parts.
    assert evict(engine, 20) == 20
    assert cached_tokens(engine, SYSTEM) == 0
    assert cached_tokens(engine, own(2, 50)) == 50


def test_it_tells_of_what_goes_although_it_is_needed_yet(engine):
    told: list[tuple[list[int], str]] = []
    engine.cache.on_planned_eviction = lambda *what: told.append(what)
    serve(engine, "a", SYSTEM + own(0, 30), planned(0, (20, 4), (50, 7)), output=9)
    serve(engine, "b", own(1, 60), planned(1))
    evict(engine, 60 + 8)
    assert told == [], "nobody needs b's prompt, or an output"
    evict(engine, 30)
    assert told == [((SYSTEM + own(0, 30))[:16], "")]


def test_a_part_that_a_match_splits_off_keeps_the_future(engine):
    prompt = own(0, 60)
    serve(engine, "a", prompt, planned(0, (60, 9)))
    assert cached_tokens(engine, [*prompt[:25], 7]) == 25
    assert [note.next_use for note in nodes(engine).values()] == [9, 9]
    serve(engine, "b", own(1, 60), planned(1, (60, 50)))
    evict(engine, 60)
    assert cached_tokens(engine, prompt) == 60


def test_a_prefix_in_use_is_not_evicted_however_late_it_is_needed_again(engine):
    engine.start("a", own(0, 60), planned(0))
    serve(engine, "b", own(1, 60), planned(1, (60, 3)))
    assert evict(engine, 1000) == 60
    assert engine.wrong_tokens("a") == 0
    engine.end("a")
    assert evict(engine, 1000) == 60
    assert engine.leaked_tokens() == 0


def test_a_prompt_in_chunks_is_told_as_it_grows(engine):
    serve(engine, "a", own(0, 90), planned(0, (40, 4), (70, 8)), chunk=16)
    steps = {note.end: note.next_use for note in nodes(engine).values()}
    assert [(end, due) for end, due in sorted(steps.items()) if end in (40, 70, 90)] == [
        (40, 4),
        (70, 8),
        (90, NEVER),
    ]


@pytest.mark.parametrize("page_size", [4, 16])
def test_only_whole_pages_are_shared(page_size):
    engine = CacheEngine("blendserve", kv_tokens=320, context=300, page_size=page_size)
    serve(engine, "a", own(0, 96), planned(0, (3, 2), (37, 5), (39, 8)))
    ends = {note.end: note.next_use for note in nodes(engine).values()}
    whole = 37 // page_size * page_size
    # 3 tokens are no page; of two corners in one page the sooner counts.
    assert ends == {whole: 5, 96: NEVER}


# -- online requests


def test_online_requests_alone_are_cached_as_by_sglang(engine):
    stock = CacheEngine("python", kv_tokens=400, context=300)
    rng = np.random.default_rng(0)
    found = {engine: [], stock: []}
    for request in range(120):
        tokens = own(int(rng.integers(12)), 60)[: int(rng.integers(20, 60))]
        for each, hits in found.items():
            hits.append(serve(each, f"r{request}", tokens, output=5))
    # SGLang evicts whole leaves, which leaves a little less of them in the cache.
    assert sum(found[engine]) >= sum(found[stock])
    assert sum(found[stock]) > 0


def test_what_an_online_request_uses_outlives_the_job(engine):
    serve(engine, "job", SYSTEM + own(0, 30), planned(0))
    serve(engine, "online", SYSTEM + own(1, 30))
    evict(engine, 30)
    assert cached_tokens(engine, SYSTEM) == 20


def test_online_and_planned_prefixes_are_compared_in_requests(engine):
    """Needed in 5 requests, or not used for as many as have ended since."""
    serve(engine, "online", own(0, 50))
    for due in range(4):
        serve(engine, f"job{due}", own(1, 50), planned(due, (50, due + 6)))
    evict(engine, 50)
    assert (cached_tokens(engine, own(0, 50)), cached_tokens(engine, own(1, 50))) == (50, 0)
    for due in range(4, 8):
        serve(engine, f"job{due}", own(1, 50), planned(due, (50, due + 6)))
    evict(engine, 50)
    assert (cached_tokens(engine, own(0, 50)), cached_tokens(engine, own(1, 50))) == (0, 50)


# -- annotations


def test_a_node_carries_what_a_hit_on_it_saves_and_what_it_holds(engine):
    serve(engine, "a", SYSTEM + own(0, 30), planned(3, (20, 12)))
    notes = nodes(engine)
    shared, rest = notes[SYSTEM[0]], notes[own(0, 1)[0]]
    assert (shared.start, shared.end, rest.start, rest.end) == (0, 20, 20, 50)
    assert (shared.next_use, shared.distance) == (12, 9)
    assert rest.next_use == rest.distance == NEVER
    saved = COST_MODEL.prefill_seconds_saved
    assert shared.compute_seconds == float(saved(20))
    assert shared.compute_seconds + rest.compute_seconds == pytest.approx(float(saved(50)))
    assert shared.kv_bytes == 20 * COST_MODEL.model.kv_bytes_per_token
    read_seconds = shared.kv_bytes / COST_MODEL.hardware.bandwidth_bytes
    assert shared.density == pytest.approx(shared.compute_seconds / read_seconds)


# -- safety


def test_a_flush_forgets_all(engine):
    serve(engine, "a", own(0, 60), planned(0, (60, 9)))
    engine.cache.reset()
    engine.allocator.clear()
    assert evict(engine, 10) == 0
    assert serve(engine, "b", own(0, 60), planned(1)) == 0
    assert evict(engine, 60) == 60


@settings(max_examples=60, deadline=None, database=None)
@given(st.data(), st.sampled_from([1, 4]), st.sampled_from([None, 8, 16]))
def test_nothing_leaks_and_no_request_gets_the_kv_of_other_text(data, page_size, chunk):
    """Whatever comes: planned, made up and online requests, ends, aborts, full pools."""
    engine = CacheEngine("blendserve", 192, 96, page_size=page_size, slots=8)
    texts = [own(group, 40) for group in range(3)]
    for step in range(data.draw(st.integers(5, 25))):
        action = data.draw(st.sampled_from(["start", "start", "decode", "end", "abort"]))
        if action == "start" and len(engine.running) < 8:
            text = data.draw(st.sampled_from(texts))
            tokens = text[: data.draw(st.integers(1, 40))] + own(step + 9, 5)
            lengths = data.draw(st.sets(st.integers(1, len(tokens)), max_size=3))
            uses = [(length, step + length) for length in sorted(lengths)]
            side = data.draw(st.sampled_from(Side))
            params = data.draw(st.sampled_from([None, planned(step, *uses, side=side)]))
            engine.start(str(step), tokens, params, chunk)
        elif engine.running:
            rid = data.draw(st.sampled_from(sorted(engine.running)))
            if action == "decode":
                engine.decode(rid, own(step + 50, data.draw(st.integers(1, 9))))
            else:
                engine.end(rid, keep=action == "end")
        assert engine.leaked_tokens() == 0
        assert not any(map(engine.wrong_tokens, engine.running))
    for rid in list(engine.running):
        engine.end(rid)
    assert engine.leaked_tokens() == 0
    assert engine.cache.protected_size() == 0
    evict(engine, engine.kv_tokens)
    assert engine.allocator.available_size() == engine.kv_tokens


def test_a_job_finds_more_of_its_prefixes_than_under_lru():
    """Twelve prefixes of which four fit, asked for in random order."""
    rng = np.random.default_rng(1)
    prompts = [
        np.array(own(request % 12, 60) + own(20 + request, 10), dtype=np.int32)
        for request in range(120)
    ]
    job = Job(prompts, np.full(120, 2), np.full(120, 2))
    plan = make_plan(job, COST_MODEL)
    order = rng.permutation(120)
    timetable = make_timetable(plan, first=order)
    found = {}
    for kind in ("python", "blendserve"):
        engine = CacheEngine(kind, kv_tokens=330, context=100)
        found[kind] = 0
        for request in order.tolist():
            side = LEFT if timetable.left[timetable.due(request)] else RIGHT
            uses = tuple(timetable.next_uses(request))
            tag = UseTag("job", side, timetable.due(request), 0, uses)
            params = PlanTag(side, request, 1.0, 1.0, use=tag).to_params()
            found[kind] += serve(engine, str(request), prompts[request].tolist(), params, output=2)
    assert found["blendserve"] > 1.4 * found["python"]


# -- where it is used


def context(**changed):
    """What SGLang hands to a factory, for a plain model."""
    values = {
        name: changed.pop(name, False)
        for name in (
            "disable_radix_cache",
            "is_hybrid_swa",
            "is_hybrid_ssm",
            "enable_hierarchical_cache",
        )
    }
    params = SimpleNamespace(
        eviction_policy=changed.pop("eviction_policy", "lru"),
        enable_session_radix_cache=changed.pop("enable_session_radix_cache", False),
        token_to_kv_pool_allocator=SimpleNamespace(shard_size=changed.pop("shard_size", 1)),
    )
    return SimpleNamespace(server_args=SimpleNamespace(**changed), params=params, **values)


def test_a_plain_model_gets_it():
    assert radix_cache.unsuitable(context()) is None


@pytest.mark.parametrize(
    ("changed", "reason"),
    [
        ({"is_hybrid_swa": True}, "sliding-window"),
        ({"is_hybrid_ssm": True}, "mamba"),
        ({"enable_hierarchical_cache": True}, "host memory"),
        ({"disable_radix_cache": True}, "switched off"),
        ({"enable_session_radix_cache": True}, "sessions"),
        ({"enable_lmcache": True}, "LMCache"),
        ({"disaggregation_mode": "prefill"}, "separate engines"),
        ({"shard_size": 2}, "several ranks"),
        ({"eviction_policy": "TLRU"}, "tlru"),
    ],
)
def test_other_engines_keep_sglangs_own_and_say_why(monkeypatch, caplog, changed, reason):
    ctx, stock = context(**changed), object()
    monkeypatch.setattr(radix_cache, "default_radix_cache_factory", lambda given: (stock, given))
    with caplog.at_level(logging.WARNING, logger=radix_cache.__name__):
        assert radix_cache.create_radix_cache(ctx) == (stock, ctx)
    assert reason in caplog.text


def test_it_is_registered_once_under_its_name(monkeypatch):
    monkeypatch.setattr(registry, "_RADIX_CACHE_REGISTRY", {})
    radix_cache.register()
    radix_cache.register()
    assert registry.get_radix_cache_factory("blendserve") is radix_cache.create_radix_cache


def test_sglangs_other_policies_order_the_online_leaves():
    """Under LFU what was asked for once goes before what was asked for often, though later."""
    engine = CacheEngine("blendserve", kv_tokens=400, context=300, policy="lfu")
    assert isinstance(engine.cache, BlendRadixCache)
    for rid in ("a", "b", "c"):
        serve(engine, rid, own(0, 50))
    serve(engine, "d", own(1, 50))
    evict(engine, 50)
    assert (cached_tokens(engine, own(0, 50)), cached_tokens(engine, own(1, 50))) == (50, 0)
