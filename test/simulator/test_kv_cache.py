"""The cache against a replay that keeps every token by itself."""

import numpy as np
from hypothesis import given
from hypothesis import strategies as st
from simulator_jobs import LLAMA_ON_A100, mixed_workload, workloads

from blendserve.planner import DualScanner, make_plan
from blendserve.simulator.foresight import Foresight
from blendserve.simulator.kv_cache import KVCache


class TokenCache:
    """An LRU cache of whole tree edges, written down naively: what is cached, locked and how old
    are sets of prefixes; every question is answered by looking at all of them."""

    def __init__(self, tree, prompts, capacity):
        self.tree, self.capacity = tree, capacity
        self.edges = {}  # node or (request,) -> (tokens, age, lockers)
        self.clock = 0
        leaf = {int(r): k for k, r in enumerate(tree.requests)}
        self.path = {}
        for request, k in leaf.items():
            nodes, node = [], int(tree.leaf_parent[k])
            while node:
                nodes.append(node)
                node = int(tree.parent[node])
            self.path[request] = nodes[::-1]
        self.length = {int(r): int(tree.length[k]) for k, r in enumerate(tree.requests)}

    def size(self, node):
        return int(self.tree.depth[node] - self.tree.depth[self.tree.parent[node]])

    def used(self):
        return sum(tokens for tokens, _, _ in self.edges.values())

    def cached(self, request):
        found = 0
        for node in self.path[request]:
            if node not in self.edges:
                break
            found += self.size(node)
        return found

    def start(self, request):
        nodes = self.path[request]
        own = self.length[request] - int(self.tree.depth[nodes[-1]] if nodes else 0)
        held = [node for node in nodes if node in self.edges and self.edges[node][2]]
        # What of the path is cached but not locked may be evicted for the rest of it.
        need = self.length[request] - sum(self.size(node) for node in held)
        if not self.make_room(need):
            return None
        for node in nodes:
            tokens, age, lockers = self.edges.get(node, (self.size(node), 0, 0))
            self.edges[node] = (tokens, age, lockers + 1)
        self.edges[request,] = (own, 0, 1)
        return own

    def end(self, request):
        tokens, _, _ = self.edges[request,]
        self.clock += 1
        self.edges[request,] = (tokens, self.clock, 0)
        for node in reversed(self.path[request]):
            tokens, _, lockers = self.edges[node]
            self.clock += 1
            self.edges[node] = (tokens, self.clock, lockers - 1)

    def make_room(self, tokens):
        locked = sum(size for size, _, lockers in self.edges.values() if lockers)
        if locked + tokens > self.capacity:
            return False
        while self.capacity - self.used() < tokens:
            free = [key for key, (_, _, lockers) in self.edges.items() if not lockers]
            del self.edges[min(free, key=lambda key: self.edges[key][1])]
        return True


@given(workloads(), st.integers(1_000, 12_000), st.integers(0, 2**32 - 1))
def test_lru_finds_what_a_naive_replay_finds(job, capacity, seed):
    tree = job.job().build_tree()
    rng = np.random.default_rng(seed)
    cache, naive = KVCache(tree, capacity), TokenCache(tree, job.prompts, capacity)
    leaf = {int(r): k for k, r in enumerate(tree.requests)}
    running = []
    for request in rng.permutation(len(job)).tolist():
        node = int(tree.leaf_parent[leaf[request]])
        own = len(job.prompts[request]) - int(tree.depth[node])
        while running and rng.random() < 0.4:
            done, at, tokens = running.pop(rng.integers(len(running)))
            cache.end(at, done, tokens)
            naive.end(done)
        cached, held, _ = cache.find(node)
        assert cached == naive.cached(request)
        room = cache.make_room(len(job.prompts[request]) - held)
        started = naive.start(request)
        assert room == (started is not None)
        if room:
            found, _ = cache.start(node, own)
            cache.filled(node, found)
            running.append((request, node, own))
        assert cache.locked + cache.evictable == naive.used()
        assert 0 <= cache.free <= capacity
        assert cache.locked_shared <= cache.locked
    for done, at, tokens in running:
        cache.end(at, done, tokens)
    assert cache.locked == cache.locked_shared == 0


def test_a_prefix_that_is_being_computed_is_not_there_yet():
    job = mixed_workload(200)
    tree = job.job().build_tree()
    cache = KVCache(tree, 100_000)
    node = int(np.argmax(tree.depth))
    found, _ = cache.start(node, 50)
    cached, held, filling = cache.find(node)
    assert cached == held == filling == tree.depth[node]
    cache.filled(node, found)
    assert cache.find(node)[2] == 0


def test_foresight_keeps_what_is_needed_next():
    job = mixed_workload(400)
    plan = make_plan(job.job(lengths_known=True), LLAMA_ON_A100)
    tree, scanner = plan.tree, DualScanner(plan)
    foresight = Foresight(tree)
    foresight.follow(plan, scanner)
    cache = KVCache(tree, 3_000, foresight)
    place = {int(r): k for k, r in enumerate(plan.order)}
    leaf = {int(r): k for k, r in enumerate(tree.requests)}
    # A few-shot prefix near the left end, and one in the middle.
    deep = [k for k in np.argsort(-tree.depth)[:40].tolist() if tree.end[k] - tree.first[k] > 3]

    def distance(node):
        places = [place[int(r)] for r in tree.requests[tree.first[node] : tree.end[node]]]
        return min(min(places), len(plan.order) - 1 - max(places))

    near, far = min(deep, key=distance), max(deep, key=distance)
    assert distance(near) < distance(far)
    assert foresight.distance(near) == distance(near)
    for node in (near, far):
        first = int(tree.requests[tree.first[node]])
        at = int(tree.leaf_parent[leaf[first]])
        found, _ = cache.start(at, 10)
        cache.filled(at, found)
        cache.end(at, first, 10)
    assert cache.free > 0  # What only these requests had is free at once.
    assert cache.make_room(cache.free + 100)
    assert cache.find(near)[0] >= tree.depth[near]
    assert cache.find(far)[0] < tree.depth[far]


def test_dead_prefixes_are_dropped():
    job = mixed_workload(60, subjects=2)
    plan = make_plan(job.job(lengths_known=True), LLAMA_ON_A100)
    tree = plan.tree
    foresight = Foresight(tree)
    foresight.follow(plan, DualScanner(plan))
    cache = KVCache(tree, 200_000, foresight)
    leaf = {int(r): k for k, r in enumerate(tree.requests)}
    for request in plan.order.tolist():
        node = int(tree.leaf_parent[leaf[request]])
        own = len(job.prompts[request]) - int(tree.depth[node])
        foresight.started(request)
        cache.filled(node, cache.start(node, own)[0])
        cache.end(node, request, own)
    assert cache.locked == cache.evictable == 0


def test_room_cannot_be_made_out_of_what_runs():
    job = mixed_workload(20)
    tree = job.job().build_tree()
    cache = KVCache(tree, 1_000)
    cache.start(0, 900)
    assert not cache.make_room(101)
    assert cache.make_room(100)
