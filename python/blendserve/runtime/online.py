"""Online requests beside batch work: what must be left to them."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from blendserve.runtime.prefill_adder import is_planned

# SGLang counts no more than this of a request's limit when it keeps memory for it.
_MAX_COUNTED_TOKENS = 4096
# Scheduler steps after the last online request during which its share is kept for the next one.
_KEEP_STEPS = 1000


class OnlineTraffic:
    """The requests without a plan that the scheduler has, and what is kept free for the next.

    Args:
        share: part of the KV memory that batch work leaves free while online requests come, and of
            a step's prefill tokens while they run.
    """

    def __init__(self, share: float) -> None:
        self._share = share
        self._present: dict[str, Any] = {}
        self._keep_steps = 0

    def arrived(self, req: Any) -> None:
        self._present[req.rid] = req

    def ended(self, rid: str) -> bool:
        """Forget a request; False if it is not an online one that is here."""
        return self._present.pop(rid, None) is not None

    def forget(self, rids: Iterable[str]) -> None:
        """Forget requests that SGLang dropped before they had any memory to give back."""
        for rid in rids:
            self._present.pop(rid, None)

    def forget_all(self) -> None:
        """The scheduler is idle: nobody is here, however they went, and the next job may have all
        of the memory until somebody comes."""
        self._present.clear()
        self._keep_steps = 0

    def step(self) -> None:
        """A scheduler step has passed."""
        if self._present:
            self._keep_steps = _KEEP_STEPS
        elif self._keep_steps:
            self._keep_steps -= 1

    @property
    def present(self) -> bool:
        """Whether the scheduler has any online request."""
        return bool(self._present)

    @property
    def batch_share(self) -> float:
        """Part of a step's prefill tokens that batch work may take."""
        return 1.0 - self._share if self._present else 1.0

    def reserved_tokens(self, total_tokens: int, new_token_ratio: float) -> float:
        """Free KV tokens that batch work must not take.

        What the online requests may still produce, by SGLang's own guess; and their share of the
        pool, as far as they do not hold it already.
        """
        growth = held = 0.0
        for req in self._present.values():
            done = len(req.output_ids)
            left = min(req.sampling_params.max_new_tokens - done, _MAX_COUNTED_TOKENS)
            growth += left * new_token_ratio
            held += len(req.origin_input_ids) + done
        share = self._share * total_tokens if self._keep_steps else 0.0
        return growth + max(share - held - growth, 0.0)


class BlendOnline:
    """Mixed into SGLang's scheduler class: what of a step online requests get, before batch work.

    Attributes:
        blend_held_in_vain: the online request that did not fit when a planned prompt was held back
            for it.
    """

    blend_online: OnlineTraffic
    blend_held_in_vain: str | None
    chunked_prefill_size: Any
    chunked_req: Any
    enable_pdmux: bool
    is_mixed_chunk: bool
    last_batch: Any
    new_token_ratio_tracker: Any
    page_size: int
    waiting_queue: list[Any]

    def _decode_is_due(self, running_batch: Any) -> bool:
        """Where steps are not mixed, batch prefill after batch prefill would leave online requests
        without a token: they get one after each."""
        if self.is_mixed_chunk or self.enable_pdmux or not self.blend_online.present:
            return False
        if self.last_batch is None:
            return False
        # Verification steps of speculative decoding count as extend, and bring tokens.
        mode = self.last_batch.forward_mode
        prefilled = mode.is_extend() and not mode.is_target_verify()
        return prefilled and not all(map(is_planned, running_batch.reqs))

    def _online_steps(self) -> float:
        """Decode steps that the online requests which wait may take, by SGLang's own guess."""
        ratio = self.new_token_ratio_tracker.current
        limits = (req.sampling_params.max_new_tokens for req in self.waiting_queue)
        return float(ratio * max(limits))

    def _chunk_limit(self, running_batch: Any) -> int | None:
        """How far a planned prompt that has begun may go on in this step; None: as SGLang does.

        While an online request waits that fits beside it, hardly, but not twice in vain: where
        prefill goes before decodes, nothing would end that makes room for it. While online requests
        run, as far as batch work may go at all.
        """
        if self.chunked_req is None or not is_planned(self.chunked_req):
            return None
        size = int(self.chunked_prefill_size)
        if self.waiting_queue:
            req = self.waiting_queue[0]
            if req.rid == self.blend_held_in_vain:
                return None
            decoding = len(running_batch.reqs) if self.is_mixed_chunk else 0
            tokens = len(req.origin_input_ids) + len(req.output_ids)
            # Room for the chunk's page, and for rounding the other's tokens up to one.
            if tokens > size - decoding - 2 * self.page_size:
                return None
            return self.page_size
        share = self.blend_online.batch_share
        if share == 1.0:
            return None
        return max(int(size * share) // self.page_size, 1) * self.page_size
