"""Online requests beside batch work: what must be left to them."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Sequence
from typing import Any

from blendserve.policy.overtaking import PATIENCE_STEPS
from blendserve.runtime.prefill_adder import is_planned
from blendserve.runtime.side_queues import SideQueues

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

    def reserved_tokens(
        self, total_tokens: int, new_token_ratio: float, passed: Collection[str] = ()
    ) -> float:
        """Free KV tokens that batch work must not take.

        What the online requests may still produce, by SGLang's own guess; and their share of the
        pool, as far as they do not hold it already. Nothing is kept for those that are `passed`.
        """
        growth = held = 0.0
        for rid, req in self._present.items():
            if rid in passed:
                continue
            done = len(req.output_ids)
            left = min(req.sampling_params.max_new_tokens - done, _MAX_COUNTED_TOKENS)
            growth += left * new_token_ratio
            held += len(req.origin_input_ids) + done
        share = self._share * total_tokens if self._keep_steps else 0.0
        return growth + max(share - held - growth, 0.0)


class OnlineWait:
    """How long the first online request has waited for memory, and whether others may pass it.

    One that finds no memory would otherwise hold up all batch work, for as long as what it waits
    for runs. So after some steps planned requests may start; but once all that ran when its wait
    began have ended, nothing starts before it any more.

    Attributes:
        passed: ids of the online requests that are passed in this step.
    """

    def __init__(self) -> None:
        self.passed: frozenset[str] = frozenset()
        self._head: str | None = None
        self._steps = 0
        self._ran: frozenset[str] = frozenset()

    def may_pass(self, waiting: Sequence[Any], running: Iterable[Any]) -> bool:
        """Ask once a step, with what waits and what runs then."""
        self.passed = frozenset()
        head = waiting[0].rid if waiting else None
        if head != self._head:
            self._head, self._steps = head, 0
            self._ran = frozenset(req.rid for req in running)
            return False
        self._steps += 1
        if head is None or self._steps <= PATIENCE_STEPS:
            return False
        if self._ran.isdisjoint(req.rid for req in running if not req.finished()):
            return False
        self.passed = frozenset(req.rid for req in waiting)
        return True


class BlendOnline:
    """Mixed into SGLang's scheduler class: what of a step online requests get, before batch work.

    Attributes:
        blend_held_in_vain: the online request that did not fit when a planned prompt was held back
            for it.
        blend_waits: whether batch work may pass online requests that find no memory.
    """

    blend: SideQueues
    blend_online: OnlineTraffic
    blend_held_in_vain: str | None
    blend_waits: OnlineWait
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

    def _online_to_pass(self, running_batch: Any) -> list[Any]:
        """The online requests that planned ones may pass in this step: all that wait, or none."""
        if not self.blend_waits.may_pass(self.waiting_queue, running_batch.reqs):
            return []
        return self.waiting_queue if self.chunked_req is None and len(self.blend) else []

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
