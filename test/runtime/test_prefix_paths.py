"""Shared prefixes read off the radix cache's nodes, against the slot table itself."""

from __future__ import annotations

import random
from types import SimpleNamespace

import numpy as np
import pytest
from cache_engine import CacheEngine

from blendserve.runtime.prefix_paths import BatchRequests, PrefixPaths
from sgl_kernel_ext.groups import shared_segments


def kv_lens(engine):
    return np.array([req.kv.kv_committed_len for req in engine.running.values()])


def by_nodes(engine, paths=None):
    reqs = list(engine.running.values())
    return as_set((paths or PrefixPaths()).segments(reqs, kv_lens(engine)))


def by_slots(engine):
    rows = np.array([req.kv.req_pool_idx for req in engine.running.values()])
    table = engine.rows.req_to_token.numpy()
    return as_set(shared_segments(lambda m, at: table[rows[m], at], kv_lens(engine)))


def as_set(segments):
    return {(s.begin, s.end, *s.members.tolist()) for s in segments}


@pytest.mark.parametrize("page_size", [1, 16])
@pytest.mark.parametrize("kind", ["blendserve", "python"])
def test_nodes_and_slots_tell_the_same(kind, page_size):
    """Requests come, grow and go in random order; prefixes are nested, and nodes are split."""
    rng = random.Random(page_size)
    engine = CacheEngine(kind, kv_tokens=16_384, context=1_000, page_size=page_size)
    texts = [[rng.randrange(1_000) for _ in range(400)] for _ in range(3)]
    paths = PrefixPaths()
    shared = 0
    for number in range(150):
        text = rng.choice(texts)
        own = [rng.randrange(1_000, 2_000) for _ in range(rng.randrange(1, 120))]
        engine.start(f"r{number}", text[: rng.choice([0, 70, 200, 390])] + own)
        for rid in list(engine.running):
            if rng.random() < 0.3:
                engine.decode(rid, [rng.randrange(2_000, 3_000)])
        if len(engine.running) > 12:
            engine.end(rng.choice(list(engine.running)), keep=rng.random() < 0.7)
        expected = by_slots(engine)
        assert by_nodes(engine, paths) == expected
        shared += sum(len(members) > 1 for _, _, *members in expected)
    assert shared > 300


def test_a_batch_that_only_decodes_is_not_searched_again():
    engine = CacheEngine("blendserve", kv_tokens=2_000, context=500)
    prefix = list(range(100))
    for rid, token in (("a", 200), ("b", 300)):
        engine.start(rid, [*prefix, token])
    paths = PrefixPaths()
    for step in range(3):
        assert by_nodes(engine, paths) == {
            (0, 100, 0, 1),
            (100, 101 + step, 0),
            (100, 101 + step, 1),
        }
        for rid in "ab":
            engine.decode(rid, [400 + step])
    assert paths.searches == 1
    engine.start("c", [*prefix, 400])
    assert (0, 100, 0, 1, 2) in by_nodes(engine, paths)
    assert paths.searches == 2


def test_nodes_of_another_cache_share_nothing():
    """SGLang's default cache keeps its nodes in Rust; its prefixes are read by each request."""
    engine = CacheEngine("rust", kv_tokens=2_000, context=500)
    for rid, token in (("a", 200), ("b", 300)):
        engine.start(rid, [*range(100), token])
    assert by_nodes(engine) == {(0, 101, 0), (0, 101, 1)}


def test_another_batch_than_the_schedulers_is_not_taken_for_it():
    class Named:
        def __init__(self, rid):
            self.rid = rid

    requests = BatchRequests()
    requests.reqs = [Named("a"), Named("b")]
    assert requests.of(["a", "b"]) is requests.reqs
    assert requests.of(["b", "a"]) is None
    assert requests.of(None) is None


def test_the_scheduler_leaves_its_batch_where_the_model_finds_it(monkeypatch):
    from blendserve.runtime import prefix_paths
    from blendserve.runtime.scheduler import BlendScheduler

    def run_batch(self, batch, pp_proxy_tensors=None):
        return prefix_paths.current.reqs, pp_proxy_tensors

    # By its place: once the plugin is loaded, SGLang's name for it is ours.
    sglangs = next(c for c in BlendScheduler.__mro__[1:] if "run_batch" in vars(c))
    monkeypatch.setattr(sglangs, "run_batch", run_batch)
    batch = SimpleNamespace(reqs=["a", "b"])
    scheduler = object.__new__(BlendScheduler)
    assert scheduler.run_batch(batch, 7) == (batch.reqs, 7)
