"""The scheduler's two short queues of planned requests, and the memory each side has booked."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

from blendserve.planner import Side, account_side, account_tokens
from blendserve.runtime.plan_tag import PlanTag


@dataclass
class PlannedRequest:
    """A planned request in the scheduler: SGLang's own request object and its plan tag."""

    req: Any
    tag: PlanTag

    @property
    def prompt_tokens(self) -> int:
        return len(self.req.origin_input_ids)

    @property
    def output_tokens(self) -> float:
        """Expected output length: the estimate, but never past what is allowed or already out."""
        done = len(self.req.output_ids)
        limit = float(self.req.sampling_params.max_new_tokens)
        return min(max(self.tag.output_tokens, done + 1.0), limit)

    @property
    def account_tokens(self) -> float:
        """KV memory in steady state: prompt plus half the output (paper, section 4)."""
        return account_tokens(self.prompt_tokens, self.output_tokens)

    @property
    def account_side(self) -> Side:
        """The side whose memory it holds; a long decode counts on the right."""
        return account_side(self.tag.side, len(self.req.output_ids), self.tag.output_tokens)

    @property
    def remaining_tokens(self) -> float:
        """Output tokens still expected, each of which needs KV memory."""
        return self.output_tokens - len(self.req.output_ids)


class SideQueues:
    """Waiting requests per side in rank order, and the running ones by request id."""

    def __init__(self) -> None:
        self.waiting: dict[Side, deque[PlannedRequest]] = {side: deque() for side in Side}
        self.running: dict[str, PlannedRequest] = {}
        self.taken: dict[Side, int] = dict.fromkeys(Side, 0)
        self.retractions = 0

    def __len__(self) -> int:
        return sum(len(queue) for queue in self.waiting.values())

    def add(self, request: PlannedRequest) -> None:
        """Append a new arrival to its side."""
        self.waiting[request.tag.side].append(request)

    def head(self, side: Side) -> PlannedRequest | None:
        queue = self.waiting[side]
        return queue[0] if queue else None

    def start(self, side: Side) -> PlannedRequest:
        """Take the head of a side into the running set."""
        request = self.waiting[side].popleft()
        self.running[request.req.rid] = request
        self.taken[side] += 1
        return request

    def put_back(self, request: PlannedRequest) -> None:
        """Undo ``start`` for a request that SGLang did not admit after all."""
        del self.running[request.req.rid]
        self.taken[request.tag.side] -= 1
        self.waiting[request.tag.side].appendleft(request)

    def retract(self, request: PlannedRequest) -> None:
        """A running request lost its memory: it waits again, at the front of its side."""
        self.running.pop(request.req.rid, None)
        self.retractions += 1
        # It counts as taken already; the front process must not send another one for it.
        self.taken[request.tag.side] -= 1
        self.waiting[request.tag.side].appendleft(request)

    def finish(self, rid: str) -> None:
        self.running.pop(rid, None)

    def drop_finished(self) -> None:
        """Forget the running requests that have ended, however they ended."""
        finished = [rid for rid, request in self.running.items() if request.req.finished()]
        for rid in finished:
            self.finish(rid)

    def remove_waiting(self, matches: Callable[[str], bool]) -> Iterator[PlannedRequest]:
        """Take the waiting requests whose id matches out of their queues."""
        for side, queue in self.waiting.items():
            kept = deque(request for request in queue if not matches(request.req.rid))
            if len(kept) == len(queue):
                continue
            removed = [request for request in queue if matches(request.req.rid)]
            self.waiting[side] = kept
            self.taken[side] += len(removed)
            yield from removed

    def account(self, side: Side) -> float:
        """KV tokens booked by the running requests of a side."""
        return sum(
            request.account_tokens
            for request in self.running.values()
            if request.account_side is side
        )

    def running_count(self, side: Side) -> int:
        return sum(request.account_side is side for request in self.running.values())

    def remaining_tokens(self) -> float:
        """Output tokens that the running planned requests are still expected to produce."""
        return sum(request.remaining_tokens for request in self.running.values())
