"""The dual scan on the modelled engine: `BlendPolicy` driven by the engine's events."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from blendserve.planner import Side, StepCosts, StepPace, partition_memory
from blendserve.policy import BlendPolicy, Candidate, Steps
from blendserve.policy.kv_account import MIN_SHARED_TOKENS, candidate_of
from blendserve.policy.pacing import PACE_STEPS

from .central_plan import CentralPlan
from .engine import Engine
from .orders import CHUNK_TOKENS, PATIENCE_STEPS

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


@dataclass(frozen=True)
class _Waiting:
    """What waits for one replica, as it is at this moment."""

    scheduler: BlendScheduler
    engine: Engine

    def look(self, side: Side) -> Iterator[Candidate]:
        return self.scheduler.look(self.engine, side)


class BlendScheduler:
    """One replica's scheduler: tells the policy what its engine does, and does what it says.

    paced: whether steps get the prefill that the policy says; else that of the paper's formula.
    """

    def __init__(
        self,
        central: CentralPlan,
        costs: StepCosts,
        engine: Engine,
        paced: bool = True,
        replica: int = 0,
        chunk_tokens: int = CHUNK_TOKENS,
    ) -> None:
        self._central = central
        self._replica = replica
        self._chunk = chunk_tokens
        steps = Steps.SEPARATE if not engine.mixed else Steps.MIXED if paced else Steps.FILLED
        self._pace = StepPace.of(costs, chunk_tokens)
        self.policy = BlendPolicy(engine.capacity, self._pace, steps)
        # The latest first; sides of what runs; of each shared prefix, who started on it last.
        self._retracted: dict[Side, list[int]] = {side: [] for side in Side}
        self._side: dict[int, Side] = {}
        self._latest: dict[int, int] = {}
        self._seen = 0  # Decode steps that the policy has been told of.
        self._look_due = 0
        self._budget = self._backlog = 0
        self._began = self._asked_in_vain = False
        self._loaded = False  # With its part of all memory work that is left.

    # -- the engine's questions -----------------------------------------------------------------

    def prefill_budget(self, engine: Engine) -> int:
        self._catch_up(engine)
        self._tell_rest(engine)
        if self._began:
            heads = (next(self.look(engine, side), None) for side in Side)
            blocked = any(head is not None and head.blocked for head in heads)
            self.policy.prefill_began(goes_on=blocked or not self._asked_in_vain)
            self._began = False
        self._asked_in_vain = False
        self._backlog = engine.prefill_backlog
        self._budget = self._chunk
        if self.policy.paced:
            # Of a context, the part that is read: what others read as well counts once.
            read = engine.reads / engine.context if engine.context else 1.0
            self._budget = self.policy.prefill_tokens(self._backlog, engine.decoding, read)
        elif engine.mixed:
            self._budget = self._paper_budget(engine)
        return self._budget

    def patience(self, engine: Engine) -> int:
        waits = self._central.waiting or any(self._retracted.values())
        return PATIENCE_STEPS if waits else 1 << 30

    def pick(self, engine: Engine) -> int | None:
        self._asked_in_vain = True
        policy = self.policy
        if not engine.prefill_backlog and policy.waits(engine.decoding):
            return None
        account = policy.account
        account.free_tokens = float(engine.capacity - engine.cache.locked)
        chosen = policy.choose(_Waiting(self, engine))
        if chosen is None:
            return None
        request, side = chosen.request, chosen.side
        assert isinstance(request, int)
        if request in self._retracted[side]:
            self._retracted[side].remove(request)
        else:
            self._central.take(request, side, self._replica)
        policy.start(chosen, engine.generated_by(request))
        holder = self._holder(engine, request)
        if holder is not None:
            account.share(*holder)
        for entry in engine.cache.path(engine.node[request]):
            self._latest[entry] = request
        self._side[request] = side
        self._backlog += chosen.uncached_tokens
        self._asked_in_vain, self._began = False, True
        self._tell_rest(engine)
        return request

    def started(self, engine: Engine, request: int, own_tokens: int) -> None:
        """The policy knows."""

    def prefilled(self, engine: Engine, request: int, context_tokens: int, done: int) -> None:
        self._catch_up(engine)
        self.policy.prefilled(request, context_tokens, done)

    def ended(self, engine: Engine, request: int) -> None:
        self._leave(engine, request)
        self._central.finished(request)

    def retracted(self, engine: Engine, request: int) -> None:
        side = self._leave(engine, request)
        self.policy.retracted()
        self._retracted[side].insert(0, request)

    def learnt(self, engine: Engine) -> None:
        """The job has been planned again."""
        for request in self._side:
            mean, likely = self._central.expected(request)
            guessed = self._central.guessed(request)
            self.policy.learn(request, engine.generated_by(request), mean, likely, guessed)

    def running(self, engine: Engine) -> dict[int, int]:
        """Output tokens so far of everything that has started here and not ended."""
        waiting = [request for queue in self._retracted.values() for request in queue]
        return {r: engine.generated_by(r) for r in (*self._side, *waiting)}

    # -- heads ----------------------------------------------------------------------------------

    def look(self, engine: Engine, side: Side) -> Iterator[Candidate]:
        """The requests of a side in the order in which they are to start."""
        for request in self._retracted[side]:
            yield self._candidate(engine, side, request)
        if side is Side.RIGHT and self._loaded and not engine.idle:
            return  # Others take them.
        for request in self._central.upcoming(side, self._replica):
            yield self._candidate(engine, side, request)

    def _candidate(self, engine: Engine, side: Side, request: int) -> Candidate:
        prefill, _, private, filling = engine.demand(request)
        done = engine.generated_by(request)
        prompt = engine.prompt[request]
        mean, likely = self._central.expected(request)
        found = candidate_of(
            request,
            side,
            self._central.density(request),
            prompt,
            done,
            mean,
            likely,
            self._central.limit(request),
            guessed=self._central.guessed(request),
            cached_tokens=prompt + done - prefill,
            locked_tokens=prompt + done - private,
            blocked=filling >= MIN_SHARED_TOKENS,
        )
        holder = self._holder(engine, request)
        if holder is not None:
            found.newly_shared_tokens = self.policy.account.held_alone(*holder)
        if engine.mixed:
            found.prefill_steps = -(-(prefill + self._backlog) // max(self._budget, 1))
        return found

    def _holder(self, engine: Engine, request: int) -> tuple[int, int] | None:
        """Who runs and holds the same prefix, and its prompt's tokens beyond that."""
        entry, held = engine.cache.held(engine.node[request])
        holder = self._latest.get(entry)
        if not held or holder is None or holder not in self._side:
            return None
        return holder, engine.prompt[holder] - held

    # -- what the policy is told ------------------------------------------------------------------

    def _catch_up(self, engine: Engine) -> None:
        seconds = 0.0
        if not engine.mixed:
            seconds = sum(self._pace.seconds(engine.decoding, engine.context))
        while self._seen < engine.now:
            self._seen += 1
            self.policy.decoded(engine.decoding, seconds)

    def _tell_rest(self, engine: Engine) -> None:
        """What has not started, for this replica to do."""
        if engine.totals.steps >= self._look_due:
            self._look_due = engine.totals.steps + PACE_STEPS
            read = engine.reads / engine.context if engine.context else 1.0
            self._central.runs(
                self._replica, *self.policy.running_seconds(engine.prefill_backlog, read)
            )
            self._loaded = (
                self._central.waiting > 0 and self._central.right_part(self._replica) <= 0
            )
            if self._loaded:
                self._central.give_back(self._replica)
        compute, memory = self._central.rest(self._replica)
        for queue in self._retracted.values():
            for request in queue:
                compute += self._central.compute_seconds(request)
                memory += self._central.memory_seconds(request)
        self.policy.rest_seconds = (compute, memory)

    def _leave(self, engine: Engine, request: int) -> Side:
        self._catch_up(engine)
        self.policy.end(request)
        self.policy.memory_freed()
        return self._side.pop(request)

    def _paper_budget(self, engine: Engine) -> int:
        """C_L + C_R, the prefill tokens that keep N_L + N_R requests in flight (section 5.3)."""
        tokens = 0.0
        densities = []
        heads = [self._central.head(side, self._replica) for side in Side]
        for head in heads:
            densities.append(None if head is None else self._central.density(head))
        shares = partition_memory(engine.capacity, self.policy.target_density, *densities)
        for head, share in zip(heads, shares, strict=True):
            if head is not None:
                output = max(self._central.expected(head)[0], 1.0)
                prompt = engine.prompt[head]
                tokens += share / (prompt + output / 2) * prompt / output
        batch = -(-int(min(tokens, self._chunk) + engine.decoding) // TOKEN_MULTIPLE)
        return max(min(batch * TOKEN_MULTIPLE, self._chunk) - engine.decoding, 1)
