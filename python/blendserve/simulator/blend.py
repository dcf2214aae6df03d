"""The dual scan on the modelled engine, with the planner's scanner and admission code."""

from __future__ import annotations

import heapq
import math
from dataclasses import dataclass

from blendserve.planner import (
    Admission,
    Candidate,
    KVState,
    PacedAdmission,
    Side,
    StepPace,
    account_tokens,
    partition_memory,
    rest_density,
)
from blendserve.planner.memory_forecast import BIN_STEPS
from blendserve.planner.pacing import UNCERTAIN_DENSITY, enough_unknown

from .central_plan import CentralPlan
from .engine import Engine
from .orders import CHUNK_TOKENS, MIN_SHARED_TOKENS, PATIENCE_STEPS, MemoryTest
from .step_time import StepCosts

# Steps after which the density of what is left is looked at again.
PACE_STEPS = 64
# Part of the memory that decodes are taken to fill while there are more to come.
FULL_PART = 0.75
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
    plan needs them next (else the least recently used).
    """

    online: bool = True
    paced: bool = True
    distribution: bool = True
    foresight: bool = True


PAPER = BlendOptions(online=False, paced=False, distribution=True, foresight=False)


@dataclass
class _Retracted:
    """Requests of one side that lost their memory; the one with the most tokens goes first."""

    heap: list[tuple[int, int]]

    def head(self) -> int | None:
        return self.heap[0][1] if self.heap else None


class _Pool:
    """`KVState.demand` for the heads of one moment: the memory test that all policies share."""

    def __init__(self, engine: Engine, test: MemoryTest, heads: dict[Side, int]) -> None:
        self._engine, self._test, self._heads = engine, test, heads

    def fits(self, candidate: Candidate, free_tokens: float) -> bool:
        cache = self._engine.cache
        reserve = cache.capacity - cache.locked - free_tokens
        request = self._heads[candidate.side]
        return self._test.fits(self._engine, request, candidate.private_tokens, reserve)


class BlendScheduler:
    """One replica's scheduler: asks the central plan for the heads of both sides, the admission
    code which of them may start."""

    def __init__(
        self, central: CentralPlan, costs: StepCosts, options: BlendOptions, replica: int = 0
    ) -> None:
        self._central = central
        self._costs = costs
        self._options = options
        self._replica = replica
        self._memory = MemoryTest(central.book)
        self._admission, self._paced = Admission(), PacedAdmission()
        self._pace = StepPace(
            costs.token_seconds, costs.context_seconds, costs.weight_seconds, CHUNK_TOKENS
        )
        self._retracted = {side: _Retracted([]) for side in Side}
        # Side and booked tokens of running requests; sums per side; when the left ones outlive
        # their estimates.
        self._running: dict[int, tuple[Side, float]] = {}
        self._account = dict.fromkeys(Side, 0.0)
        self._outlived: list[tuple[int, int]] = []
        self._density = 0.0
        self._uncertain = False
        self._longest = 0
        self._count = dict.fromkeys(Side, 0)
        self._density_due = 0

    # -- the engine's questions -----------------------------------------------------------------

    def prefill_budget(self, engine: Engine) -> int:
        if self._central.sample:
            return max(CHUNK_TOKENS - engine.decoding, 1)
        if engine.now >= self._density_due:
            self._density_due = engine.now + PACE_STEPS
            self._look_ahead(engine)
        if not self._options.paced:
            return self._paper_budget(engine)
        return self._pace.prefill_tokens(self._density, engine.context, engine.decoding)

    def patience(self, engine: Engine) -> int:
        waits = self._central.waiting or any(queue.heap for queue in self._retracted.values())
        return PATIENCE_STEPS if waits else 1 << 30

    def pick(self, engine: Engine) -> int | None:
        while self._outlived and self._outlived[0][0] <= engine.now:
            self._outlive(heapq.heappop(self._outlived)[1])
        heads: dict[Side, int] = {}
        left = self._candidate(engine, Side.LEFT, heads)
        right = self._candidate(engine, Side.RIGHT, heads)
        if not heads:
            return None
        kv = KVState(
            total_tokens=engine.capacity,
            free_tokens=engine.capacity - engine.cache.locked,
            left_tokens=self._account[Side.LEFT],
            right_tokens=self._account[Side.RIGHT],
            demand=_Pool(engine, self._memory, heads),
        )
        if self._options.paced:
            side = self._paced.choose(left, right, kv, self._density, self._hold_right(engine))
        else:
            side = self._admission.choose(left, right, kv, self._density)
        if side is None:
            return None
        chosen = left if side is Side.LEFT else right
        assert chosen is not None
        request = heads[side]
        if self._retracted[side].head() == request:
            heapq.heappop(self._retracted[side].heap)
        else:
            self._central.take(request, side, self._replica)
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
        side = self._unbook(request)
        heapq.heappush(self._retracted[side].heap, (-engine.generated[request], request))

    def running(self, engine: Engine) -> dict[int, int]:
        """Output tokens so far of everything that has started here and not ended."""
        waiting = [r for queue in self._retracted.values() for _, r in queue.heap]
        return {r: engine.generated_by(r) for r in (*self._running, *waiting)}

    # -- heads ----------------------------------------------------------------------------------

    def _candidate(self, engine: Engine, side: Side, heads: dict[Side, int]) -> Candidate | None:
        again = self._retracted[side].head()
        request = self._central.head(side, self._replica) if again is None else again
        if request is None:
            return None
        heads[side] = request
        prefill, _, private, filling = engine.demand(request)
        total = engine.prompt[request]
        if again is None:
            density = self._central.density(request)
            output = self._central.book.mean(request)
        else:
            total += engine.generated[request]
            compute, memory, output = self._rest_of(engine, request)
            density = (compute + prefill * self._costs.token_seconds) / memory
        return Candidate(
            side=side,
            prompt_tokens=total,
            uncached_tokens=prefill,
            estimated_output_tokens=output,
            density=density,
            blocked=filling >= MIN_SHARED_TOKENS,
            locked_prefix_tokens=total - private,
        )

    def _rest_of(self, engine: Engine, request: int) -> tuple[float, float, float]:
        """(compute seconds, memory seconds, tokens) that a started request is expected to need."""
        done = engine.generated_by(request)
        lengths = self._central.book.rest(request, done)
        rest = sum(lengths) / len(lengths)
        context = engine.prompt[request] + done
        return (
            rest * self._costs.token_seconds,
            max((context + rest / 2) * rest, 1.0) * self._costs.context_seconds,
            rest,
        )

    def _hold_right(self, engine: Engine) -> bool:
        if not self._central.informed:
            return True
        return self._uncertain and enough_unknown(
            self._count[Side.RIGHT], self._longest, engine.capacity
        )

    def _look_ahead(self, engine: Engine) -> None:
        """The density to pace the next steps at, and whether it rests on guesses."""
        costs, central = self._costs, self._central
        compute, memory = central.rest()
        compute += engine.prefill_backlog * costs.token_seconds
        longest, running_memory = 0, 0.0
        for request, done in self.running(engine).items():
            more_compute, more_memory, _ = self._rest_of(engine, request)
            compute += more_compute
            if request in self._running:
                running_memory += more_memory
            else:
                memory += more_memory  # Retracted: not in the forecast.
            if done > longest and central.unlike_any(request, done):
                longest = done
        self._longest = longest
        self._uncertain = longest > 0
        if self._options.paced:
            tokens, alive = self._memory.forecast.profile(engine.now)
            full = FULL_PART * engine.capacity * costs.context_seconds
            self._density = rest_density(
                compute,
                memory,
                tokens * costs.context_seconds,
                alive * BIN_STEPS,
                costs.weight_seconds,
                full,
            )
            if self._uncertain:
                self._density = min(self._density, UNCERTAIN_DENSITY)
        else:
            memory += running_memory
            self._density = compute / memory if memory > 0 else math.inf

    def _paper_budget(self, engine: Engine) -> int:
        """C_L + C_R, the prefill tokens that keep N_L + N_R requests in flight (section 5.3)."""
        tokens = 0.0
        densities = []
        heads = [self._central.head(side, self._replica) for side in Side]
        for head in heads:
            densities.append(None if head is None else self._central.density(head))
        shares = partition_memory(engine.capacity, self._density, *densities)
        for head, share in zip(heads, shares, strict=True):
            if head is not None:
                output = max(self._central.book.mean(head), 1.0)
                prompt = engine.prompt[head]
                tokens += share / (prompt + output / 2) * prompt / output
        batch = -(-int(min(tokens, CHUNK_TOKENS) + engine.decoding) // TOKEN_MULTIPLE)
        return max(min(batch * TOKEN_MULTIPLE, CHUNK_TOKENS) - engine.decoding, 1)

    # -- memory accounts of the two sides ---------------------------------------------------------

    def _book(self, engine: Engine, request: int, candidate: Candidate) -> None:
        output = candidate.estimated_output_tokens
        booked = account_tokens(candidate.private_tokens, output)
        self._running[request] = (candidate.side, booked)
        self._account[candidate.side] += booked
        self._count[candidate.side] += 1
        if candidate.side is Side.LEFT:
            heapq.heappush(self._outlived, (int(engine.now + output) + 1, request))

    def _unbook(self, request: int) -> Side:
        side, booked = self._running.pop(request)
        self._account[side] -= booked
        self._count[side] -= 1
        return side

    def _outlive(self, request: int) -> None:
        """A request of the left that outlives its estimate is a long decode after all."""
        side, booked = self._running.get(request, (Side.RIGHT, 0.0))
        if side is Side.LEFT:
            self._account[Side.LEFT] -= booked
            self._account[Side.RIGHT] += booked
            self._count[Side.LEFT] -= 1
            self._count[Side.RIGHT] += 1
            self._running[request] = (Side.RIGHT, booked)
