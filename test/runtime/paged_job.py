"""Run by test_overtaking.py: random jobs through a scheduler with pages of so many tokens.

SGLang's paged allocator has kernels for GPUs only; its own plain version of them stands in here.
"""

from __future__ import annotations

import random
import sys
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

from bare_scheduler import FIRST_TOKEN, VOCABULARY, BareScheduler
from sglang.srt.mem_cache.allocator import paged

from blendserve.planner import Side
from blendserve.runtime.plan_tag import PlanTag
from blendserve.runtime.request_checks import ModelLimits

KV_TOKENS, CHUNK = 2_048, 256


class Launched:
    """A kernel that is launched as Triton's are."""

    def __init__(self, run: Callable[..., None]) -> None:
        self._run = run

    def __getitem__(self, grid: object) -> Callable[..., None]:
        return self._run


def extend(prefix: Any, seq: Any, last: Any, free: Any, out: Any, _: int, page: int) -> None:
    pages = (seq + page - 1) // page - (prefix + page - 1) // page
    if int(pages.sum()) <= len(free):
        paged.alloc_extend_naive(prefix, seq, last, free, out, page, "cpu")


def decode(seq: Any, last: Any, free: Any, out: Any, _: int, page: int) -> None:
    extend(seq - 1, seq, last, free, out, _, page)


def submit(
    engine: BareScheduler, rng: random.Random, rid: str, side: Side | None, prompt: int, length: int
) -> None:
    """A request of a side, or an online one."""
    tag = None
    if side is not None:
        tag = PlanTag(side, 0, 50.0 if side is Side.LEFT else 0.1, float(length))
    tokens = [rng.randrange(FIRST_TOKEN, VOCABULARY) for _ in range(prompt)]
    engine.submit(rid, tokens, length, None, tag)


def run(engine: BareScheduler, lengths: dict[str, int], steps: int) -> None:
    """Until all have ended; never idle before."""
    for _ in range(steps):
        if len(engine.finished) == len(lengths):
            break
        assert engine.step() is not None, "idle while something waits"
    assert engine.finished == lengths, (engine.finished, lengths)
    engine.finished.clear()
    engine.live.flush_cache()


def main() -> None:
    page = int(sys.argv[1])
    paged.alloc_extend_kernel = Launched(extend)
    paged.alloc_decode_kernel = Launched(decode)
    engine = BareScheduler(
        *("--max-total-tokens", str(KV_TOKENS), "--chunked-prefill-size", str(CHUNK)),
        *("--schedule-policy", "fcfs", "--radix-cache-backend", "blendserve"),
        *("--page-size", str(page), "--max-running-requests", "64"),
    )
    for seed in range(12):
        rng = random.Random(seed)
        engine.live.is_mixed_chunk = seed % 2 == 0
        lengths, steps = {}, 0
        for k in range(rng.randint(1, 24)):
            prompt, length = rng.choice(((20, 6), (900, 60), (400, 500), (1_700, 40), (60, 200)))
            lengths[f"{k}"] = length
            steps += length + prompt // CHUNK + 2
            submit(engine, rng, f"{k}", rng.choice(list(Side)), prompt, length)
        run(engine, lengths, steps)
    # The longest prompts that are let through, first; longer ones would wait for ever.
    rng = random.Random(98)
    manager = SimpleNamespace(
        model_config=SimpleNamespace(vocab_size=VOCABULARY, context_len=65_536),
        server_args=SimpleNamespace(allow_auto_truncate=False),
        max_req_input_len=KV_TOKENS - 6,
    )
    fewer_than = ModelLimits.of(manager, KV_TOKENS, page).prompt_tokens
    assert fewer_than is not None
    for side in (None, *Side):
        for prompt in (fewer_than - 1, fewer_than - 2, fewer_than - page):
            submit(engine, rng, "long", side, prompt, 1)
            run(engine, {"long": 1}, KV_TOKENS // CHUNK + 1)
    # Two short ones behind one that goes to the end of the pool and one that finds no memory.
    engine.live.is_mixed_chunk = False
    rng = random.Random(99)
    submit(engine, rng, "endless", Side.RIGHT, 800, 6_000)
    engine.step()
    submit(engine, rng, "large", Side.RIGHT, 12, 6_000)
    for rid in ("short-0", "short-1"):
        submit(engine, rng, rid, Side.RIGHT, 14, 6)
    for _ in range(30):
        engine.step()
    assert sorted(engine.finished) == ["short-0", "short-1"], engine.finished


if __name__ == "__main__":
    main()
