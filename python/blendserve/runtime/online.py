"""Online requests beside batch work: what must be left to them."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

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
