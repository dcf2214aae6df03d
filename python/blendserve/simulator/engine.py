"""A modelled engine, step by step: continuous batching, chunked prefill, paged KV memory with a
radix cache, decode growth, retraction.

Every step, all running decodes advance by one token and the oldest prefills get the step's budget
of prompt tokens; or, where steps are not mixed, decodes wait while anything is left to prefill. The
cost of a step does not depend on the size of the job: decodes are kept as two sums and a calendar
of their ends, so a step costs as much as what starts and ends in it.
"""

from __future__ import annotations

import heapq
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from blendserve.planner import PrefixTree, StepCosts

from .kv_cache import KVCache
from .step_time import OverlapModel

Ints = NDArray[np.int64]


class Scheduler(Protocol):
    """Decides what starts; the engine does the rest."""

    def prefill_budget(self, engine: Engine) -> int:
        """Prompt tokens that the next step may compute."""

    def pick(self, engine: Engine) -> int | None:
        """The request to start now, None when none may. Called again until it says None or the
        step's budget is used up."""

    def started(self, engine: Engine, request: int, own_tokens: int) -> None:
        """It holds so many tokens beyond the inner nodes of the tree."""

    def prefilled(self, engine: Engine, request: int, context_tokens: int, done: int) -> None:
        """It decodes from the next step on, with so many tokens in all, and of output."""

    def patience(self, engine: Engine) -> int:
        """For how many steps, while nothing ends, `pick` need not be asked again."""

    def ended(self, engine: Engine, request: int) -> None:
        """It has its last token."""

    def retracted(self, engine: Engine, request: int) -> None:
        """It lost its memory and must start again, with what it has produced as prompt."""


class EngineStuck(RuntimeError):
    """Nothing runs and nothing may start: the job needs more memory than there is."""


@dataclass
class Totals:
    """What a run did, in steps, seconds and tokens.

    seconds: under each overlap model of the engine.
    compute_seconds, memory_seconds: of the operators alone, not overlapped. floor_seconds: the
    part of compute_seconds that GEMMs would not have taken in large steps. cached_tokens: of
    prompts, at their first start. prefill_tokens: computed at first starts; recomputed_tokens:
    computed again after retraction; evicted_shared_tokens: dropped from the cache for want of
    memory, tails of finished requests apart. decode_tokens: produced by decode steps; one more
    comes with every start.
    """

    steps: int = 0
    seconds: list[float] = field(default_factory=list)
    compute_seconds: float = 0.0
    memory_seconds: float = 0.0
    floor_seconds: float = 0.0
    cached_tokens: int = 0
    prefill_tokens: int = 0
    recomputed_tokens: int = 0
    decode_tokens: int = 0
    starts: int = 0
    evicted_shared_tokens: int = 0
    retractions: int = 0
    trace: list[tuple[float, float, float, int]] = field(default_factory=list)


class Engine:
    """One replica. output: (n,) tokens by request index, at least 1 each. members: how many of the
    requests will be started here, for `run` to know its end. received: prompts come with their
    KV, computed elsewhere; they take memory, but no time here. mixed: whether prefill and decodes
    share steps, as SGLang does with --enable-mixed-chunk. shared_decode: whether decode attention
    reads what running requests have in common once a step for all (cascade). overlaps: how its time
    is counted; nothing that an engine does depends on its clock, so one run serves several models.
    """

    def __init__(
        self,
        tree: PrefixTree,
        output: Ints,
        members: int,
        costs: StepCosts,
        overlaps: Sequence[OverlapModel],
        cache: KVCache,
        received: bool = False,
        mixed: bool = True,
        shared_decode: bool = False,
        trace_every: int = 0,
    ) -> None:
        node = np.empty(tree.num_leaves, dtype=np.int64)
        length = np.empty(tree.num_leaves, dtype=np.int64)
        node[tree.requests] = tree.leaf_parent
        length[tree.requests] = tree.length
        self.prompt: list[int] = length.tolist()
        self.node: list[int] = node.tolist()
        self._prefix: list[int] = tree.depth[node].tolist()
        self._output: list[int] = output.tolist()
        self.capacity = cache.capacity
        self._received = received
        self.mixed = mixed
        self._shared_decode = shared_decode
        self.costs = costs
        self._overlaps = overlaps
        self.cache = cache
        self.totals = Totals()
        self.now = 0  # The step that comes next; where steps are not mixed, of decodes.
        self.decoding = 0
        self.context = 0  # Sum over the decodes of the tokens that their next step attends to.
        self.left = members
        self.ended = 0
        self.prefill_backlog = 0
        self._prefills: deque[list[int]] = deque()  # request, next position, end, found node
        self.generated: dict[int, int] = {}  # Of retracted requests.
        self._decodes: dict[int, tuple[int, int, int]] = {}  # since step, context then, own then
        self._ends: dict[int, list[tuple[int, int]]] = {}
        self._end_steps: list[int] = []
        self._trace_every = trace_every
        self._token_seconds = costs.rates.token
        self.totals.seconds = [0.0] * len(overlaps)

    @property
    def clock(self) -> float:
        """Seconds so far, under the first overlap model."""
        return self.totals.seconds[0]

    @property
    def reads(self) -> int:
        """KV tokens that decode attention reads in the next step."""
        if not self._shared_decode:
            return self.context
        # What is locked is held once, however many need it; prefills hold some of it, too. Each
        # decode's latest token is not in it yet.
        return min(self.context, self.cache.locked + self.decoding)

    @property
    def idle(self) -> bool:
        return not self._prefills and not self.decoding

    def prefill_room(self, chunk_tokens: int) -> int:
        """Prompt tokens of the next step, if it may have so many tokens in all."""
        return max(chunk_tokens - self.decoding, 1) if self.mixed else chunk_tokens

    def generated_by(self, request: int) -> int:
        """Output tokens so far of a running or retracted request."""
        before = self.generated.get(request, 0)
        decode = self._decodes.get(request)
        return before if decode is None else before + 1 + self.now - decode[0]

    def demand(self, request: int) -> tuple[int, int, int, int]:
        """(tokens to prefill, cached, private, filling) of a waiting request if it started now."""
        cached, held, filling = self.cache.find(self.node[request])
        total = self.prompt[request]
        if self.generated:
            total += self.generated.get(request, 0)
        return max(total - cached, 1), cached, total - held, filling

    def run(self, scheduler: Scheduler) -> Totals:
        """Until every member has ended. Raises EngineStuck when nothing can go on."""
        while self.left:
            if not self.advance(scheduler):
                raise EngineStuck(
                    f"{self.left} requests wait, none may start in {self.capacity} tokens of KV "
                    "memory; take a device with more memory"
                )
        return self.totals

    def advance(self, scheduler: Scheduler) -> bool:
        """One step, or several decode-only ones; false when nothing runs and nothing starts."""
        budget = scheduler.prefill_budget(self)
        backlog = self.prefill_backlog
        while backlog < budget:
            request = scheduler.pick(self)
            if request is None:
                break
            backlog += self._start(scheduler, request)
        self.prefill_backlog = backlog
        # As in SGLang, all that starts in a step finds its prefix before memory is freed for any.
        self.cache.make_room(0)
        self.totals.evicted_shared_tokens = self.cache.evicted_shared_tokens
        if self._prefills:
            self._step(scheduler, budget)
        elif self.decoding:
            self._coast(scheduler)
        else:
            return False
        return True

    def _start(self, scheduler: Scheduler, request: int) -> int:
        node, totals = self.node[request], self.totals
        _, held, _ = self.cache.find(node)
        total = self.prompt[request] + self.generated.get(request, 0)
        own = total - self._prefix[request]
        if total - held > self.capacity - self.cache.locked:
            raise EngineStuck(
                f"the {total} tokens of request {request} do not fit the {self.capacity} tokens of "
                "KV memory; take a device with more memory"
            )
        found, cached = self.cache.start(node, own)
        first = max(min(cached, total - 1), 0)
        totals.starts += 1
        if request in self.generated:
            totals.recomputed_tokens += total - first
        else:
            totals.cached_tokens += first
            totals.prefill_tokens += total - first
        self._prefills.append([request, first, total, found])
        scheduler.started(self, request, own)
        return total - first

    def _step(self, scheduler: Scheduler, budget: int) -> None:
        decoding = reads = 0
        if self.mixed:
            self._secure_decodes(scheduler)
            decoding, reads = self.decoding, self.reads
        prefills, costs, totals = self._prefills, self.costs, self.totals
        done = []
        tokens = pairs = prefix = chunks = 0
        room = budget
        while prefills and room > 0:
            item = prefills[0]
            position, end = item[1], item[2]
            take = end - position
            if take > room:
                take = room
                item[1] = position + take
            else:
                prefills.popleft()
                done.append(item)
            pairs += take * (2 * position + take)
            prefix += position
            chunks += 1
            tokens += take
            room -= take
        self.prefill_backlog -= tokens
        sampled = decoding + len(done)
        if self._received:
            tokens = pairs = prefix = chunks = 0
            sampled = decoding
        batch = decoding + tokens
        gemm = costs.token_seconds(batch)
        totals.floor_seconds += gemm - batch * self._token_seconds
        compute = gemm + costs.sampled_seconds(sampled)
        compute += costs.prefill_seconds(chunks, pairs, tokens, prefix)
        memory = costs.decode_seconds(decoding, reads)
        traffic = costs.traffic_seconds(batch, decoding, reads, prefix)
        fixed = costs.step if batch else 0.0
        totals.steps += 1
        for k, overlap in enumerate(self._overlaps):
            totals.seconds[k] += fixed + overlap.seconds(compute, memory, traffic)
        totals.compute_seconds += compute
        totals.memory_seconds += memory
        totals.decode_tokens += decoding
        if self._trace_every and totals.steps % self._trace_every == 0:
            totals.trace.append((totals.seconds[0], compute, memory, self.cache.locked))
        if decoding:
            self.cache.grow(decoding)
            self.context += decoding
        self.now += self.mixed
        if self._end_steps and self._end_steps[0] == self.now:
            self._finish_due(scheduler)
        for request, _, total, found in done:
            self._prefilled(scheduler, request, total, found)

    def _prefilled(self, scheduler: Scheduler, request: int, total: int, found: int) -> None:
        """Its first (next) token came with the last chunk of its prompt."""
        node = self.node[request]
        if node != found:
            self.cache.filled(node, found)
        before = self.generated.pop(request, 0) if self.generated else 0
        more = self._output[request] - before - 1
        own = total - self._prefix[request]
        if more <= 0:
            self._end(scheduler, request, own)
            return
        if before:
            self.generated[request] = before
        self._decodes[request] = (self.now, total + 1, own)
        self.decoding += 1
        self.context += total + 1
        scheduler.prefilled(self, request, total + 1, before + 1)
        end = self.now + more
        due = self._ends.get(end)
        if due is None:
            self._ends[end] = [(request, self.now)]
            heapq.heappush(self._end_steps, end)
        else:
            due.append((request, self.now))

    def _finish_due(self, scheduler: Scheduler) -> None:
        for request, since in self._ends.pop(heapq.heappop(self._end_steps)):
            decode = self._decodes.get(request)
            if decode is None or decode[0] != since:
                continue  # Retracted since.
            self._stop(request, decode)
            self.generated.pop(request, None)
            self._end(scheduler, request, decode[2] + self.now - since)

    def _stop(self, request: int, decode: tuple[int, int, int]) -> None:
        since, context, _ = decode
        del self._decodes[request]
        self.decoding -= 1
        self.context -= context + self.now - since

    def _end(self, scheduler: Scheduler, request: int, own: int) -> None:
        self.left -= 1
        self.ended += 1
        self.cache.end(self.node[request], request, own)
        scheduler.ended(self, request)

    def _secure_decodes(self, scheduler: Scheduler) -> None:
        """Room for the step's decode tokens; as in SGLang, the decode that has produced least is
        retracted when there is none."""
        cache = self.cache
        while self.decoding and cache.capacity - cache.locked - cache.evictable < self.decoding:
            if cache.make_room(self.decoding):
                return
            request, decode = max(self._decodes.items(), key=lambda item: (item[1][0], item[0]))
            if len(self._decodes) == 1 and not self._prefills:
                raise EngineStuck(
                    f"request {request} alone outgrows the {self.capacity} tokens of KV memory; "
                    "take a device with more memory"
                )
            self._retract(scheduler, request, decode)

    def _retract(self, scheduler: Scheduler, request: int, decode: tuple[int, int, int]) -> None:
        since, _, own = decode
        produced = self.generated_by(request)
        self._stop(request, decode)
        self.generated[request] = produced
        self.cache.end(self.node[request], request, own + self.now - since, keep=False)
        self.totals.retractions += 1
        scheduler.retracted(self, request)

    def _coast(self, scheduler: Scheduler) -> None:
        """Several decode-only steps at once, up to the next end."""
        self._secure_decodes(scheduler)
        cache, costs, totals = self.cache, self.costs, self.totals
        n = self.decoding
        room = (cache.capacity - cache.locked) // n
        steps = max(min(self._end_steps[0] - self.now, room, scheduler.patience(self)), 1)
        cache.make_room(n * steps)
        layers = costs.token_seconds(n)
        gemm = layers + costs.sampled_seconds(n)
        totals.floor_seconds += steps * (layers - n * self._token_seconds)
        reads = self.reads + n * np.arange(steps, dtype=np.float64)
        memory = costs.decode_seconds_each(n, reads)
        traffic = costs.traffic_seconds_each(n, n, reads)
        for k, overlap in enumerate(self._overlaps):
            each = overlap.seconds_each(gemm, memory, traffic)
            totals.seconds[k] += float(each.sum()) + steps * costs.step
        totals.compute_seconds += gemm * steps
        totals.memory_seconds += float(memory.sum())
        totals.steps += steps
        totals.decode_tokens += n * steps
        if self._trace_every and totals.steps % self._trace_every < steps:
            totals.trace.append((totals.seconds[0], gemm, float(memory[-1]), cache.locked))
        cache.grow(n * steps)
        self.context += n * steps
        self.now += steps
        if self._end_steps[0] == self.now:
            self._finish_due(scheduler)
