"""SGLang's scheduler with dual-scan admission for the requests of batch jobs.

A planned request (one whose ``custom_params`` carry a plan tag) waits in one of two short queues
instead of SGLang's waiting queue. Before each prefill batch is built, the admission code chooses
which heads may start, and hands those, and only those, to SGLang, whose own code builds and runs
the batch. A request without a tag never touches any of this.

What may start changes only when a request arrives, ends, is prefilled or outlives its estimate:
all others decode in step, and take the memory that was reserved for them. So a step in which none
of this happened costs a few comparisons, whatever the number of running requests.
"""

from __future__ import annotations

import gc
import math
from typing import Any

from sglang.srt.managers import scheduler as scheduler_module
from sglang.srt.managers.scheduler import NextBatchPlan, Scheduler
from sglang.srt.managers.utils import is_health_check_generate_req

from blendserve import __version__
from blendserve.config import load_settings
from blendserve.planner import Side, StepPace
from blendserve.policy import BlendPolicy, Steps
from blendserve.runtime import prefix_paths, sampling_rows
from blendserve.runtime.cache_salt import take_salt
from blendserve.runtime.device import cost_model_of
from blendserve.runtime.feedback import ReportSender, SchedulerReport
from blendserve.runtime.multiplex import BlendMultiplex
from blendserve.runtime.online import BlendOnline, OnlineTraffic, OnlineWait
from blendserve.runtime.plan_tag import PLAN_ATTRIBUTE, PlanTag, without_tag
from blendserve.runtime.prefill_adder import (
    BlendPrefillAdder,
    cached_tokens,
)
from blendserve.runtime.radix_cache import BlendRadixCache
from blendserve.runtime.releases import has_answer, watch_releases
from blendserve.runtime.side_queues import PlannedRequest, SideQueues
from blendserve.runtime.step_room import StepRoom
from blendserve.runtime.trace import StepTrace

# Objects, and young and old generations, after which Python collects garbage.
_GC_THRESHOLDS = (50_000, 20, 100)
# Steps after which a report is sent even if nothing was taken from the queues.
_REPORT_STEPS = 16


class BlendScheduler(BlendOnline, BlendMultiplex, Scheduler):  # type: ignore[misc]
    """SGLang's scheduler, plus two queues and an admission test in front of its own."""

    waiting_queue: list[Any]

    # -- life of the scheduler ---------------------------------------------------------------

    def init_running_status(self) -> None:
        super().init_running_status()
        # Thousands of requests and tree nodes live long; to look through them all for garbage
        # takes a tenth of a second, and hardly any of it is garbage.
        gc.set_threshold(*_GC_THRESHOLDS)
        settings = load_settings()
        self.blend_room = StepRoom(self)
        # (compute, memory) seconds of what the engine process has not sent yet, as of the latest
        # request; this replica's part.
        self.blend_rest = (0.0, 0.0)
        self.blend_online = OnlineTraffic(settings.online_share)
        self.blend_held_in_vain = None
        self.blend_waits = OnlineWait()
        # Whether anything has changed since no more could start.
        self.blend_changed = False
        ranks = _parallel_ranks(self)
        self.blend_report = SchedulerReport(dp_rank=ranks.dp_rank or ranks.attn_dp_rank)
        self.blend_reported = (0, 0)
        # One rank of a replica speaks for all: they take the same decisions.
        speaks = ranks.attn_tp_rank == 0 and ranks.pp_rank == 0
        address = settings.feedback_address
        self.blend_sender = ReportSender(address) if address and speaks else None
        self.blend_trace = (
            StepTrace(settings.trace_file) if settings.trace_file and speaks else None
        )
        sampling_rows.protect(self.tp_worker.model_runner.sampler)
        watch_releases(self.tree_cache, self._released)

    def init_chunked_prefill(self) -> None:
        super().init_chunked_prefill()
        cost_model = cost_model_of(self.model_config, self.server_args.tp_size, load_settings())
        self.blend_pace = StepPace.of(cost_model.step_costs, self.chunked_prefill_size or 0)
        steps = Steps.SEPARATE
        if self.is_mixed_chunk:
            steps = Steps.MIXED
        elif self.enable_pdmux:
            steps = Steps.PARALLEL
        self.blend_policy = BlendPolicy(self.max_total_num_tokens, self.blend_pace, steps)
        self.blend = SideQueues(self.blend_policy, self.blend_room.prefill_steps)
        if isinstance(self.tree_cache, BlendRadixCache):
            self.tree_cache.on_planned_eviction = self.blend.evicted

    def get_init_info(self) -> dict[str, Any]:
        # SGLang only logs a replacement that failed; the engine process refuses to serve without.
        live = scheduler_module.PrefillAdder is BlendPrefillAdder
        if live:
            # A data-parallel controller keeps the handshake to itself, so there this is the sign.
            self._send_report()
        return {**super().get_init_info(), "blendserve": __version__ if live else None}

    def is_fully_idle(self, *args: Any, **kwargs: Any) -> bool:
        idle = bool(super().is_fully_idle(*args, **kwargs)) and len(self.blend) == 0
        if idle and self.blend.running:
            self.blend.forget_running()
            self._send_report()
        if idle:
            self.blend_online.forget_all()
        return idle

    def flush_cache(self, *args: Any, **kwargs: Any) -> bool:
        flushed = bool(super().flush_cache(*args, **kwargs))
        if flushed:
            self.blend.flushed()
        return flushed

    # -- arrival and departure ---------------------------------------------------------------

    def _add_request_to_queue(self, req: Any, is_retracted: bool = False) -> None:
        # Read when the request arrived; a retracted one comes again.
        tag: PlanTag | None = getattr(req, PLAN_ATTRIBUTE, None)
        take_salt(req)
        params = req.sampling_params.custom_params
        if tag is None and params:
            tag = PlanTag.from_params(params)
        # A request that failed validation arrives with its end already set: SGLang answers it.
        if tag is None or req.to_finish is not None:
            if not is_retracted and not is_health_check_generate_req(req):
                self.blend_online.arrived(req)
            super()._add_request_to_queue(req, is_retracted=is_retracted)
            return
        self.blend_changed = True
        if is_retracted:
            self.blend.retract(PlannedRequest(req, tag))
            return
        setattr(req, PLAN_ATTRIBUTE, tag)
        req.sampling_params.custom_params = without_tag(params)
        replicas = max(self.server_args.dp_size, 1)
        self.blend_rest = (tag.rest_compute_seconds / replicas, tag.rest_memory_seconds / replicas)
        self.blend.add(PlannedRequest(req, tag))
        if tag.updates:
            self.blend.learn(tag.updates)

    def abort_request(self, recv_req: Any) -> None:
        # SGLang knows how to abort what stands in its waiting queue, so ours goes there first.
        for request in self.blend.remove_waiting(
            lambda rid: recv_req.abort_all or rid.startswith(recv_req.rid)
        ):
            self.waiting_queue.append(request.req)
            self.blend_changed = True
        waited = {req.rid for req in self.waiting_queue}
        super().abort_request(recv_req)
        self.blend_online.forget(waited - {req.rid for req in self.waiting_queue})
        # Nothing may run any more whose end would bring the next report.
        self._send_report()

    def _released(self, rid: str) -> None:
        """SGLang has given the memory of a request back."""
        planned = self.blend.running.get(rid)
        if planned is not None and has_answer(planned.req):
            # One that ends with its prompt, as an embedding: those behind it share that from now.
            self.blend.prefilled(rid)
        if self.blend.finish(rid) or self.blend_online.ended(rid):
            self.blend_changed = True
            self.blend_policy.memory_freed()

    def run_batch(self, batch: Any, *args: Any, **kwargs: Any) -> Any:
        prefix_paths.current.reqs = batch.reqs
        return super().run_batch(batch, *args, **kwargs)

    def process_batch_result(self, batch: Any, result: Any) -> None:
        # Where SGLang overlaps steps, a request that has ended or was retracted is decoded once
        # more, for nothing.
        in_vain = sum(req.finished() or bool(req.is_retracted) for req in batch.reqs)
        super().process_batch_result(batch, result)
        report = self.blend_report
        report.steps += 1
        self.blend_online.step()
        mode = batch.forward_mode
        prefilled = decoded = 0
        if mode.is_decode():
            decoded = len(batch.reqs) - in_vain
        elif mode.is_extend():
            beside = len(batch.decoding_reqs or ())
            decoded = max(beside - in_vain, 0)
            # Verification steps of speculative decoding count as extend, without a prompt. The sum
            # of the tokens is not in the copy of a batch that 0.5.16 makes to overlap steps.
            prefilled = max(sum(batch.extend_lens or ()) - beside, 0)
            for req in batch.reqs[: len(batch.reqs) - beside]:
                # Only the last chunk of a prompt brings a token. (`chunked_req` would not do: where
                # SGLang overlaps steps, it tells of the batch after this one.)
                if req.output_ids and self.blend.prefilled(req.rid):
                    self.blend_changed = True
        report.prefill_tokens += prefilled
        report.decode_tokens += decoded
        compute, memory = self.blend_pace.seconds(
            prefilled + decoded, self.blend_policy.decodes.context_tokens if decoded else 0
        )
        report.compute_seconds += compute
        report.memory_seconds += memory
        if decoded and self.blend_policy.decoded(decoded, compute + memory):
            self.blend_changed = True
        if self.blend_trace is not None:
            self.blend_trace.step(self, batch, prefilled, decoded)
        taken = (self.blend.taken[Side.LEFT], self.blend.taken[Side.RIGHT])
        running = bool(self.blend.running)
        # The last ones have ended: nothing else would bring a report of that.
        ended = not running and any(report.running.values())
        if taken != self.blend_reported or ended or (report.steps % _REPORT_STEPS == 0 and running):
            self.blend_reported = taken
            self._send_report()

    # -- admission ---------------------------------------------------------------------------

    def get_new_batch_prefill(self, running_batch: Any) -> NextBatchPlan:
        if running_batch.is_empty():
            # SGLang up to 0.5.22 can leave the flag set when the batch drains.
            running_batch.batch_is_full = False
        elif self.is_mixed_chunk and not self.blend_room.mixed_step_fits(running_batch):
            # SGLang up to 0.5.21 does not check decode memory in a mixed step and dies when it
            # runs out; a step of decodes alone makes room by retraction.
            return NextBatchPlan(batch_to_run=None, running_batch=running_batch)
        passed = self._online_to_pass(running_batch)
        if not passed:
            return self._new_prefill(running_batch)
        # SGLang stops at the first that does not fit, so they stand aside for this step.
        self.waiting_queue = []
        running_batch.batch_is_full = False
        self.blend_changed = True
        try:
            return self._new_prefill(running_batch)
        finally:
            self.waiting_queue = passed + self.waiting_queue

    def _new_prefill(self, running_batch: Any) -> NextBatchPlan:
        online_waits = bool(self.waiting_queue)
        if not online_waits and self._decode_is_due(running_batch):
            return NextBatchPlan(batch_to_run=None, running_batch=running_batch)
        first = self.waiting_queue[0].rid if online_waits else None
        BlendPrefillAdder.chunk_limit = self._chunk_limit(running_batch)
        # Online requests get all that a step can take.
        BlendPrefillAdder.step_tokens = None if online_waits else self._step_tokens(running_batch)
        offered: list[PlannedRequest] = []
        # Online requests go first, alone: a prefill batch is the longest step there is.
        may_offer = not online_waits and not running_batch.batch_is_full
        if self.chunked_req is None and self.blend_policy.waits(len(running_batch.reqs)):
            may_offer = False
        if self.blend_changed and may_offer and len(self.blend):
            offered = self._offer(running_batch)
        BlendPrefillAdder.all_planned = not self.blend_online.present
        if self.blend.running and (self.waiting_queue or self.chunked_req is not None):
            steps = self._online_steps() if online_waits else math.inf
            growth = self.blend.account.growth_tokens(steps)
            if offered:
                # It fits for as long as it may run; what comes after is not its doing.
                growth = min(growth, max(self.blend.account.free_tokens, 0.0))
            if self.is_mixed_chunk:
                # SGLang counts this step's decode tokens beside it.
                growth -= min(len(running_batch.reqs), len(self.blend.account))
            # SGLang wants more than a token and a page beyond each prompt to be free.
            BlendPrefillAdder.growth_tokens = growth - len(offered) * (1 + self.page_size) - 1
        plan = super().get_new_batch_prefill(running_batch)
        if first is not None and self.waiting_queue and self.waiting_queue[0].rid == first:
            self.blend_held_in_vain = first
        if offered:
            self._take_back(offered, plan.batch_to_run)
        return plan

    def _step_tokens(self, running_batch: Any) -> int | None:
        """Prompt tokens of the next step; None for as many as SGLang takes."""
        if not self.blend_policy.paced or not (self.blend.running or len(self.blend)):
            return None
        self._tell_rest()
        tokens = self.blend_policy.prefill_tokens(
            self.blend_room.chunks_to_come(), len(running_batch.reqs)
        )
        page = int(self.page_size)
        return -(-tokens // page) * page

    def _tell_rest(self) -> None:
        """What has not started: not sent yet, or waiting here."""
        seconds = zip(self.blend_rest, self.blend.waiting_seconds, strict=True)
        compute, memory = (rest + waiting for rest, waiting in seconds)
        self.blend_policy.rest_seconds = (compute, memory)

    def _offer(self, running_batch: Any) -> list[PlannedRequest]:
        """Move the requests that may start now from the side queues to SGLang's waiting queue."""
        account = self.blend.account
        account.free_tokens, account.others_tokens = self.blend_room.free_tokens()
        self._tell_rest()
        slots = self.get_num_allocatable_reqs(len(running_batch.reqs))
        budget = self.blend_room.prefill_budget(running_batch)
        offered: list[PlannedRequest] = []
        while len(offered) < slots and budget > 0:
            candidate = self.blend_policy.choose(self.blend)
            if candidate is None:
                # Nothing more, until something changes.
                self.blend_changed = False
                break
            request = self.blend.start(candidate)
            super()._add_request_to_queue(request.req)
            offered.append(request)
            budget -= candidate.uncached_tokens
            self._tell_rest()
        if offered:
            heads = (self.blend.candidate(side) for side in Side)
            waits = any(head is not None and head.blocked for head in heads)
            self.blend_policy.prefill_began(goes_on=budget <= 0 or waits)
        return offered

    def _take_back(self, offered: list[PlannedRequest], batch: Any) -> None:
        """Return what SGLang's own budget left in the waiting queue to the front of its side."""
        left_over = {id(req) for req in self.waiting_queue}
        admitted = {id(req) for req in batch.reqs} if batch is not None else set()
        report = self.blend_report
        for request in reversed(offered):
            if id(request.req) in left_over:
                self.blend.put_back(request)
                self.blend_changed = True
            elif id(request.req) in admitted:
                report.prompt_tokens += len(request.req.origin_input_ids)
                report.cached_tokens += cached_tokens(request.req)
            else:
                # SGLang answered it on the spot, for example because its queue limit is reached.
                self.blend.finish(request.req.rid)
        returned = {id(request.req) for request in offered} & left_over
        if returned:
            self.waiting_queue = [req for req in self.waiting_queue if id(req) not in returned]

    # -- report ------------------------------------------------------------------------------

    def _send_report(self) -> None:
        if self.blend_sender is None:
            return
        report = self.blend_report
        account = self.blend.account
        report.target_density = self.blend_policy.target_density
        report.retractions = self.blend_policy.retractions
        report.kv_total_tokens = self.max_total_num_tokens
        report.kv_free_tokens = self.blend_room.free_or_evictable()
        for side in Side:
            report.taken[side.value] = self.blend.taken[side]
            report.queued[side.value] = len(self.blend.waiting[side])
            report.running[side.value] = account.running[side]
        report.account_tokens["left"] = account.left_tokens
        report.account_tokens["right"] = account.right_tokens
        self.blend_sender.send(report)


def _parallel_ranks(scheduler: Any) -> Any:
    """SGLang's object with the ranks of this process."""
    if hasattr(scheduler, "ps"):  # Up to 0.5.20.
        return scheduler.ps
    return scheduler_module.get_parallel()
