"""The scheduler's two short queues of planned requests, and what the running ones hold."""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, NamedTuple

import numpy as np

from blendserve.planner import Side
from blendserve.policy import BlendPolicy, Candidate
from blendserve.policy.kv_account import candidate_of
from blendserve.runtime.plan_tag import PLAN_ATTRIBUTE, LengthUpdate, PlanTag
from blendserve.runtime.started_prompts import (
    Prompt,
    SharedPrefix,
    StartedPrompts,
    beginning_of,
    namespace_of,
)


@dataclass(slots=True, eq=False)
class PlannedRequest:
    """A planned request in the scheduler: SGLang's own request object and its plan tag."""

    req: Any
    tag: PlanTag
    prompt: Prompt = field(init=False)
    # Of one that has started: how many stood before it.
    place: int = 0

    def __post_init__(self) -> None:
        # No copy where SGLang keeps the tokens in an array.
        tokens = np.asarray(self.req.origin_input_ids, dtype=np.int64)
        self.prompt = Prompt(tokens, namespace_of(self.req))

    def candidate(self, shared: SharedPrefix) -> Candidate:
        """This request as the admission code sees it."""
        return candidate_of(
            self.req.rid,
            self.tag.side,
            self.tag.density,
            len(self.req.origin_input_ids),
            len(self.req.output_ids),
            self.tag.output_tokens,
            self.tag.likely_output_tokens,
            self.req.sampling_params.max_new_tokens,
            guessed=self.tag.guessed,
            cached_tokens=shared.cached_tokens,
            locked_tokens=shared.locked_tokens,
            blocked=shared.blocked,
        )


class _Looked(NamedTuple):
    """A waiting request as it was last seen."""

    request: PlannedRequest
    shared: SharedPrefix
    candidate: Candidate


class SideQueues:
    """Waiting requests per side in the order of their arrival, and the running ones.

    Args:
        policy: is told who starts and ends.
        prefill_steps: decode steps that the others make while so many prompt tokens are computed.

    Attributes:
        account: the policy's, of the memory that the running requests hold and will take.
        waiting_seconds: (compute, memory) of what waits, by the cost model.
        taken: requests of each side that have left its queue for good, so far.
    """

    def __init__(
        self, policy: BlendPolicy, prefill_steps: Callable[[int], int] = lambda tokens: 0
    ) -> None:
        self.policy = policy
        self._prefill_steps = prefill_steps
        self.waiting: dict[Side, deque[PlannedRequest]] = {side: deque() for side in Side}
        self.running: dict[str, PlannedRequest] = {}
        self.account = policy.account
        self.taken: dict[Side, int] = dict.fromkeys(Side, 0)
        self.waiting_seconds = (0.0, 0.0)
        self._prompts = StartedPrompts()
        # The first of each queue as they were last seen, while nothing has happened that would
        # change them.
        self._looked: dict[Side, list[_Looked]] = {side: [] for side in Side}

    def __len__(self) -> int:
        """Requests that wait."""
        return len(self.waiting[Side.LEFT]) + len(self.waiting[Side.RIGHT])

    def add(self, request: PlannedRequest) -> None:
        """Append a new arrival to its side; what goes on comes before what has not begun."""
        self._count_waiting(request, +1)
        queue = self.waiting[request.tag.side]
        if not request.tag.goes_on:
            queue.append(request)
            return
        place = next((at for at, other in enumerate(queue) if not other.tag.goes_on), len(queue))
        queue.insert(place, request)
        self._looked[request.tag.side].clear()

    def candidate(self, side: Side) -> Candidate | None:
        """The head of a side as the admission code sees it; None if nothing waits there."""
        return next(self.look(side), None)

    def look(self, side: Side) -> Iterator[Candidate]:
        """The requests of a side as the admission code sees them, the head first. Nothing may
        start or come while one looks."""
        looked, queue = self._looked[side], self.waiting[side]
        for at in range(len(queue)):
            if at == len(looked):
                looked.append(self._look_at(queue[at]))
            candidate = looked[at].candidate
            candidate.prefill_steps = self._prefill_steps(candidate.uncached_tokens)
            yield candidate

    def _look_at(self, request: PlannedRequest) -> _Looked:
        shared = self._prompts.shared(request.prompt)
        candidate = request.candidate(shared)
        if shared.holder is not None:
            candidate.newly_shared_tokens = self.account.held_alone(
                shared.holder, self._beyond_shared(shared)
            )
        return _Looked(request, shared, candidate)

    def _look_anew(self) -> None:
        for looked in self._looked.values():
            looked.clear()

    def learn(self, updates: Sequence[LengthUpdate]) -> None:
        """A new plan expects other lengths of requests that were sent before it."""
        waiting = {request.req.rid: request for queue in self.waiting.values() for request in queue}
        for update in updates:
            request = self.running.get(update.rid) or waiting.get(update.rid)
            if request is None:
                continue  # It has ended on the way.
            # What it shares stays as it was planned.
            prompt = len(request.req.origin_input_ids)
            now, before = (
                self.policy.density(prompt, max(tokens, 1.0))
                for tokens in (update.output_tokens, request.tag.output_tokens)
            )
            request.tag = replace(
                request.tag,
                density=request.tag.density * (now / before if math.isfinite(before) else 1.0),
                output_tokens=update.output_tokens,
                likely_output_tokens=update.likely_output_tokens,
                guessed=update.guessed,
            )
            setattr(request.req, PLAN_ATTRIBUTE, request.tag)  # For a retraction.
            done = len(request.req.output_ids)
            self.policy.learn(
                update.rid,
                done,
                update.output_tokens,
                update.likely_output_tokens,
                update.guessed,
            )
        self._look_anew()

    def start(self, candidate: Candidate) -> PlannedRequest:
        """Take one that was looked at into the running set and book its memory."""
        side = candidate.side
        looked, queue = self._looked[side], self.waiting[side]
        place = next(at for at, seen in enumerate(looked) if seen.candidate is candidate)
        request, shared, _ = looked.pop(place)
        del queue[place]
        request.place = place
        self._count_waiting(request, -1)
        rid = request.req.rid
        for seen in self._looked.values():
            alike = (
                at
                for at, other in enumerate(seen)
                if other.request.prompt.beginning == request.prompt.beginning
            )
            del seen[next(alike, len(seen)) :]
        self.policy.start(candidate, len(request.req.output_ids))
        if shared.holder is not None:
            # What two requests hold does not come free when one of them ends.
            self.account.share(shared.holder, self._beyond_shared(shared))
        self._prompts.start(rid, side, request.prompt, shared.cached_tokens)
        self.running[rid] = request
        self.taken[side] += 1
        return request

    def _beyond_shared(self, shared: SharedPrefix) -> int:
        """Tokens of the holder's prompt beyond the shared prefix."""
        assert shared.holder is not None
        return len(self.running[shared.holder].req.origin_input_ids) - shared.locked_tokens

    def put_back(self, request: PlannedRequest) -> None:
        """Undo ``start`` for a request that SGLang did not admit after all."""
        self.finish(request.req.rid)
        self._requeue(request, request.place)

    def retract(self, request: PlannedRequest) -> None:
        """A running request lost its memory: it waits again, at the front of its side."""
        self.finish(request.req.rid)
        self.policy.retracted()
        self._requeue(request)

    def _requeue(self, request: PlannedRequest, place: int = 0) -> None:
        # It counted as taken; the engine process must not send another one in its place.
        self.taken[request.tag.side] -= 1
        self._count_waiting(request, +1)
        self.waiting[request.tag.side].insert(place, request)
        self._looked[request.tag.side].clear()

    def prefilled(self, rid: str) -> bool:
        """The prompt of a request is in the KV pool now. True if that is news."""
        news = self._prompts.prefilled(rid)
        if news:
            self._look_anew()
            req = self.running[rid].req
            done = len(req.output_ids)
            self.policy.prefilled(rid, len(req.origin_input_ids) + done, done)
        return news

    def finish(self, rid: str) -> bool:
        """A request has ended or lost its memory. False if it was not a running planned one."""
        if self.running.pop(rid, None) is None:
            return False
        self._look_anew()
        self.policy.end(rid)
        self._prompts.end(rid)
        return True

    def forget_running(self) -> None:
        """Nothing runs in the engine: drop what is still booked."""
        for rid in list(self.running):
            self.finish(rid)

    def flushed(self) -> None:
        """The prefix cache is empty."""
        self._prompts.forget_ended()
        self._look_anew()

    def evicted(self, beginning: Sequence[int], namespace: str = "") -> None:
        """A prefix that waiting requests were to find is gone. Of its tokens, the first few do."""
        key = beginning_of(np.asarray(beginning, dtype=np.int64), namespace)
        if key:
            self._prompts.forget_ended(key)
            self._look_anew()

    def remove_waiting(self, matches: Callable[[str], bool]) -> Iterator[PlannedRequest]:
        """Take the waiting requests whose id matches out of their queues."""
        for side, queue in self.waiting.items():
            removed = [request for request in queue if matches(request.req.rid)]
            if removed:
                self.waiting[side] = deque(
                    request for request in queue if not matches(request.req.rid)
                )
                self.taken[side] += len(removed)
                self._looked[side].clear()
                for request in removed:
                    self._count_waiting(request, -1)
                    self.policy.overtaking.forget(request.req.rid)
                yield from removed

    def _count_waiting(self, request: PlannedRequest, sign: int) -> None:
        compute, memory = self.waiting_seconds
        self.waiting_seconds = (
            max(compute + sign * request.tag.compute_seconds, 0.0),
            max(memory + sign * request.tag.memory_seconds, 0.0),
        )
