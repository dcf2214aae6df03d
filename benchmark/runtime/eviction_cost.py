"""Time of one operation of a radix cache with many nodes, for each cache that could serve.

    python benchmark/runtime/eviction_cost.py [--json benchmark/results/eviction_cost.json]

Requests of 64 shared and 16 own prompt tokens and 4 output tokens fill the tree, so a leaf is an
output. Then, each many times, in microseconds of the thread's processor time: find a cached prompt;
enter a prompt after prefill; enter a finished request; evict 4 tokens (a leaf), as decode steps ask
for, and 2,048 at once, as prefill asks for. The garbage collector is off, as it looks at all that
the process holds, whoever made it run.
"""

from __future__ import annotations

import argparse
import gc
import json
import platform
import sys
import time
from array import array
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch

sys.path.insert(0, str(Path(__file__).parents[2] / "test" / "runtime"))

from cache_engine import CacheEngine
from sglang.srt.mem_cache.base_prefix_cache import EvictParams, MatchPrefixParams
from sglang.srt.mem_cache.radix_cache import RadixKey

from blendserve.planner import NextUse, Side
from blendserve.runtime.plan_tag import PlanTag, UseTag

GROUPS = 100
SHARED, OWN, OUTPUT = 64, 16, 4
# Name, cache, whether requests carry a plan.
CASES = (
    ("SGLang's default (Rust)", "rust", False),
    ("SGLang's RadixCache (Python)", "python", False),
    ("blendserve, online requests", "blendserve", False),
    ("blendserve, planned requests", "blendserve", True),
)


def prompt(index: int) -> list[int]:
    group = index % GROUPS
    return [*range(group * SHARED, (group + 1) * SHARED), *range(index * OWN, (index + 1) * OWN)]


def plan_params(index: int) -> dict[str, Any]:
    """The next request of the group needs its prefix; half of the prompts come back much later."""
    uses = [NextUse(SHARED, index + GROUPS, Side.LEFT)]
    if index % 2:
        uses.append(NextUse(SHARED + OWN, 1_000_000 + index * 7919 % 1_000_003, Side.RIGHT))
    tag = UseTag("job", Side.LEFT, index, 0, tuple(uses))
    return PlanTag(Side.LEFT, index, 1.0, 1.0, use=tag).to_params()


class Stopwatch:
    """Collects the processor time that a method takes, in microseconds."""

    def __init__(self, owner: Any, name: str) -> None:
        self.samples: list[float] = []
        method: Callable[..., Any] = getattr(owner, name)

        def timed(*args: Any, **kwargs: Any) -> Any:
            started = time.thread_time()
            result = method(*args, **kwargs)
            self.samples.append((time.thread_time() - started) * 1e6)
            return result

        setattr(owner, name, timed)

    def summary(self) -> dict[str, float]:
        return {
            "mean_us": round(float(np.mean(self.samples)), 2),
            "p50_us": round(float(np.percentile(self.samples, 50)), 2),
            "p99_us": round(float(np.percentile(self.samples, 99)), 2),
        }


def measure(kind: str, planned: bool, nodes: int, repeats: int) -> dict[str, Any]:
    requests = nodes // 2
    engine = CacheEngine(kind, kv_tokens=1 << 20, context=SHARED + OWN + OUTPUT)
    cache = engine.cache
    # The allocator's own work, a copy of its free list, is the same for all and is left out.
    engine.allocator.available_size = lambda: 1 << 20
    engine.allocator.alloc = lambda tokens: torch.arange(tokens)
    engine.allocator.free = lambda slots: None

    def run(index: int) -> None:
        params = plan_params(index) if planned else None
        assert engine.start(str(index), prompt(index), params) is not None
        engine.decode(str(index), [-1 - index] * OUTPUT)
        engine.end(str(index))

    for index in range(requests):
        run(index)
    gc.collect()
    gc.disable()
    unfinished, finished = Stopwatch(cache, "cache_unfinished_req"), Stopwatch(cache, "insert_req")
    for index in range(requests, requests + repeats):
        run(index)
    find, evict = Stopwatch(cache, "match_prefix"), Stopwatch(cache, "evict")
    rng = np.random.default_rng(0)
    for index in rng.integers(0, requests, repeats).tolist():
        cache.match_prefix(MatchPrefixParams(key=RadixKey(array("q", prompt(index)))))
    for _ in range(repeats):
        cache.evict(EvictParams(num_tokens=OUTPUT))
    few = evict.summary()
    evict.samples.clear()
    for _ in range(min(10, nodes * OUTPUT // 4096)):
        cache.evict(EvictParams(num_tokens=2048))
    gc.enable()
    return {
        "match_prefix": find.summary(),
        "cache_unfinished_req": unfinished.summary(),
        "insert_req": finished.summary(),
        "evict_leaf": few,
        "evict_2048_tokens": evict.summary(),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--json", type=Path)
    parser.add_argument("--nodes", type=int, nargs="*", default=[10_000, 100_000])
    parser.add_argument("--repeats", type=int, default=200)
    options = parser.parse_args()
    rows: list[dict[str, Any]] = []
    for nodes in options.nodes:
        for name, kind, planned in CASES:
            figures = measure(kind, planned, nodes, options.repeats)
            rows.append({"nodes": nodes, "cache": name, **figures})
            medians = "  ".join(f"{key} {value['p50_us']:,.1f}" for key, value in figures.items())
            print(f"{nodes:,} {name}: {medians}", flush=True)
    if options.json:
        report = {
            "python": platform.python_version(),
            "machine": platform.machine(),
            "repeats": options.repeats,
            "rows": rows,
        }
        options.json.write_text(json.dumps(report, indent=1) + "\n")


if __name__ == "__main__":
    main()
