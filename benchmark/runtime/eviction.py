"""Prefix hits under LRU and under Belady: real radix caches, pools and requests, no model.

    python benchmark/runtime/eviction.py [--json benchmark/results/eviction.json]

A synthetic job whose shared prefixes are three times the KV pool runs in several orders through
SGLang's default cache (LRU, in Rust) and ours. The engine is a fake one: a request holds prompt and
output from its admission until as many steps have passed as it has output tokens; the next one is
admitted as soon as it fits and fewer than --running run. With two queues (the scanners' fronts) the
side that holds less of the pool goes first, so the fronts do not advance as the timetable predicts.
"""

from __future__ import annotations

import argparse
import heapq
import json
import platform
import sys
from collections import deque
from dataclasses import replace
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

sys.path.insert(0, str(Path(__file__).parents[2] / "test" / "runtime"))

from cache_engine import COST_MODEL, CacheEngine

from blendserve.planner import (
    Job,
    Plan,
    Side,
    Timetable,
    dual_scan_sequence,
    make_plan,
    make_timetable,
)
from blendserve.runtime.plan_tag import PlanTag, UseTag

POOL_TOKENS = 65_536
CACHES = {"LRU": "rust", "Belady": "blendserve"}


def prefix_job(seed: int = 0, subjects: int = 100, requests: int = 40) -> Job:
    """Questions behind prefixes: a system prompt, a section's text, a subject's examples.

    Half of the subjects are answered with a few tokens, a quarter at some length, a quarter at
    great length. Lengths are known.
    """
    rng = np.random.default_rng(seed)

    def tokens(count: int) -> NDArray[np.int32]:
        return rng.integers(0, 50_000, int(count)).astype(np.int32)

    system = tokens(200)
    sections = [np.concatenate((system, tokens(300))) for _ in range(10)]
    prompts, outputs = [], []
    for subject in range(subjects):
        examples = np.concatenate((sections[subject % 10], tokens(rng.integers(1_000, 2_800))))
        mean = (4, 4, 100, 500)[subject // 10 % 4]
        for _ in range(requests):
            prompts.append(np.concatenate((examples, tokens(rng.integers(40, 160)))))
            outputs.append(min(1 + int(rng.exponential(mean)), 2_000))
    known = np.array(outputs)
    return Job(prompts, known, known)


def shared_prefix_tokens(plan: Plan) -> int:
    """Tokens that at least two prompts share, each counted once."""
    tree = plan.tree
    return int((tree.depth[1:] - tree.depth[tree.parent[1:]]).sum())


def replay(
    kind: str,
    job: Job,
    queues: dict[Side, list[int]],
    timetable: Timetable,
    running: int,
) -> tuple[int, CacheEngine]:
    """Prompt tokens found in the cache, and the engine when all requests have ended."""
    context = max(map(len, job.token_ids)) + int(job.max_output_tokens.max())
    engine = CacheEngine(kind, POOL_TOKENS, context, slots=running)
    waiting = {side: deque(requests) for side, requests in queues.items()}
    held = dict.fromkeys(Side, 0)
    ends: list[tuple[int, int, Side]] = []
    step = found = 0
    while ends or any(waiting.values()):
        sides = sorted((side for side in Side if waiting[side]), key=lambda side: held[side])
        started = len(ends) < running and any(
            _start(engine, job, timetable, waiting[side], side) for side in sides
        )
        if started:
            request, side, cached = engine.last_started
            found += cached
            held[side] += len(job.token_ids[request]) + int(job.max_output_tokens[request])
            heapq.heappush(ends, (step + int(job.max_output_tokens[request]), request, side))
            continue
        step, request, side = heapq.heappop(ends)
        engine.end(str(request))
        held[side] -= len(job.token_ids[request]) + int(job.max_output_tokens[request])
    if engine.leaked_tokens():
        raise RuntimeError(f"{engine.leaked_tokens()} KV tokens leaked")
    return found, engine


def _start(
    engine: CacheEngine, job: Job, timetable: Timetable, waiting: deque[int], side: Side
) -> bool:
    request = waiting[0]
    output = int(job.max_output_tokens[request])
    tag = UseTag(
        "job",
        side,
        timetable.due(request),
        timetable.first_due,
        tuple(timetable.next_uses(request)),
    )
    params = PlanTag(side, request, 1.0, float(output), use=tag).to_params()
    cached = engine.start(str(request), job.token_ids[request].tolist(), params)
    if cached is None:
        return False
    # The output's tokens are the request's own; the first comes with the prompt.
    if output > 1 and not engine.decode(str(request), [60_000 + request] * (output - 1)):
        engine.end(str(request), keep=False)
        return False
    waiting.popleft()
    engine.last_started = (request, side, cached)
    return True


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--json", type=Path)
    parser.add_argument("--seeds", type=int, default=2)
    parser.add_argument("--running", type=int, nargs="*", default=[8, 32])
    options = parser.parse_args()
    rows: list[dict[str, Any]] = []
    for seed in range(options.seeds):
        job = prefix_job(seed)
        plan = make_plan(job, COST_MODEL)
        dfs = plan.tree.requests
        random = np.random.default_rng(seed).permutation(len(job))
        scanned, left = dual_scan_sequence(plan)
        both = make_timetable(plan)
        fronts = {Side.LEFT: scanned[left], Side.RIGHT: scanned[~left]}
        orders = {
            "DFS": ({Side.LEFT: dfs}, one_queue_timetable(plan, dfs)),
            "random": ({Side.LEFT: random}, one_queue_timetable(plan, random)),
            "blended, one queue": ({Side.LEFT: scanned}, one_queue_timetable(plan, scanned)),
            "blended, two fronts": (fronts, both),
        }
        best = plan.prompt_tokens - plan.unique_tokens
        for order, (queues, timetable) in orders.items():
            for running, (name, kind) in product(options.running, CACHES.items()):
                lists = {side: queues.get(side, np.empty(0, int)).tolist() for side in Side}
                found, engine = replay(kind, job, lists, timetable, running)
                row = {
                    "seed": seed,
                    "running": running,
                    "order": order,
                    "cache": name,
                    "cached_tokens": found,
                    "optimum_tokens": best,
                    "part_of_optimum": found / best,
                    "prompt_tokens": plan.prompt_tokens,
                    "shared_prefix_tokens": shared_prefix_tokens(plan),
                }
                if kind == "blendserve":
                    row["evicted_tokens"] = dict(engine.cache.evicted_tokens)
                rows.append(row)
                print(f"{seed} {order:20} {running:3} {name:7} {found / best:7.2%}", flush=True)
    if options.json:
        report = {
            "python": platform.python_version(),
            "machine": platform.machine(),
            "pool_tokens": POOL_TOKENS,
            "rows": rows,
        }
        options.json.write_text(json.dumps(report, indent=1) + "\n")


def one_queue_timetable(plan: Plan, order: NDArray[np.int64]) -> Timetable:
    """A timetable of requests that all come from one queue, in this order."""
    timetable = make_timetable(plan, first=order)
    return replace(timetable, left=np.ones(len(order), dtype=bool))


if __name__ == "__main__":
    main()
