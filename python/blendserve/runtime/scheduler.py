"""SGLang's scheduler with dual-scan admission for the requests of batch jobs.

A planned request (one whose ``custom_params`` carry a plan tag) waits in one of two short queues
instead of SGLang's waiting queue. Before each prefill batch is built, the admission code chooses
which heads may start, and hands those, and only those, to SGLang, whose own code builds and runs
the batch. A request without a tag never touches any of this.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any, ClassVar

import numpy as np
from numpy.typing import NDArray
from sglang.srt.managers.scheduler import NextBatchPlan, Scheduler

from blendserve import __version__
from blendserve.config import load_settings
from blendserve.planner import Admission, Candidate, KVState, Side
from blendserve.runtime.feedback import ReportSender, SchedulerReport
from blendserve.runtime.plan_tag import PlanTag
from blendserve.runtime.side_queues import PlannedRequest, SideQueues

# A shared prefix shorter than this is cheaper computed twice than waited for.
_MIN_SHARED_TOKENS = 16


class BlendScheduler(Scheduler):  # type: ignore[misc]
    """SGLang's scheduler, plus two queues and an admission test in front of its own."""

    waiting_queue: list[Any]
    # Part of the running planned requests' growth that SGLang's memory test keeps free; there is
    # one scheduler in a process, and SGLang makes the test's object anew for every step.
    growth_share: ClassVar[float] = 1.0

    # -- life of the scheduler ---------------------------------------------------------------

    def init_running_status(self) -> None:
        super().init_running_status()
        self.blend = SideQueues()
        self.blend_admission = Admission()
        self.blend_target_density = 1.0
        self.blend_report = SchedulerReport(dp_rank=getattr(self, "dp_rank", None) or 0)
        address = load_settings().feedback_address
        # One rank of a tensor-parallel group speaks for all: they take the same decisions.
        speaks = getattr(self, "tp_rank", 0) == 0
        self.blend_sender = ReportSender(address) if address and speaks else None

    def get_init_info(self) -> dict[str, Any]:
        return {**super().get_init_info(), "blendserve": __version__}

    def is_fully_idle(self, *args: Any, **kwargs: Any) -> bool:
        return bool(super().is_fully_idle(*args, **kwargs)) and len(self.blend) == 0

    # -- arrival and departure ---------------------------------------------------------------

    def _add_request_to_queue(self, req: Any, is_retracted: bool = False) -> None:
        tag = PlanTag.from_params(req.sampling_params.custom_params)
        # A request that failed validation arrives with its end already set: SGLang answers it.
        if tag is None or req.to_finish is not None:
            super()._add_request_to_queue(req, is_retracted=is_retracted)
        elif is_retracted:
            self.blend.retract(PlannedRequest(req, tag))
        else:
            self.blend.add(PlannedRequest(req, tag))

    def abort_request(self, recv_req: Any) -> None:
        # SGLang knows how to abort what stands in its waiting queue, so ours goes there first.
        for request in self.blend.remove_waiting(
            lambda rid: recv_req.abort_all or rid.startswith(recv_req.rid)
        ):
            self.waiting_queue.append(request.req)
        super().abort_request(recv_req)

    def process_batch_result(self, batch: Any, result: Any) -> None:
        super().process_batch_result(batch, result)
        report = self.blend_report
        report.steps += 1
        mode = batch.forward_mode
        if mode.is_decode():
            report.decode_tokens += len(batch.reqs)
        elif mode.is_extend():
            decoding = len(batch.decoding_reqs or ())
            # Verification steps of speculative decoding count as extend, without a prompt.
            report.prefill_tokens += max((batch.extend_num_tokens or 0) - decoding, 0)
            report.decode_tokens += decoding
        if self.blend.running:
            self.blend.drop_finished()
            self._send_report()

    # -- admission ---------------------------------------------------------------------------

    def get_new_batch_prefill(self, running_batch: Any) -> NextBatchPlan:
        if running_batch.is_empty():
            # SGLang up to 0.5.22 can leave the flag set when the batch drains.
            running_batch.batch_is_full = False
        elif self.is_mixed_chunk and not running_batch.check_decode_mem():
            # SGLang up to 0.5.21 does not check decode memory in a mixed step and dies when it
            # runs out; a step of decodes alone makes room by retraction.
            return NextBatchPlan(batch_to_run=None, running_batch=running_batch)
        offered = self._offer(running_batch) if len(self.blend) or self.blend.running else []
        plan = super().get_new_batch_prefill(running_batch)
        if offered:
            self._take_back(offered, plan.batch_to_run)
        return plan

    def _offer(self, running_batch: Any) -> list[PlannedRequest]:
        """Move the requests that may start now from the side queues to SGLang's waiting queue."""
        kv = self._kv_state()
        growing = float(kv.growth.remaining_tokens.sum())
        slots = self.get_num_allocatable_reqs(len(running_batch.reqs)) - len(self.waiting_queue)
        budget = self._prefill_budget(running_batch)
        filling = [_token_ids(req) for req in self._prefilling()]
        candidates: dict[Side, Candidate | None] = {
            side: self._candidate(side, filling) for side in Side
        }
        offered: list[PlannedRequest] = []
        while slots > len(offered) and budget > 0:
            side = self.blend_admission.choose(
                candidates[Side.LEFT], candidates[Side.RIGHT], kv, self.blend_target_density
            )
            if side is None:
                break
            candidate = candidates[side]
            assert candidate is not None
            holder = self._prefix_holder(_token_ids(self.blend.waiting[side][0].req))
            request = self.blend.start(side, candidate.private_tokens)
            if holder is not None:
                # What two requests hold does not come free when one of them ends.
                holder.private_tokens = min(
                    holder.private_tokens, holder.prompt_tokens - candidate.locked_prefix_tokens
                )
            super()._add_request_to_queue(request.req)
            offered.append(request)
            filling.append(_token_ids(request.req))
            budget -= candidate.uncached_tokens
            kv = kv.with_started(candidate)
            # The request that just started fills a prefix that either head may share.
            candidates = {side: self._candidate(side, filling) for side in Side}
        self._share_growth(kv, growing, offered)
        return offered

    def _share_growth(self, kv: KVState, growing: float, offered: list[PlannedRequest]) -> None:
        """Tell SGLang's own memory test how much of the running requests' growth to keep free.

        It adds up all growth, as if everyone reached full length at the same time. Our test knows
        that the short ones have given their memory back by then; SGLang's must not refuse what
        ours admitted, and charges the newly offered for all that they may produce.
        """
        charged = sum(request.req.sampling_params.max_new_tokens for request in offered)
        needed = kv.growth.peak_tokens() - charged
        BlendScheduler.growth_share = min(max(needed / growing, 0.0), 1.0) if growing else 1.0

    def _take_back(self, offered: list[PlannedRequest], batch: Any) -> None:
        """Return what SGLang's own budget left in the waiting queue to the front of its side."""
        left_over = {id(req) for req in self.waiting_queue}
        admitted = {id(req) for req in batch.reqs} if batch is not None else set()
        for request in reversed(offered):
            if id(request.req) in left_over:
                self.blend.put_back(request)
            elif id(request.req) in admitted:
                self.blend_target_density = request.tag.target_density
                self.blend_report.prompt_tokens += request.prompt_tokens
                self.blend_report.cached_tokens += len(request.req.prefix_indices)
            else:
                # SGLang answered it on the spot, for example because its queue limit is reached.
                self.blend.finish(request.req.rid)
        returned = {id(request.req) for request in offered} & left_over
        if returned:
            self.waiting_queue = [req for req in self.waiting_queue if id(req) not in returned]

    def _candidate(self, side: Side, filling: list[NDArray[np.int64]]) -> Candidate | None:
        """The head of a side as the admission code sees it; None if the side is empty."""
        request = self.blend.head(side)
        if request is None:
            return None
        req = request.req
        req.init_next_round_input(self.tree_cache)
        cached = min(len(req.prefix_indices), request.prompt_tokens - 1)
        tokens = _token_ids(req)
        blocked = any(
            _common_prefix(tokens, other) - cached >= _MIN_SHARED_TOKENS for other in filling
        )
        holder = self._prefix_holder(tokens)
        shared = _common_prefix(tokens, _token_ids(holder.req)) if holder is not None else 0
        return Candidate(
            side=side,
            prompt_tokens=request.prompt_tokens,
            uncached_tokens=request.prompt_tokens + len(req.output_ids) - cached,
            estimated_output_tokens=request.output_tokens,
            density=request.tag.density,
            blocked=blocked,
            # Cached tokens that a running request holds anyway take nothing from the free ones.
            locked_prefix_tokens=min(shared, cached),
        )

    def _prefix_holder(self, tokens: NDArray[np.int64]) -> PlannedRequest | None:
        """The running request with the longest common prefix."""
        return max(
            self.blend.latest_running(),
            key=lambda other: _common_prefix(tokens, _token_ids(other.req)),
            default=None,
        )

    def _prefilling(self) -> Iterator[Any]:
        """Requests whose prompt is being computed, so that its KV cannot be shared yet."""
        if self.chunked_req is not None:
            yield self.chunked_req
        # With overlap scheduling the last step's result is processed after the next is launched.
        for batch, _ in getattr(self, "result_queue", ()):
            if batch.forward_mode.is_extend():
                yield from batch.reqs[: len(batch.reqs) - len(batch.decoding_reqs or ())]

    def _prefill_budget(self, running_batch: Any) -> float:
        """Prompt tokens that one step can take besides what is already due."""
        if self.chunked_prefill_size is None:
            return float(self.max_prefill_tokens)
        budget = self.chunked_prefill_size
        if self.is_mixed_chunk:
            budget -= len(running_batch.reqs)
        if self.chunked_req is not None:
            budget -= len(self.chunked_req.origin_input_ids) - len(self.chunked_req.prefix_indices)
        return float(min(budget, self.max_prefill_tokens))

    def _kv_state(self) -> KVState:
        free = self.token_to_kv_pool_allocator.available_size() + self.tree_cache.evictable_size()
        return KVState(
            total_tokens=self.max_total_num_tokens,
            free_tokens=free,
            left_tokens=self.blend.account(Side.LEFT),
            right_tokens=self.blend.account(Side.RIGHT),
            growth=self.blend.growth(),
        )

    # -- report ------------------------------------------------------------------------------

    def _send_report(self) -> None:
        if self.blend_sender is None:
            return
        report = self.blend_report
        report.target_density = self.blend_target_density
        report.retractions = self.blend.retractions
        report.kv_total_tokens = self.max_total_num_tokens
        report.kv_free_tokens = int(
            self.token_to_kv_pool_allocator.available_size() + self.tree_cache.evictable_size()
        )
        for side in Side:
            report.taken[side.value] = self.blend.taken[side]
            report.queued[side.value] = len(self.blend.waiting[side])
            report.running[side.value] = self.blend.running_count(side)
            report.account_tokens[side.value] = self.blend.account(side)
        self.blend_sender.send(report)


def expected_growth(original: Callable[..., float], adder: Any, req: Any) -> float:
    """KV tokens to keep free for a running request; AROUND hook of SGLang's prefill adder.

    SGLang guesses from max_new_tokens and a ratio tuned for chat; a plan has an estimate.
    """
    tag = PlanTag.from_params(req.sampling_params.custom_params)
    if tag is None:
        return float(original(adder, req))
    return PlannedRequest(req, tag).remaining_tokens * BlendScheduler.growth_share


def _token_ids(req: Any) -> NDArray[np.int64]:
    return np.asarray(req.origin_input_ids, dtype=np.int64)


def _common_prefix(a: NDArray[np.int64], b: NDArray[np.int64]) -> int:
    """Length of the common prefix of two token sequences."""
    n = min(len(a), len(b))
    different = np.flatnonzero(a[:n] != b[:n])
    return int(different[0]) if len(different) else n
