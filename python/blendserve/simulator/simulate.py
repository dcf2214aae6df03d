"""One workload, one policy, one engine: how long it takes, and how near that is to the optimum."""

from __future__ import annotations

import heapq
from dataclasses import dataclass, field, replace
from enum import StrEnum
from functools import cached_property

import numpy as np
from numpy.typing import NDArray

from blendserve.planner import (
    CostModel,
    Job,
    PlannerConfig,
    PrefixTree,
    estimate,
    kv_capacity_tokens,
    make_plan,
)

from .blend import PAPER, BlendOptions, BlendScheduler
from .bounds import Bound, lower_bound
from .central_plan import CentralPlan
from .engine import Engine, EngineStuck, Scheduler, Totals
from .foresight import Foresight
from .kv_cache import KVCache
from .lengths import OUTCOMES, LengthBook
from .orders import OrderScheduler
from .step_time import Overlap, OverlapModel, StepCosts
from .workloads import Workload

Ints = NDArray[np.int64]


class Policy(StrEnum):
    """fcfs: lines as they stand in the file. random: shuffled (NanoFlow-Balance). dfs: depth first
    through the prefix tree (NanoFlow-DFS; with `sequential`, vLLM-DFS and SGLang-DFS). longest:
    largest expected output first. batchllm: groups that share a prefix, those with the most
    decoding per prefill first. disaggregated: prefill and decode on devices of their own.
    blend-paper: BlendServe without additions of ours. blend: ours."""

    FCFS = "fcfs"
    RANDOM = "random"
    DFS = "dfs"
    LONGEST = "longest"
    BATCHLLM = "batchllm"
    DISAGGREGATED = "disaggregated"
    BLEND_PAPER = "blend-paper"
    BLEND = "blend"


# Prefill and decode devices that `disaggregated` tries, the best counts.
SPLITS = tuple((x, y) for x in range(1, 5) for y in range(1, 5))


@dataclass(frozen=True)
class Setting:
    """What to simulate beside the workload. sampling: part of the requests whose lengths are
    sampled; 1 means that all lengths are known. replicas: data-parallel, blend only. capacity:
    KV tokens of a replica, by default what the device has. curve: a measured interference curve,
    (R, P(R)) pairs. trace_every: keep every so many steps of the first replica's trace."""

    cost_model: CostModel
    policy: Policy = Policy.BLEND
    overlap: Overlap = Overlap.INTERFERENCE
    sampling: float = 0.01
    replicas: int = 1
    capacity: int | None = None
    options: BlendOptions = field(default_factory=BlendOptions)
    curve: tuple[tuple[float, float], ...] | None = None
    seed: int = 0
    trace_every: int = 0

    def __post_init__(self) -> None:
        if not 0.0 < self.sampling <= 1.0:
            raise ValueError(f"sampling must be above 0 and at most 1, not {self.sampling}")
        if self.replicas < 1:
            raise ValueError(f"there must be at least one replica, not {self.replicas}")
        if self.replicas > 1 and self.policy is not Policy.BLEND:
            raise ValueError("several replicas are simulated for the policy blend only")


@dataclass(frozen=True)
class Result:
    """tokens: prompt and output. seconds: of the slowest replica; for `disaggregated`, what one
    device of its mixture has to do. throughput: tokens per second of all replicas. sharing: part
    of the prompt tokens found in the cache; sharing_best: with an endless one."""

    policy: str
    overlap: str
    requests: int
    tokens: int
    seconds: float
    throughput: float
    bound_seconds: float
    share_of_bound: float
    sharing: float
    sharing_best: float
    retractions: int
    steps: int
    recomputed_tokens: int
    compute_seconds: float
    memory_seconds: float
    floor_seconds: float
    detail: str = ""
    trace: list[tuple[float, float, float, int]] = field(default_factory=list, repr=False)


class Simulation:
    """A workload prepared once, to be run under several settings."""

    def __init__(self, workload: Workload) -> None:
        self.workload = workload
        self.output: Ints = workload.output_tokens
        self.job: Job = workload.job()
        self.tree: PrefixTree = self.job.build_tree()
        self._books: dict[tuple[float, int], LengthBook] = {}

    @cached_property
    def prompt_tokens(self) -> int:
        return self.tree.prompt_tokens

    def bound(self, setting: Setting) -> Bound:
        costs, overlap = _engine_terms(setting)
        return lower_bound(self.tree, self.output, costs, overlap, setting.replicas)

    def run(self, setting: Setting) -> Result:
        """Raises EngineStuck when a request does not fit the KV memory."""
        if setting.policy is Policy.DISAGGREGATED:
            totals, seconds, detail = self._disaggregated(setting)
        else:
            totals, detail = self._run(setting), ""
            seconds = max(part.seconds for part in totals)
        bound = self.bound(setting)
        tokens = self.prompt_tokens + int(self.output.sum())
        return Result(
            policy=setting.policy.value,
            overlap=setting.overlap.value,
            requests=len(self.workload),
            tokens=tokens,
            seconds=seconds,
            throughput=tokens / seconds,
            bound_seconds=bound.seconds,
            share_of_bound=bound.seconds / seconds,
            sharing=sum(part.cached_tokens for part in totals) / max(self.prompt_tokens, 1),
            sharing_best=self.tree.sharing_ratio,
            retractions=sum(part.retractions for part in totals),
            steps=max(part.steps for part in totals),
            recomputed_tokens=sum(part.recomputed_tokens for part in totals),
            compute_seconds=sum(part.compute_seconds for part in totals),
            memory_seconds=sum(part.memory_seconds for part in totals),
            floor_seconds=sum(part.floor_seconds for part in totals),
            detail=detail,
            trace=totals[0].trace,
        )

    # -- policies ---------------------------------------------------------------------------------

    def _run(self, setting: Setting) -> list[Totals]:
        if setting.policy in (Policy.BLEND, Policy.BLEND_PAPER):
            return self._blend(setting)
        book = self._sampled_book(setting)
        engine = self._engine(setting, KVCache(self.tree, _capacity(setting)), len(self.output))
        return [engine.run(OrderScheduler(self.order(setting, book).tolist(), book))]

    def order(self, setting: Setting, book: LengthBook) -> Ints:
        """Request indices in the order of a policy with one queue."""
        tree, policy = self.tree, setting.policy
        if policy is Policy.FCFS:
            return np.arange(tree.num_leaves)
        if policy is Policy.RANDOM:
            shuffled = np.random.default_rng(setting.seed).permutation(tree.num_leaves)
            return tree.requests[shuffled]
        if policy is Policy.DFS:
            return tree.requests
        output = book.means()[tree.requests]
        if policy is Policy.LONGEST:
            return tree.requests[np.argsort(-output, kind="stable")]
        # Of the requests that hang from one node, the decoding and the prefill beyond the prefix.
        own = tree.length - tree.depth[tree.leaf_parent]
        nodes = tree.num_nodes
        decode = np.bincount(tree.leaf_parent, weights=output, minlength=nodes)
        prefill = np.bincount(tree.leaf_parent, weights=own, minlength=nodes)
        ratio = decode / np.maximum(prefill, 1.0)
        ranked = np.lexsort((np.arange(len(own)), tree.leaf_parent, -ratio[tree.leaf_parent]))
        return tree.requests[ranked]

    def _blend(self, setting: Setting) -> list[Totals]:
        setting = (
            replace(setting, options=PAPER) if setting.policy is Policy.BLEND_PAPER else setting
        )
        options, known = setting.options, setting.sampling == 1.0
        outcomes = OUTCOMES if options.distribution else 1
        lengths = None
        if known or options.online:
            book = self._book(known, outcomes)
            job = self.workload.job(lengths_known=known)
        else:
            book = self._sampled_book(setting, outcomes)
            job, lengths = self.job, book.observed(self._sample(setting))
            if setting.policy is Policy.BLEND_PAPER:
                limits = self.workload.max_output_tokens
                none = np.zeros(len(limits), dtype=bool)
                guessed = np.rint(estimate(self.tree, lengths, limits, none)).astype(np.int64)
                job, lengths = Job(self.job.token_ids, limits, guessed), None
        foresight = Foresight(self.tree) if options.foresight else None
        central = CentralPlan(
            job,
            self.tree,
            setting.cost_model,
            PlannerConfig(
                sample_fraction=setting.sampling if not known else 0.0, seed=setting.seed
            ),
            book,
            setting.replicas,
            options.online and not known,
            lengths,
            foresight,
        )
        costs = StepCosts.of(setting.cost_model)
        engines, schedulers = [], []
        for replica in range(setting.replicas):
            cache = KVCache(self.tree, _capacity(setting), foresight)
            engines.append(self._engine(setting, cache, len(self.output)))
            schedulers.append(BlendScheduler(central, costs, options, replica))
        run_together(engines, schedulers, central, len(self.output))
        return [engine.totals for engine in engines]

    def _disaggregated(self, setting: Setting) -> tuple[list[Totals], float, str]:
        """Prefill devices run all prompts, decode devices get their KV for nothing and all in
        time: the time is that of the slower kind, and more than a real system could reach."""
        book = self._sampled_book(setting)
        order = self.order(replace(setting, policy=Policy.DFS), book).tolist()
        ones = np.ones(len(self.output), dtype=np.int64)
        found = []
        for output, received in ((ones, False), (self.output, True)):
            cache = KVCache(self.tree, _capacity(setting))
            engine = self._engine(setting, cache, len(output), output, received)
            found.append(engine.run(OrderScheduler(order, book)))
        prefill, decode = found
        seconds, x, y = min(
            (max(prefill.seconds / x, decode.seconds / y) * (x + y), x, y) for x, y in SPLITS
        )
        decode.cached_tokens = 0  # What it received was found, or computed, by the others.
        return [prefill, decode], seconds, f"{x}P{y}D"

    # -- parts ------------------------------------------------------------------------------------

    def _engine(
        self,
        setting: Setting,
        cache: KVCache,
        members: int,
        output: Ints | None = None,
        received: bool = False,
    ) -> Engine:
        costs, overlap = _engine_terms(setting)
        return Engine(
            self.tree,
            self.output if output is None else output,
            members,
            costs,
            overlap,
            cache,
            received=received,
            trace_every=setting.trace_every,
        )

    def _book(self, known: bool, outcomes: int = OUTCOMES) -> LengthBook:
        limits = self.workload.max_output_tokens
        return LengthBook(self.tree, self.output, limits, known, outcomes)

    def _sample(self, setting: Setting) -> Ints:
        config = PlannerConfig(sample_fraction=setting.sampling, seed=setting.seed)
        return make_plan(self.job, setting.cost_model, config, tree=self.tree).sample

    def _sampled_book(self, setting: Setting, outcomes: int = OUTCOMES) -> LengthBook:
        """What the answers of a sample say, for policies that do not run it themselves."""
        key = (setting.sampling, outcomes)
        if key not in self._books:
            book = self._book(setting.sampling == 1.0, outcomes)
            if not book.known:
                book.learn(book.observed(self._sample(setting)))
            self._books[key] = book
        return self._books[key]


def run_together(
    engines: list[Engine], schedulers: list[BlendScheduler], central: CentralPlan, requests: int
) -> None:
    """Replicas side by side, always the one whose clock is behind; the job is planned again after
    128, 256, 512, ... steps of the first."""
    clocks = [(0.0, replica) for replica in range(len(engines))]
    next_plan = FIRST_REPLAN_STEP
    ended = 0
    while clocks:
        _, replica = heapq.heappop(clocks)
        engine = engines[replica]
        if central.online and engine.now >= next_plan:
            running: dict[int, int] = {}
            for other, scheduler in zip(engines, schedulers, strict=True):
                running |= scheduler.running(other)
            central.replan(running)
            next_plan = 2 * max(next_plan, engine.now)
        before = engine.ended
        moved = engine.advance(schedulers[replica])
        ended += engine.ended - before
        if moved:
            heapq.heappush(clocks, (engine.totals.seconds, replica))
        elif len(engines) == 1 and ended < requests:
            raise EngineStuck(
                f"{requests - ended} requests wait, none may start in {engine.capacity} tokens of "
                "KV memory; take a device with more memory"
            )


FIRST_REPLAN_STEP = 128


def _engine_terms(setting: Setting) -> tuple[StepCosts, OverlapModel]:
    costs = StepCosts.of(setting.cost_model)
    if setting.curve is None:
        return costs, OverlapModel.of(setting.overlap)
    return costs, OverlapModel.of(setting.overlap, setting.curve)


def _capacity(setting: Setting) -> int:
    return kv_capacity_tokens(setting.cost_model) if setting.capacity is None else setting.capacity


__all__ = ["Policy", "Result", "Scheduler", "Setting", "Simulation"]
