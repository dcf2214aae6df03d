"""Where the costs of a step are from: a datasheet, kernels measured on the chip, or formulas that
were fitted to measured chips.

`step_costs` takes the best there is. Every source fills the same tables of `StepCosts`.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import ArrayLike

from .hardware import Hardware
from .kernel_import import installed_tables
from .kernel_tables import (
    TILE_TOKENS,
    AttentionKey,
    Floats,
    Grid,
    KernelTables,
    at_each_count,
    kernel_tables,
)
from .model_shape import ModelShape
from .model_spec import ModelSpec
from .step_costs import AttentionCosts, StepCosts

# Token counts of the tables; beyond them costs grow in proportion.
MOST_TOKENS = 16_384
# Of the datasheet's bandwidth, the most that any kernel measured on A100, H100, H200 and B200
# attains from memory: decode attention of an H200.
TRAFFIC_PART = 0.93
# Norms, rotary embedding and activation move so much of a bandwidth and take so long at least: what
# aiconfigurator-core 0.12.0 reckons with. They are not among its measured kernels.
SMALL_PART, LAUNCH_SECONDS, SMALL_KERNELS = 0.8, 3e-6, 5
# Of every step: scheduling, sampling and launches that the GPU waits for. Assumed; SGLang hides
# most of it behind the step before.
STEP_SECONDS = 1e-3


@dataclass(frozen=True)
class Attained:
    """Parts of the datasheet's figures that kernels attain, chosen by hand beside the tables of
    A100, H100, H200, B200 and L40S (how near they come: docs/planner.md).

    smooth: exponent p of the ridge, (compute^p + memory^p)^(1/p). prefill_tokens, decode_tokens:
    length of a prompt, contexts of a step in all, for which attention attains half of what it can.
    """

    gemm: float = 0.75
    weights: float = 0.83
    smooth: float = 4.0
    prefill: float = 0.6
    prefill_tokens: float = 900.0
    decode: float = 0.9
    decode_tokens: float = 8_000.0
    tile: int = TILE_TOKENS
    traffic: float = TRAFFIC_PART
    overheads: bool = True  # Small operators, all-reduces, fixed seconds of a step.


ATTAINED = Attained()
# Of figures that kernels were seen to attain: the same, without their losses.
MEASURED_CEILINGS = replace(ATTAINED, gemm=1.0, weights=1.0, prefill=0.8, decode=1.0, traffic=1.0)
# Without any loss, and attention without the causal half: as the paper counts.
DATASHEET = Attained(1.0, 1.0, np.inf, 0.5, 0.0, 1.0, 0.0, 1, 1.0, False)
_BATCHES = np.array([1, 2, 4, 8, 16, 32, 64, 128, 256, 512, 1_024])
_LENGTHS = np.array([1, 64, 128, 256, 512, 1_024, 2_048, 4_096, 8_192, 16_384])


def step_costs(model: ModelSpec, chip: Hardware, ranks: int = 1) -> StepCosts:
    """Costs of a step of this model on `ranks` of the chip (tensor parallel): measured where the
    chip has tables here or in an installed aiconfigurator-core, fitted else.

    model, chip: of one rank each, not scaled. A chip whose own figures were measured and given in a
    file keeps them, and has the kernel times that the file names. Where an engine's own steps with
    this model were measured, they are taken.
    """
    for measured in chip.steps:
        if measured.fits(model, ranks):
            return linear_costs(
                measured.token_seconds,
                measured.pair_seconds,
                measured.context_seconds,
                measured.weight_seconds,
                source=f"{chip.name}: {measured.steps:,} steps of an engine, measured with "
                f"{measured.model}; off by {measured.error:.0%} on average",
                one_memory=False,
            )
    tables = None
    if chip.kernels:
        tables = kernel_tables(chip.kernels) or installed_tables(chip.kernels)
    return (
        measured_costs(model, chip, ranks, tables) if tables else fitted_costs(model, chip, ranks)
    )


def fitted_costs(
    model: ModelSpec, chip: Hardware, ranks: int = 1, attained: Attained | None = None
) -> StepCosts:
    """From the chip's figures and the parts of them that kernels attain."""
    if attained is None:
        attained = MEASURED_CEILINGS if chip.attained else ATTAINED
    source = "datasheet" if attained is DATASHEET else "fitted to measured chips"
    return _Costs(model, chip, ranks, attained, None).step_costs(f"{chip.name}: {source}")


def measured_costs(model: ModelSpec, chip: Hardware, ranks: int, tables: KernelTables) -> StepCosts:
    """From kernels measured on the chip; what they lack is fitted."""
    attained = MEASURED_CEILINGS if chip.attained else ATTAINED
    costs = _Costs(model, chip, ranks, attained, tables)
    found = costs.step_costs("")
    lacking = f"; fitted: {', '.join(sorted(costs.fitted))}" if costs.fitted else ""
    return StepCosts(
        f"{chip.name}: measured ({tables.source}){lacking}",
        found.tokens,
        found.sampled,
        found.attention,
        found.weights,
        found.context,
        found.window_context,
        found.state,
        found.step,
        found.tile,
    )


def linear_costs(
    token_seconds: float,
    pair_seconds: float,
    context_seconds: float,
    weight_seconds: float,
    step_seconds: float = 0.0,
    source: str = "linear",
    one_memory: bool = True,
) -> StepCosts:
    """Four numbers: a token's GEMMs, but for the weight read at least; prefill attention by
    end^2 - begin^2; decode attention by the context. one_memory: weights and KV come through the
    same memory, whose bandwidth these figures are of."""
    one = np.array([1])
    tokens = np.arange(MOST_TOKENS + 1)
    gemm = np.maximum(tokens * token_seconds, np.where(tokens > 0, weight_seconds, 0.0))
    attention = AttentionCosts(
        Grid(one, one, np.array([[context_seconds]])),
        Grid(one, one, np.array([[pair_seconds]]), 2),
    )
    return StepCosts(
        source=source,
        tokens=gemm,
        sampled=np.zeros(2),
        attention=(attention,),
        weights=np.full(2, weight_seconds if one_memory else 0.0),
        context=context_seconds if one_memory else 0.0,
        step=step_seconds,
    )


class _Costs:
    """One model on one chip; `fitted` names what no table had."""

    def __init__(
        self,
        model: ModelSpec,
        chip: Hardware,
        ranks: int,
        attained: Attained,
        tables: KernelTables | None,
    ) -> None:
        self._model, self._shape, self._chip, self._ranks = model, model.shape, chip, ranks
        self._attained, self._tables = attained, tables
        self.fitted: set[str] = set()
        self._counts = np.arange(MOST_TOKENS + 1)
        eight_bit = model.weight_dtype.startswith("fp8") and chip.fp8_flops
        self._flops = chip.fp8_flops if eight_bit and chip.fp8_flops else chip.compute_flops
        self._element = 1.0 if model.weight_dtype.startswith("fp8") else model.dtype_bytes

    def step_costs(self, source: str) -> StepCosts:
        model, shape, chip = self._model, self._shape, self._chip
        kinds = [(shape.full_layers, 0)]
        if shape.window:
            kinds.append((shape.window.layers, shape.window.tokens))
        bandwidth = chip.bandwidth_bytes * self._attained.traffic
        state = 2 * model.state_bytes / self._ranks / bandwidth
        return StepCosts(
            source=source,
            tokens=self._layer_tokens(),
            sampled=self._matrix(shape.vocab_size / self._ranks, shape.hidden_size, "bfloat16"),
            attention=tuple(
                AttentionCosts(
                    self._decode(window).scaled(layers),
                    self._prefill(window).scaled(layers),
                    window,
                )
                for layers, window in kinds
                if layers
            ),
            weights=self._weight_bytes() / bandwidth,
            context=model.kv_bytes_per_token * self._copies / self._ranks / bandwidth,
            window_context=model.window_kv_bytes_per_token * self._copies / self._ranks / bandwidth,
            state=state,
            step=STEP_SECONDS if self._attained.overheads else 0.0,
            tile=self._attained.tile if self._attained.overheads else 0,
        )

    # -- GEMMs ------------------------------------------------------------------------------------

    def _layer_tokens(self) -> Floats:
        shape, model = self._shape, self._model
        found = np.zeros(MOST_TOKENS + 1)
        for n, k, layers in dense_matrices(shape, self._ranks):
            found += layers * self._matrix(n, k, model.weight_dtype)
        if shape.experts:
            found += shape.experts.sparse_layers * self._experts()
        if self._attained.overheads:
            found += self._small_operators()
            if self._ranks > 1:
                found += 2 * shape.num_layers * self._all_reduce()
        return found

    def _matrix(self, n: float, k: float, dtype: str) -> Floats:
        tables = self._tables
        if tables is not None and dtype in tables.gemm:
            table = tables.gemm[dtype]
            return at_each_count(table.m, table.at(n, k), MOST_TOKENS)
        if tables is not None:
            self.fitted.add(f"GEMMs of {dtype}")
        return self._roofline(n * k * self._counts, n * k * self._element)

    def _roofline(self, products: ArrayLike, weight_bytes: float | Floats) -> Floats:
        """Of so many multiply-adds per count of tokens; 0 for 0 tokens."""
        attained, counts = self._attained, np.maximum(self._counts, 1)
        full = -(-counts // attained.tile) * attained.tile / counts
        compute = 2 * np.asarray(products, dtype=np.float64) * full / (self._flops * attained.gemm)
        memory = weight_bytes / (self._chip.bandwidth_bytes * attained.weights)
        found = _ridge(compute, np.broadcast_to(memory, compute.shape), attained.smooth)
        return np.where(self._counts > 0, found, 0.0)

    def _experts(self) -> Floats:
        shape, model, tables = self._shape, self._model, self._tables
        experts = shape.experts
        assert experts is not None
        if tables is not None:
            key = (shape.hidden_size, experts.width, experts.active, experts.total, self._ranks)
            times = tables.experts.get(model.weight_dtype, {}).get(key)
            if times is not None:
                return at_each_count(tables.expert_tokens, times, MOST_TOKENS)
            self.fitted.add("experts")
        one = shape.ffn_matrices * shape.hidden_size * experts.width / self._ranks
        touched = experts_touched(experts.total, experts.active, self._counts)
        # Each expert that is touched works on tiles of its own.
        element = model.weight_bytes / model.total_params
        return self._roofline(
            one * experts.active * self._counts, touched * one * min(element, self._element)
        )

    def _small_operators(self) -> Floats:
        shape = self._shape
        widths = (
            8 * shape.hidden_size
            + 2 * (shape.heads + shape.kv_heads) * shape.head_dim / self._ranks
            + 3
            * max(
                shape.ffn_width, shape.experts.active * shape.experts.width if shape.experts else 0
            )
            / self._ranks
        )
        moved = widths * 2.0 * shape.num_layers / (self._chip.bandwidth_bytes * SMALL_PART)
        launches = SMALL_KERNELS * shape.num_layers * LAUNCH_SECONDS
        return np.where(self._counts > 0, self._counts * moved + launches, 0.0)

    def _all_reduce(self) -> Floats:
        tables, moved = self._tables, self._counts * self._shape.hidden_size * 2.0
        if tables is not None and self._ranks in tables.all_reduce:
            sizes, times = tables.message_bytes, tables.all_reduce[self._ranks]
            beyond = np.maximum(moved / sizes[-1], 1.0)
            return np.where(moved > 0, np.interp(moved, sizes, times) * beyond, 0.0)
        self.fitted.add("all-reduce")
        if not self._chip.link_bytes:
            return np.zeros(MOST_TOKENS + 1)
        part = 2 * (self._ranks - 1) / self._ranks
        return np.where(moved > 0, part * moved / self._chip.link_bytes + LAUNCH_SECONDS, 0.0)

    def _weight_bytes(self) -> Floats:
        """Of a rank, that a step of so many tokens reads: no embedding table, and of the experts
        those that the tokens choose."""
        model, shape = self._model, self._shape
        per_weight = model.weight_bytes / model.total_params
        table = shape.vocab_size * shape.hidden_size
        read = model.total_params - (0 if shape.tied else table)
        found = np.full(MOST_TOKENS + 1, read * per_weight)
        if shape.experts:
            experts = shape.experts
            one = shape.ffn_matrices * shape.hidden_size * experts.width * experts.sparse_layers
            touched = experts_touched(experts.total, experts.active, self._counts)
            found -= (experts.total - touched) * one * per_weight
        found[0] = 0.0
        return np.asarray(found / self._ranks)

    # -- attention --------------------------------------------------------------------------------

    @property
    def _copies(self) -> float:
        shards = self._model.kv_shards
        return self._ranks * -(-shards // self._ranks) / shards

    @property
    def _key(self) -> tuple[int, int, int]:
        shape, ranks = self._shape, self._ranks
        return (max(shape.heads // ranks, 1), max(shape.kv_heads // ranks, 1), shape.head_dim)

    def _decode(self, window: int) -> Grid:
        measured = self._measured("decode", window)
        if measured is not None:
            return measured
        attained = self._attained
        kv_bytes = self._layer_kv_bytes()
        rate = self._chip.bandwidth_bytes * attained.decode
        tokens = _BATCHES[:, None] * _LENGTHS
        seconds = (tokens + attained.decode_tokens) * kv_bytes / rate
        return Grid(_BATCHES, _LENGTHS, seconds)

    def _prefill(self, window: int) -> Grid:
        measured = self._measured("prefill", window)
        if measured is not None:
            return measured
        attained, shape = self._attained, self._shape
        width = shape.attention_width / self._ranks
        pairs = _BATCHES[:, None] * _LENGTHS.astype(np.float64) ** 2
        part = _LENGTHS / (_LENGTHS + attained.prefill_tokens)
        rate = self._chip.compute_flops * attained.prefill
        # Two products of `width` for each of the causal half of the pairs.
        return Grid(_BATCHES, _LENGTHS, 2 * width * pairs / (rate * part), 2)

    def _layer_kv_bytes(self) -> float:
        model, shape = self._model, self._shape
        whole = model.kv_bytes_per_token + model.window_kv_bytes_per_token
        return whole / max(shape.softmax_layers, 1) * self._copies / self._ranks

    def _measured(self, phase: str, window: int) -> Grid | None:
        tables, model, shape = self._tables, self._model, self._shape
        if tables is None:
            return None
        if shape.mla is not None:
            latent = getattr(tables, f"latent_{phase}").get(model.kv_dtype, {})
            heads = max(shape.heads // self._ranks, 1)
            if latent:
                near = min(latent, key=lambda has: abs(np.log(has / heads)))
                found: Grid = latent[near]
                return found.scaled(max(heads / near, 1.0) if phase == "prefill" else 1.0)
        else:
            measured = getattr(tables, phase)
            halved = model.kv_dtype == "fp8" and "fp8" not in measured
            grids = measured.get("bfloat16" if halved else model.kv_dtype, {})
            nearest = _nearest(grids, (*self._key, window))
            if nearest is not None:
                key, grid = nearest
                if phase == "prefill":
                    return grid.scaled(self._key[0] / key[0])
                # KV heads are what is read; of eight bits each, half of sixteen.
                return grid.scaled(self._key[1] / key[1] * (0.5 if halved else 1.0))
        self.fitted.add(f"{phase} attention")
        return None


def _ridge(compute: Floats, memory: Floats, smooth: float) -> Floats:
    larger = np.maximum(compute, memory)
    if np.isinf(smooth):
        return larger
    smaller = np.minimum(compute, memory)
    with np.errstate(invalid="ignore", divide="ignore"):
        part = np.where(larger > 0, smaller / larger, 0.0)
    return np.asarray(larger * (1 + part**smooth) ** (1 / smooth))


def _nearest(
    grids: dict[AttentionKey, Grid], wanted: AttentionKey
) -> tuple[AttentionKey, Grid] | None:
    """The measured heads that are most like these: the same head_dim; the window if there is one,
    else without; KV heads and the queries of each as near as can be."""
    heads, kv_heads, head_dim, window = wanted
    same = [key for key in grids if key[2] == head_dim and key[3] == window]
    same = same or [key for key in grids if key[2] == head_dim and not key[3]]
    if not same:
        return None

    def apart(key: AttentionKey) -> tuple[float, float]:
        group = (key[0] / key[1]) / (heads / kv_heads)
        return abs(float(np.log(key[1] / kv_heads))) + abs(float(np.log(group))), key[0]

    best = min(same, key=apart)
    return best, grids[best]


def experts_touched(total: int, active: int, tokens: ArrayLike) -> Floats:
    """Of E experts, those that so many tokens choose, k each: E (1 - (1 - k / E)^tokens)."""
    return np.asarray(
        total * (1.0 - (1.0 - active / total) ** np.asarray(tokens, dtype=np.float64))
    )


def dense_matrices(shape: ModelShape, ranks: int) -> Iterable[tuple[float, float, int]]:
    """(columns, rows, layers) of every weight matrix of a rank that all tokens pass through, the
    lm_head apart."""
    hidden, mla = shape.hidden_size, shape.mla
    heads = shape.heads / ranks
    kv_heads = max(shape.kv_heads / ranks, 1.0)
    layers = shape.softmax_layers
    if mla is None:
        queries = (2 if shape.query_gate else 1) * heads
        yield (queries + 2 * kv_heads) * shape.head_dim, hidden, layers
        yield hidden, heads * shape.head_dim, layers
    else:
        query = heads * (mla.nope_dim + mla.rope_dim)
        yield mla.query_rank + mla.kv_rank + mla.rope_dim, hidden, layers
        yield query, mla.query_rank or hidden, layers
        yield heads * (mla.nope_dim + mla.value_dim), mla.kv_rank, layers
        yield hidden, heads * mla.value_dim, layers
    if shape.linear:
        linear = shape.linear
        yield (linear.width + 2 * linear.value_heads) / ranks, hidden, linear.layers
        yield hidden, linear.value_heads * linear.value_dim / ranks, linear.layers
    sparse = shape.experts.sparse_layers if shape.experts else 0
    widths = [(shape.ffn_width, shape.num_layers - sparse)]
    if shape.experts:
        widths.append((shape.experts.shared_width, sparse))
    for width, count in widths:
        if width and count:
            yield (shape.ffn_matrices - 1) * width / ranks, hidden, count
            yield hidden, width / ranks, count
