"""What the next step has room for: KV tokens, prompt tokens, and the prompt that has begun."""

from __future__ import annotations

from typing import Any

from blendserve.runtime.prefill_adder import BlendPrefillAdder, tokens_to_compute


class StepRoom:
    """Reads off SGLang's scheduler what a step may take. Changes nothing.

    Args:
        scheduler: a `BlendScheduler`.
    """

    def __init__(self, scheduler: Any) -> None:
        self._scheduler = scheduler

    def free_or_evictable(self) -> int:
        """KV tokens that nothing which runs holds."""
        scheduler = self._scheduler
        allocator, cache = scheduler.token_to_kv_pool_allocator, scheduler.tree_cache
        return int(allocator.available_size() + cache.evictable_size())

    def free_tokens(self) -> tuple[float, float]:
        """KV tokens that batch work may take, and those that others hold if none of it runs.

        The former are free or evictable, less what online requests and the rest of a prompt that
        is being computed in chunks will take.
        """
        free = self.free_or_evictable() - self.chunks_to_come()
        kept = self._scheduler.blend_online.reserved_tokens(
            self._scheduler.max_total_num_tokens,
            self._scheduler.new_token_ratio_tracker.current,
            self._scheduler.blend_waits.passed,
        )
        return float(free) - kept, float(self._scheduler.max_total_num_tokens - free)

    def prefill_budget(self, running_batch: Any) -> float:
        """Prompt tokens of planned requests that one step can take besides what is already due."""
        budget = float(self._scheduler.max_prefill_tokens)
        if self._scheduler.chunked_prefill_size is not None:
            budget = min(budget, self._scheduler.chunked_prefill_size)
            if self._scheduler.is_mixed_chunk:
                budget -= len(running_batch.reqs)
        budget *= float(self._scheduler.blend_online.batch_share)
        if BlendPrefillAdder.step_tokens is not None:
            budget = min(budget, BlendPrefillAdder.step_tokens)
        return budget - self.chunks_to_come()

    def prefill_steps(self, tokens: int) -> int:
        """Steps that the others decode until so many more prompt tokens have been computed."""
        if self._scheduler.enable_pdmux:
            # At the most: then one layer of the prefill goes beside each of their steps.
            return int(self._scheduler.model_config.num_hidden_layers)
        if not self._scheduler.is_mixed_chunk:
            return 0
        most = (
            BlendPrefillAdder.step_tokens
            or int(self._scheduler.chunked_prefill_size or 0)
            or tokens
        )
        return -(-(tokens + self.chunks_to_come()) // max(most, 1))

    def mixed_step_fits(self, running_batch: Any) -> bool:
        """Whether there is memory for the decodes, and the prompt that has begun beside them."""
        if not running_batch.check_decode_mem():
            return False
        free = self.free_or_evictable()
        chunk = min(self.chunks_to_come(), int(self._scheduler.chunked_prefill_size or 0))
        # Each may begin a page.
        return (
            chunk + (len(running_batch.reqs) + 1) * int(self._scheduler.page_size) <= free
            or not chunk
        )

    def chunks_to_come(self) -> int:
        """Tokens that are not computed yet of the prompt that SGLang has in chunks."""
        return (
            0
            if self._scheduler.chunked_req is None
            else tokens_to_compute(self._scheduler.chunked_req)
        )
