"""One workload, one policy, one engine: how long it takes, and how near that is to the optimum."""

from __future__ import annotations

import heapq
from dataclasses import dataclass, field, replace
from enum import StrEnum

import numpy as np
from numpy.typing import NDArray

from blendserve.planner import (
    CostModel,
    Job,
    PlannerConfig,
    PrefixTree,
    StepCosts,
    StepPace,
    estimate,
    kv_capacity_tokens,
    make_plan,
)
from blendserve.planner.length_model import LIKELY_LENGTHS

from .blend import PAPER, BlendOptions, BlendScheduler
from .bounds import Bound, lower_bound
from .central_plan import CentralPlan
from .engine import Engine, EngineStuck, Totals
from .foresight import Foresight
from .kv_cache import KVCache
from .lengths import LengthBook
from .orders import CHUNK_TOKENS, OrderScheduler, PacedOrderScheduler, sorted_depth_first
from .step_time import Overlap, OverlapModel
from .workloads import Workload

Ints = NDArray[np.int64]


class Policy(StrEnum):
    """fcfs: lines as they stand in the file. random: shuffled (NanoFlow-Balance). dfs: depth first
    through the prefix tree (NanoFlow-DFS; with `sequential`, vLLM-DFS and SGLang-DFS). dfs-best:
    the fastest of three such orders: children as they are, the densest first, the densest last.
    dfs-paced: the same with our pacing of prefill. longest: largest expected output first.
    batchllm: depth first, subtrees with the most decoding per prefill first. disaggregated: prefill
    and decode on devices of their own. blend-paper: BlendServe without additions of ours. blend:
    ours."""

    FCFS = "fcfs"
    RANDOM = "random"
    DFS = "dfs"
    DFS_BEST = "dfs-best"
    DFS_PACED = "dfs-paced"
    LONGEST = "longest"
    BATCHLLM = "batchllm"
    DISAGGREGATED = "disaggregated"
    BLEND_PAPER = "blend-paper"
    BLEND = "blend"


# Prefill and decode devices that `disaggregated` tries; the best counts.
SPLITS = tuple((x, y) for x in range(1, 5) for y in range(1, 5))


@dataclass(frozen=True)
class Setting:
    """What to simulate beside the workload. sampling: part of the requests whose lengths are
    sampled; 1 means that all lengths are known. replicas: data-parallel, blend only. capacity:
    KV tokens of a replica, by default what the device has. curve: a measured interference curve,
    (R, P(R)) pairs. costs: measured terms of a step, in place of the cost model's. chunk_tokens: of
    a step, decodes included. mixed: prefill and decodes in one step. shared_decode: decode
    attention reads what running requests have in common once a step for all. trace_every: keep
    every so many steps of the first replica's trace."""

    cost_model: CostModel
    policy: Policy = Policy.BLEND
    overlaps: tuple[Overlap, ...] = (Overlap.INTERFERENCE,)
    sampling: float = 0.01
    replicas: int = 1
    capacity: int | None = None
    options: BlendOptions = field(default_factory=BlendOptions)
    curve: tuple[tuple[float, float], ...] | None = None
    costs: StepCosts | None = None
    chunk_tokens: int = CHUNK_TOKENS
    mixed: bool = True
    shared_decode: bool = False
    seed: int = 0
    trace_every: int = 0

    def __post_init__(self) -> None:
        if not 0.0 < self.sampling <= 1.0:
            raise ValueError(f"sampling must be above 0 and at most 1, not {self.sampling}")
        if self.replicas < 1:
            raise ValueError(f"there must be at least one replica, not {self.replicas}")
        if self.replicas > 1 and self.policy is not Policy.BLEND:
            raise ValueError("several replicas are simulated for the policy blend only")
        if not self.overlaps or (self.replicas > 1 and len(self.overlaps) > 1):
            raise ValueError("give one overlap model; with a single replica, one or more")

    @property
    def step_costs(self) -> StepCosts:
        return self.cost_model.step_costs if self.costs is None else self.costs

    def overlap_model(self, overlap: Overlap) -> OverlapModel:
        return (
            OverlapModel.of(overlap) if self.curve is None else OverlapModel.of(overlap, self.curve)
        )


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
    """A workload prepared once, to be run under several settings. page_tokens: of the KV cache;
    only whole pages are shared."""

    def __init__(self, workload: Workload, page_tokens: int = 1) -> None:
        self.workload = workload
        self.output: Ints = workload.output_tokens
        self.job: Job = workload.job()
        self.tree: PrefixTree = self.job.build_tree().paged(page_tokens)
        self._books: dict[tuple[float, int], LengthBook] = {}

    def bound(self, setting: Setting, overlap: Overlap) -> Bound:
        """Of the time of any run under this setting, whatever the policy."""
        costs = setting.step_costs
        model = setting.overlap_model(overlap)
        return lower_bound(
            self.tree,
            self.output,
            costs,
            model,
            setting.replicas,
            setting.shared_decode,
            setting.chunk_tokens,
        )

    def run(self, setting: Setting) -> list[Result]:
        """One result per overlap model, all from one run.

        Raises EngineStuck when a request does not fit the KV memory.
        """
        detail = [""] * len(setting.overlaps)
        if setting.policy is Policy.DISAGGREGATED:
            totals, seconds, detail = self._disaggregated(setting)
        else:
            totals = self.run_totals(setting)
            seconds = [max(times) for times in zip(*(t.seconds for t in totals), strict=True)]
        tokens = self.tree.prompt_tokens + int(self.output.sum())
        cached = sum(part.cached_tokens for part in totals)
        results = []
        for at, overlap in enumerate(setting.overlaps):
            bound = self.bound(setting, overlap).seconds
            results.append(
                Result(
                    policy=setting.policy.value,
                    overlap=overlap.value,
                    requests=len(self.workload),
                    tokens=tokens,
                    seconds=seconds[at],
                    throughput=tokens / seconds[at],
                    bound_seconds=bound,
                    share_of_bound=bound / seconds[at],
                    sharing=cached / max(self.tree.prompt_tokens, 1),
                    sharing_best=self.tree.sharing_ratio,
                    retractions=sum(part.retractions for part in totals),
                    steps=max(part.steps for part in totals),
                    recomputed_tokens=sum(part.recomputed_tokens for part in totals),
                    compute_seconds=sum(part.compute_seconds for part in totals),
                    memory_seconds=sum(part.memory_seconds for part in totals),
                    floor_seconds=sum(part.floor_seconds for part in totals),
                    detail=detail[at],
                    trace=totals[0].trace,
                )
            )
        return results

    # -- policies ---------------------------------------------------------------------------------

    def run_totals(self, setting: Setting) -> list[Totals]:
        """What each replica did; not for `disaggregated`, which has no such."""
        if setting.policy in (Policy.BLEND, Policy.BLEND_PAPER):
            return self._blend(setting)
        if setting.policy in (Policy.DFS_BEST, Policy.DFS_PACED):
            return self._best_order(setting)
        book = self._sampled_book(setting)
        engine = self._engine(setting, self._cache(setting))
        order = self.order(setting, book).tolist()
        return [engine.run(OrderScheduler(order, book, setting.chunk_tokens))]

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
        own = (tree.length - tree.shared).astype(np.float64)
        return sorted_depth_first(tree, output, own)

    def _best_order(self, setting: Setting) -> list[Totals]:
        """Of each overlap model the fastest of three depth-first orders; what is counted else is
        that of the first model's."""
        book, tree = self._sampled_book(setting), self.tree
        model = setting.cost_model
        output = book.means()[tree.requests]
        compute = model.compute_seconds(tree.length, output)
        compute = compute - model.prefill_seconds_saved(tree.shared)
        memory = model.memory_seconds(tree.length, output)
        work = np.empty((2, tree.num_leaves))
        work[:, tree.requests] = compute, memory
        pace = StepPace.of(setting.step_costs, setting.chunk_tokens)
        runs = []
        for order in (
            tree.requests,
            sorted_depth_first(tree, compute, memory),
            sorted_depth_first(tree, memory, compute),
        ):
            engine = self._engine(setting, self._cache(setting))
            scheduler = (
                PacedOrderScheduler(order.tolist(), book, pace, work)
                if setting.policy is Policy.DFS_PACED
                else OrderScheduler(order.tolist(), book, setting.chunk_tokens)
            )
            runs.append(engine.run(scheduler))
        best = min(runs, key=lambda run: run.seconds[0])
        seconds = [min(times) for times in zip(*(run.seconds for run in runs), strict=True)]
        return [replace(best, seconds=seconds)]

    def _blend(self, setting: Setting) -> list[Totals]:
        setting = (
            replace(setting, options=PAPER) if setting.policy is Policy.BLEND_PAPER else setting
        )
        options, known = setting.options, setting.sampling == 1.0
        outcomes = LIKELY_LENGTHS if options.distribution else 1
        book = None
        if known or not options.online:
            book = self._book(known, outcomes) if known else self._sampled_book(setting, outcomes)
        lengths = None
        if setting.policy is Policy.BLEND_PAPER and book is not None and not known:
            limits = self.workload.max_output_tokens
            observed = book.observed(self._sample(setting))
            lengths = estimate(self.tree, observed, limits, np.zeros(len(limits), dtype=bool))
        foresight = Foresight(self.tree) if options.foresight else None
        central = CentralPlan(
            self.job,
            self.tree,
            setting.cost_model,
            PlannerConfig(
                sample_fraction=setting.sampling,
                seed=setting.seed,
                shared_decode_tokens=_capacity(setting)
                if setting.shared_decode and options.shared_memory
                else None,
                # While lengths are learnt, those that a plan is made with are not exact.
                kv_tokens=_capacity(setting) * setting.replicas
                if known and setting.policy is Policy.BLEND
                else None,
            ),
            self.output,
            book,
            setting.replicas,
            lengths,
            foresight,
            options.distribution,
        )
        engines, schedulers = [], []
        for replica in range(setting.replicas):
            engine = self._engine(setting, self._cache(setting, foresight))
            engines.append(engine)
            schedulers.append(
                BlendScheduler(
                    central,
                    setting.step_costs,
                    engine,
                    options.paced,
                    replica,
                    setting.chunk_tokens,
                )
            )
        run_together(engines, schedulers, central, len(self.output))
        return [engine.totals for engine in engines]

    def _disaggregated(self, setting: Setting) -> tuple[list[Totals], list[float], list[str]]:
        """Prefill devices run all prompts, decode devices get their KV for nothing and all in
        time: the time is that of the slower kind, and more than a real system could reach."""
        book = self._sampled_book(setting)
        order = self.order(replace(setting, policy=Policy.DFS), book).tolist()
        ones = np.ones(len(self.output), dtype=np.int64)
        found = []
        for output, received in ((ones, False), (self.output, True)):
            engine = self._engine(setting, self._cache(setting), output, received)
            found.append(engine.run(OrderScheduler(order, book, setting.chunk_tokens)))
        prefill, decode = found
        decode.cached_tokens = 0  # What it received was found, or computed, by the others.
        seconds, detail = [], []
        for first, second in zip(prefill.seconds, decode.seconds, strict=True):
            least, x, y = min((max(first / x, second / y) * (x + y), x, y) for x, y in SPLITS)
            seconds.append(least)
            detail.append(f"{x}P{y}D")
        return found, seconds, detail

    # -- parts ------------------------------------------------------------------------------------

    def _cache(self, setting: Setting, foresight: Foresight | None = None) -> KVCache:
        return KVCache(self.tree, _capacity(setting), foresight, setting.chunk_tokens)

    def _engine(
        self,
        setting: Setting,
        cache: KVCache,
        output: Ints | None = None,
        received: bool = False,
    ) -> Engine:
        return Engine(
            self.tree,
            self.output if output is None else output,
            len(self.output),
            setting.step_costs,
            [setting.overlap_model(overlap) for overlap in setting.overlaps],
            cache,
            received=received,
            mixed=setting.mixed,
            shared_decode=setting.shared_decode,
            trace_every=setting.trace_every,
        )

    def _book(self, known: bool, outcomes: int = LIKELY_LENGTHS) -> LengthBook:
        limits = self.workload.max_output_tokens
        return LengthBook(self.tree, self.output, limits, known, outcomes)

    def _sample(self, setting: Setting) -> Ints:
        """Both parts of it, the second one chosen with the answers of the first."""
        config = PlannerConfig(sample_fraction=setting.sampling, seed=setting.seed)
        plan = make_plan(self.job, setting.cost_model, config, tree=self.tree)
        first = plan.sample.tolist()
        observed = dict(zip(first, self.output[first].tolist(), strict=True))
        plan = make_plan(
            self.job,
            setting.cost_model,
            config,
            observed,
            exclude=first,
            tree=self.tree,
            sampled=first,
        )
        return np.concatenate((np.array(first, dtype=np.int64), plan.sample))

    def _sampled_book(self, setting: Setting, outcomes: int = LIKELY_LENGTHS) -> LengthBook:
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
    """Replicas side by side, always the one whose clock is behind; the job is planned again when
    that is due."""
    clocks = [(0.0, replica) for replica in range(len(engines))]
    ended = 0
    while clocks:
        _, replica = heapq.heappop(clocks)
        engine = engines[replica]
        if central.replan_due:
            running: dict[int, int] = {}
            for other, scheduler in zip(engines, schedulers, strict=True):
                running |= scheduler.running(other)
            central.replan(running)
            for other, scheduler in zip(engines, schedulers, strict=True):
                scheduler.learnt(other)
        before = engine.ended
        moved = engine.advance(schedulers[replica])
        ended += engine.ended - before
        if moved:
            heapq.heappush(clocks, (engine.clock, replica))
    if ended < requests:
        raise EngineStuck(
            f"{requests - ended} requests wait, none may start in {engines[0].capacity} tokens of "
            "KV memory; take a device with more memory"
        )


def _capacity(setting: Setting) -> int:
    return kv_capacity_tokens(setting.cost_model) if setting.capacity is None else setting.capacity
