"""The dual scan on the modelled engine, with the planner's scanner and admission code."""

from __future__ import annotations

import heapq
import math
from collections.abc import Iterator
from dataclasses import dataclass

from blendserve.planner import Side, StepCosts, StepPace, account_tokens, partition_memory
from blendserve.planner.step_pace import FULL_PART
from blendserve.policy import Admission, Candidate, Overtaking, PacedAdmission, rest_density
from blendserve.policy.memory_forecast import BIN_STEPS
from blendserve.policy.pacing import (
    LONG_TOKENS,
    PACE_STEPS,
    UNCERTAIN_DENSITY,
    context_to_pace,
    enough_unknown,
)

from .central_plan import CentralPlan
from .engine import Engine
from .orders import CHUNK_TOKENS, MIN_SHARED_TOKENS, PATIENCE_STEPS, MemoryTest

# On GPUs the tokens of a step are kept at multiples of this (BlendServe, section 5.3).
TOKEN_MULTIPLE = 128


@dataclass(frozen=True)
class BlendOptions:
    """What ours adds to the paper's algorithm; each can be switched off.

    online: the sample runs as part of the job, and answers refine the plan all along (else the
    lengths of the sample are known beforehand and planned with once). paced: every step gets the
    prefill that its decodes balance, and the memory side goes first (else each side has its
    partition and a fixed rate, as in the paper). distribution: the memory test counts with several
    possible lengths of a request (else with its mean). foresight: prefixes are evicted by when the
    plan needs them next (else the least recently used). shared_memory: where decodes read shared
    prefixes once for all, the plan counts them so (else each request's whole context).
    """

    online: bool = True
    paced: bool = True
    distribution: bool = True
    foresight: bool = True
    shared_memory: bool = True


PAPER = BlendOptions(online=False, paced=False, distribution=True, foresight=False)


@dataclass
class _Retracted:
    """Requests of one side that lost their memory; the one with the most tokens goes first."""

    heap: list[tuple[int, int]]

    def __contains__(self, request: int) -> bool:
        return any(request == other for _, other in self.heap)

    def __iter__(self) -> Iterator[int]:
        return (request for _, request in sorted(self.heap))

    def remove(self, request: int) -> None:
        self.heap = [item for item in self.heap if item[1] != request]
        heapq.heapify(self.heap)


@dataclass
class _Pool:
    """The memory as the heads of one moment find it, with the test that all policies share."""

    engine: Engine
    test: MemoryTest
    left_tokens: float
    right_tokens: float
    idle: bool
    others_tokens: float = 0.0

    @property
    def total_tokens(self) -> int:
        return self.engine.capacity

    def fits(self, candidate: Candidate, reserve_tokens: float = 0.0) -> bool:
        request = candidate.request
        assert isinstance(request, int)
        return self.test.fits(self.engine, request, candidate.private_tokens, reserve_tokens)


@dataclass(frozen=True)
class _Waiting:
    """What waits for one replica, as it is at this moment."""

    scheduler: BlendScheduler
    engine: Engine

    def look(self, side: Side) -> Iterator[Candidate]:
        return self.scheduler.look(self.engine, side)


class BlendScheduler:
    """One replica's scheduler: asks the central plan for the heads of both sides, the admission
    code which of them may start."""

    def __init__(
        self,
        central: CentralPlan,
        costs: StepCosts,
        options: BlendOptions,
        replica: int = 0,
        chunk_tokens: int = CHUNK_TOKENS,
    ) -> None:
        self._central = central
        self._options = options
        self._replica = replica
        self._chunk = chunk_tokens
        self._memory = MemoryTest(central.book)
        self._admission, self._paced = Admission(), PacedAdmission()
        self._overtaking = Overtaking()
        self._pace = StepPace.of(costs, chunk_tokens)
        self._retracted = {side: _Retracted([]) for side in Side}
        # Side and booked tokens of running requests; sums per side; when the left ones outlive
        # their estimates.
        self._running: dict[int, tuple[Side, float]] = {}
        self._account = dict.fromkeys(Side, 0.0)
        self._outlived: list[tuple[int, int]] = []
        # Of what is left: its density, and the one to pace the next steps at; how many requests of
        # unknown length run here, and the longest of them.
        self._target = self._pace_density = 0.0
        self._unknown = self._longest = 0
        self._look_due = 0
        self._rest_steps = 0.0  # That what waits would take in a full pool.
        self._loaded = False  # With its part of all memory work that is left.

    # -- the engine's questions -----------------------------------------------------------------

    def prefill_budget(self, engine: Engine) -> int:
        if self._central.sample:
            return engine.prefill_room(self._chunk)
        if engine.totals.steps >= self._look_due:
            self._look_due = engine.totals.steps + PACE_STEPS
            self._look_ahead(engine)
        if not engine.mixed:
            return self._chunk
        if not self._options.paced:
            return self._paper_budget(engine)
        # Of a context, the part that is read: what others read as well counts once.
        read = engine.reads / engine.context if engine.context else 1.0
        waits = self._central.waiting > 0 and self._unknown == 0
        context = context_to_pace(engine.reads, read * engine.capacity, waits)
        return self._pace.prefill_tokens(self._pace_density, context, engine.decoding)

    def patience(self, engine: Engine) -> int:
        waits = self._central.waiting or any(queue.heap for queue in self._retracted.values())
        return PATIENCE_STEPS if waits else 1 << 30

    def pick(self, engine: Engine) -> int | None:
        while self._outlived and self._outlived[0][0] <= engine.now:
            self._outlive(heapq.heappop(self._outlived)[1])
        central = self._central
        if not (central.informed or central.sample or engine.idle):
            return None  # The sample's first answers are a few steps away.
        kv = _Pool(
            engine,
            self._memory,
            self._account[Side.LEFT],
            self._account[Side.RIGHT],
            # The accounts are sums that came and went; they need not end at nothing.
            idle=not self._running,
        )
        hold = self._options.paced and self._hold_right(engine)

        def by_policy(left: Candidate | None, right: Candidate | None) -> Side | None:
            if self._options.paced:
                return self._paced.choose(left, right, kv, self._target, hold)
            return self._admission.choose(left, right, kv, self._target)

        chosen = self._overtaking.choose(
            _Waiting(self, engine), kv, engine.now, by_policy, lambda: hold, self._rest_steps
        )
        if chosen is None:
            return None
        request, side = chosen.request, chosen.side
        assert isinstance(request, int)
        if request in self._retracted[side]:
            self._retracted[side].remove(request)
        else:
            self._central.take(request, side, self._replica)
        self._overtaking.start(chosen, engine.now)
        self._book(engine, request, chosen)
        return request

    def started(self, engine: Engine, request: int, own_tokens: int) -> None:
        self._memory.started(engine, request, own_tokens)

    def ended(self, engine: Engine, request: int) -> None:
        self._memory.ended(engine, request)
        self._unbook(request)
        self._central.finished(request)

    def retracted(self, engine: Engine, request: int) -> None:
        self._memory.ended(engine, request)
        self._unbook(request)
        compute, memory, _ = self._rest_of(engine, request)
        side = Side.LEFT if compute > self._target * memory else Side.RIGHT
        heapq.heappush(self._retracted[side].heap, (-engine.generated[request], request))

    def learnt(self, engine: Engine) -> None:
        """The job has been planned again."""
        self._memory.learnt(engine)
        self._look_due = engine.totals.steps

    def running(self, engine: Engine) -> dict[int, int]:
        """Output tokens so far of everything that has started here and not ended."""
        waiting = [r for queue in self._retracted.values() for _, r in queue.heap]
        return {r: engine.generated_by(r) for r in (*self._running, *waiting)}

    # -- heads ----------------------------------------------------------------------------------

    def look(self, engine: Engine, side: Side) -> Iterator[Candidate]:
        """The requests of a side in the order in which they are to start."""
        for request in self._retracted[side]:
            yield self._candidate(engine, side, request, again=True)
        if side is Side.RIGHT and self._loaded and not engine.idle:
            return  # Others take them.
        for request in self._central.upcoming(side, self._replica):
            yield self._candidate(engine, side, request, again=False)

    def _candidate(self, engine: Engine, side: Side, request: int, again: bool) -> Candidate:
        prefill, _, private, filling = engine.demand(request)
        total = engine.prompt[request]
        if not again:
            density = self._central.density(request)
            output = self._central.book.mean(request)
        else:
            # What has begun goes on first: it is as urgent as its side's most extreme request.
            total += engine.generated[request]
            _, _, output = self._rest_of(engine, request)
            density = math.inf if side is Side.LEFT else 0.0
        return Candidate(
            side=side,
            prompt_tokens=total,
            uncached_tokens=prefill,
            estimated_output_tokens=output,
            density=density,
            blocked=filling >= MIN_SHARED_TOKENS,
            locked_prefix_tokens=total - private,
            likely_output_tokens=self._central.book.rest(
                request, engine.generated_by(request) if again else 0
            ),
            request=request,
        )

    def _rest_of(self, engine: Engine, request: int) -> tuple[float, float, float]:
        """(compute seconds, memory seconds, tokens) that a started request is expected to need."""
        done = engine.generated_by(request)
        lengths = self._central.book.rest(request, done)
        rest = sum(lengths) / len(lengths)
        context = engine.prompt[request] + done
        return (
            rest * self._pace.token_seconds,
            max(sum((context + more / 2) * more for more in lengths) / len(lengths), 1.0)
            * self._pace.context_seconds,
            rest,
        )

    def _hold_right(self, engine: Engine) -> bool:
        return self._loaded or (
            self._unknown > 0 and enough_unknown(self._unknown, self._longest, engine.capacity)
        )

    def _look_ahead(self, engine: Engine) -> None:
        """The density to pace the next steps at, and whether it rests on guesses."""
        costs, central = self._pace, self._central
        # Of a context, the part that is read: what others read as well counts once.
        read = engine.reads / engine.context if engine.context else 1.0
        compute, memory = engine.prefill_backlog * costs.token_seconds, 0.0
        self._longest = self._unknown = 0
        waiting_memory = 0.0
        for request, done in self.running(engine).items():
            more_compute, more_memory, _ = self._rest_of(engine, request)
            more_memory *= read
            compute += more_compute
            memory += more_memory
            if request not in self._running:
                waiting_memory += more_memory  # Retracted: not in the forecast.
            if central.unknown(request):
                self._unknown += 1
                self._longest = max(self._longest, done)
        waiting = central.rest(self._replica, compute, memory)
        self._loaded = central.waiting > 0 and central.right_part(self._replica) <= 0
        if self._loaded:
            central.give_back(self._replica)
        compute += waiting[0]
        memory += waiting[1]
        waiting_memory += waiting[1]
        self._rest_steps = waiting_memory / (engine.capacity * costs.context_seconds)
        self._target = self._pace_density = compute / memory if memory > 0 else math.inf
        if self._options.paced:
            tokens, alive = self._memory.forecast.profile(engine.now)
            self._pace_density = rest_density(
                compute,
                waiting_memory,
                tokens * read * costs.context_seconds,
                alive * BIN_STEPS,
                costs.floor_seconds,
                FULL_PART * engine.capacity * costs.context_seconds,
            )
            if self._longest > LONG_TOKENS:
                self._pace_density = min(self._pace_density, UNCERTAIN_DENSITY)

    def _paper_budget(self, engine: Engine) -> int:
        """C_L + C_R, the prefill tokens that keep N_L + N_R requests in flight (section 5.3)."""
        tokens = 0.0
        densities = []
        heads = [self._central.head(side, self._replica) for side in Side]
        for head in heads:
            densities.append(None if head is None else self._central.density(head))
        shares = partition_memory(engine.capacity, self._target, *densities)
        for head, share in zip(heads, shares, strict=True):
            if head is not None:
                output = max(self._central.book.mean(head), 1.0)
                prompt = engine.prompt[head]
                tokens += share / (prompt + output / 2) * prompt / output
        batch = -(-int(min(tokens, self._chunk) + engine.decoding) // TOKEN_MULTIPLE)
        return max(min(batch * TOKEN_MULTIPLE, self._chunk) - engine.decoding, 1)

    # -- memory accounts of the two sides ---------------------------------------------------------

    def _book(self, engine: Engine, request: int, candidate: Candidate) -> None:
        output = candidate.estimated_output_tokens
        booked = account_tokens(candidate.private_tokens, output)
        self._running[request] = (candidate.side, booked)
        self._account[candidate.side] += booked
        self._unknown += self._central.unknown(request)
        if candidate.side is Side.LEFT:
            heapq.heappush(self._outlived, (int(engine.now + output) + 1, request))

    def _unbook(self, request: int) -> Side:
        self._overtaking.end(request)
        side, booked = self._running.pop(request)
        self._unknown = max(self._unknown - self._central.unknown(request), 0)
        self._account[side] -= booked
        return side

    def _outlive(self, request: int) -> None:
        """A request of the left that outlives its estimate is a long decode after all."""
        side, booked = self._running.get(request, (Side.RIGHT, 0.0))
        if side is Side.LEFT:
            self._account[Side.LEFT] -= booked
            self._account[Side.RIGHT] += booked
            self._running[request] = (Side.RIGHT, booked)
