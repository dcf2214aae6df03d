"""One line per scheduler step, for a plot of what each step did (the paper's Figure 10)."""

from __future__ import annotations

import math
import time
from pathlib import Path
from typing import Any

import msgspec


class TraceStep(msgspec.Struct):
    """One step, as a JSON line.

    Attributes:
        seconds: since the trace was opened, when the step's result was processed.
        prefill_requests, prefill_tokens: prompts, or chunks of them, and their tokens.
        prefill_context_tokens, prefill_pairs: sums over them of b and of b^2 - a^2, for a chunk
            that goes from position a to b. Prefill attention grows with the latter.
        decode_requests, decode_context_tokens: requests that produced a token, and the sum of
            their contexts.
        compute_seconds, memory_seconds: of the step by the cost model: GEMMs, and the attention of
            the decodes.
        left_tokens, right_tokens: KV memory booked per side.
        free_tokens: free and evictable KV tokens.
        target_density: of what is left of the job; None where no memory seconds are left.
    """

    step: int
    seconds: float
    prefill_requests: int
    prefill_tokens: int
    prefill_context_tokens: int
    prefill_pairs: int
    decode_requests: int
    decode_context_tokens: int
    compute_seconds: float
    memory_seconds: float
    left_tokens: float
    right_tokens: float
    free_tokens: int
    target_density: float | None


class StepTrace:
    """Appends a line per step to a file; costs time in proportion to the running requests."""

    def __init__(self, path: Path) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        # Line-buffered: a server that is killed leaves whole steps behind.
        self._file = path.open("w", buffering=1)
        self._started = time.monotonic()

    def step(self, scheduler: Any, batch: Any, prefilled: int, decoded: int) -> None:
        """Write what a batch did, after its result was processed."""
        # Counted by the batch: some of its decodes may have been in vain.
        split = len(batch.reqs) - len(batch.decoding_reqs or ())
        split = 0 if batch.forward_mode.is_decode() else split
        decode_context = sum(
            len(req.origin_input_ids) + len(req.output_ids) for req in batch.reqs[split:]
        )
        # A batch of decodes still has the chunks that it was made from.
        begins = (batch.prefix_lens or [])[:split]
        ends = [a + n for a, n in zip(begins, batch.extend_lens or [], strict=False)]
        compute, memory = scheduler.blend_pace.seconds(prefilled + decoded, decode_context)
        account = scheduler.blend.account
        line = TraceStep(
            step=scheduler.blend_report.steps,
            seconds=round(time.monotonic() - self._started, 6),
            prefill_requests=split,
            prefill_tokens=prefilled,
            prefill_context_tokens=sum(ends),
            prefill_pairs=sum(b * b - a * a for a, b in zip(begins, ends, strict=True)),
            decode_requests=decoded,
            decode_context_tokens=decode_context,
            compute_seconds=compute,
            memory_seconds=memory,
            left_tokens=account.left_tokens,
            right_tokens=account.right_tokens,
            free_tokens=int(
                scheduler.token_to_kv_pool_allocator.available_size()
                + scheduler.tree_cache.evictable_size()
            ),
            target_density=_finite(scheduler.blend_policy.target_density),
        )
        self._file.write(msgspec.json.encode(line).decode() + "\n")


def _finite(density: float) -> float | None:
    # JSON has no infinity.
    return density if math.isfinite(density) else None
