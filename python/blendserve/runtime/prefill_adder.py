"""SGLang's prefill adder, which trusts our memory test for planned requests.

SGLang keeps memory free for what running requests may still produce: a share, tuned for chat, of
all their limits, added up as if everyone reached full length at the same time. For planned
requests the admission code has a better figure, and has already decided that they fit.
"""

from __future__ import annotations

from collections.abc import Callable
from types import SimpleNamespace
from typing import Any, ClassVar

from sglang.srt.managers.schedule_policy import AddReqResult, PrefillAdder

from blendserve.runtime.plan_tag import PLAN_ATTRIBUTE


def is_planned(req: Any) -> bool:
    return getattr(req, PLAN_ATTRIBUTE, None) is not None


def cached_tokens(req: Any) -> int:
    """Tokens of a request's prompt that the KV pool holds: a list of their places up to SGLang
    0.5.21, a number since."""
    return req.prefix_len if hasattr(req, "prefix_len") else len(req.prefix_indices)


def tokens_to_compute(req: Any) -> int:
    """Tokens of a request's prompt that are still to be computed, output of before a retraction
    included."""
    return len(req.origin_input_ids) + len(req.output_ids) - cached_tokens(req)


class BlendPrefillAdder(PrefillAdder):  # type: ignore[misc]
    """Charges planned requests by the forecast of all of them together.

    SGLang makes an adder anew for every prefill batch, in the one scheduler of a process; what it
    needs to know of that batch lies in class attributes.

    Attributes:
        growth_tokens: KV tokens that all running planned requests, those offered now included,
            will take at the most. The first one that SGLang asks for carries the sum.
        all_planned: no online request runs.
        chunk_limit: most tokens of a planned request's prompt to continue with in this batch; None
            for SGLang's own limit.
        step_tokens: most prompt tokens of this batch; None for SGLang's own limit.
    """

    growth_tokens: ClassVar[float] = 0.0
    all_planned: ClassVar[bool] = False
    chunk_limit: ClassVar[int | None] = None
    step_tokens: ClassVar[int | None] = None

    def __init__(
        self,
        page_size: int,
        tree_cache: Any,
        token_to_kv_pool_allocator: Any,
        running_batch: Any,
        *args: Any,
        **kwargs: Any,
    ) -> None:
        # SGLang adds up what each running request may take. Where one speaks for all, it need not
        # look at thousands of them.
        summed = running_batch
        if BlendPrefillAdder.all_planned and running_batch is not None:
            one = next((req for req in running_batch.reqs if is_planned(req)), None)
            summed = SimpleNamespace(reqs=[] if one is None else [one])
        super().__init__(page_size, tree_cache, token_to_kv_pool_allocator, summed, *args, **kwargs)
        self.running_batch = running_batch
        most, own = BlendPrefillAdder.step_tokens, self.rem_chunk_tokens
        if most is not None and own is not None:
            self.rem_chunk_tokens: int | None = min(own, most)

    def _get_running_request_total_token_offset(self, req: Any) -> float:
        if not is_planned(req):
            return float(super()._get_running_request_total_token_offset(req))
        growth = BlendPrefillAdder.growth_tokens
        BlendPrefillAdder.growth_tokens = 0.0
        return growth

    def add_one_req(self, req: Any, *args: Any, **kwargs: Any) -> Any:
        if (
            BlendPrefillAdder.chunk_limit is not None
            and self.can_run_list
            and self.rem_chunk_tokens is not None
            and self.ceil_paged_tokens(tokens_to_compute(req)) > self.rem_chunk_tokens
        ):
            # The prompt that was cut short is still SGLang's one unfinished prompt: another one
            # must fit whole.
            return AddReqResult.OTHER
        return _charging_one_token(super().add_one_req, req, *args, **kwargs)

    def add_chunked_req(self, req: Any, *args: Any, **kwargs: Any) -> Any:
        limit = BlendPrefillAdder.chunk_limit
        if limit is not None and is_planned(req):
            own = getattr(self, "chunked_req_limit", None)
            self.chunked_req_limit = limit if own is None else min(own, limit)
        return _charging_one_token(super().add_chunked_req, req, *args, **kwargs)


def _charging_one_token(add: Callable[..., Any], req: Any, *args: Any, **kwargs: Any) -> Any:
    """Call SGLang's method with a planned request's output counted as one token.

    Its whole expected output is in ``growth_tokens`` already.
    """
    if not is_planned(req):
        return add(req, *args, **kwargs)
    sampling = req.sampling_params
    limit = sampling.max_new_tokens
    sampling.max_new_tokens = len(req.output_ids) + 1
    try:
        return add(req, *args, **kwargs)
    finally:
        sampling.max_new_tokens = limit
