"""The scheduler's two short queues of planned requests, and the memory each side has booked."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import islice
from typing import Any

import numpy as np

from blendserve.planner import Growth, Side, account_side, account_tokens
from blendserve.runtime.plan_tag import PlanTag

# Memory is kept for this much more than the estimate: outgrowing it costs a retraction, which
# computes everything anew, while memory kept in vain is only lent a little later.
_MEMORY_MARGIN = 1.25
# How far back, and for how many of each side, to look for a running request that holds a prefix.
_LATEST_SEARCHED = 64
_LATEST_PER_SIDE = 8


@dataclass
class PlannedRequest:
    """A planned request in the scheduler: SGLang's own request object and its plan tag."""

    req: Any
    tag: PlanTag
    private_tokens: int = 0
    """Prompt tokens that no other running request held when it started."""

    @property
    def prompt_tokens(self) -> int:
        return len(self.req.origin_input_ids)

    @property
    def output_tokens(self) -> float:
        """Output length to keep memory for: the estimate with a margin, never past the limit."""
        done = len(self.req.output_ids)
        limit = float(self.req.sampling_params.max_new_tokens)
        return min(max(self.tag.output_tokens * _MEMORY_MARGIN, done + 1.0), limit)

    @property
    def account_tokens(self) -> float:
        """KV memory in steady state: its own prompt tokens plus half the output."""
        return account_tokens(self.private_tokens, self.output_tokens)

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

    def start(self, side: Side, private_tokens: int) -> PlannedRequest:
        """Take the head of a side into the running set."""
        request = self.waiting[side].popleft()
        request.private_tokens = private_tokens
        self.running[request.req.rid] = request
        self.taken[side] += 1
        return request

    def latest_running(self) -> Iterator[PlannedRequest]:
        """Running requests that may hold the prefix of a head.

        Requests that share a prefix start one after the other on a side, so a longer look would
        find no more.
        """
        seen = dict.fromkeys(Side, 0)
        for request in islice(reversed(self.running.values()), _LATEST_SEARCHED):
            side = request.tag.side
            if seen[side] < _LATEST_PER_SIDE:
                seen[side] += 1
                yield request

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

    def growth(self) -> Growth:
        """What the running planned requests will still take from the KV pool."""
        requests = self.running.values()
        return Growth(
            remaining_tokens=np.array([request.remaining_tokens for request in requests]),
            private_tokens=np.array(
                [request.private_tokens + len(request.req.output_ids) for request in requests],
                dtype=np.float64,
            ),
        )
