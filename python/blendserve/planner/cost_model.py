"""Seconds of compute and of memory traffic that a request costs (BlendServe, section 4.1).

Symbols: p prompt tokens, d output tokens, P parameters a token passes through, L layers,
H attention width (heads x head_dim; the hidden size for most models).
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import numpy as np
from numpy.typing import ArrayLike, NDArray

from .cost_sources import DATASHEET, fitted_costs, step_costs
from .hardware import Hardware
from .model_spec import ModelSpec
from .step_costs import Rates, StepCosts

Floats = NDArray[np.float64]


def density(compute_seconds: ArrayLike, memory_seconds: ArrayLike) -> Floats:
    """Compute density rho = compute / memory, elementwise; above 1 is compute-intensive.

    A request without memory time (no decode: d = 0) has density inf, even where compute is 0 too,
    so that the result is never nan and sorts to the compute end.
    """
    compute = np.asarray(compute_seconds, dtype=np.float64)
    memory = np.asarray(memory_seconds, dtype=np.float64)
    shape = np.broadcast_shapes(compute.shape, memory.shape)
    out = np.full(shape, np.inf)
    with np.errstate(over="ignore"):
        np.divide(compute, memory, out=out, where=np.broadcast_to(memory > 0, shape))
    return out


@dataclass(frozen=True)
class CostModel:
    """Cost of requests of one model on one device. All methods take scalars or arrays of one shape
    (or shapes that broadcast) and return float64 arrays of that shape, in seconds.

    steps: what the device attains, step by step; without it the paper's formulas on the figures of
    `hardware`. hardware: all devices of a replica as one.
    """

    model: ModelSpec
    hardware: Hardware
    steps: StepCosts | None = None

    @classmethod
    def tensor_parallel(cls, model: ModelSpec, hardware: Hardware, ranks: int) -> CostModel:
        """The paper's formulas for the model on that many devices as one. Ranks beyond the KV heads
        keep copies of heads, so that together they hold, and read, more KV bytes per token (MLA:
        one copy a rank). Sequence and context parallelism divide the cache by tokens: for them
        scale the hardware alone. Raises ValueError for ranks < 1."""
        device = hardware.scaled(ranks)
        heads_per_rank = -(-model.kv_shards // ranks)
        copies = ranks * heads_per_rank / model.kv_shards
        return cls(model.with_kv_bytes(copies), device)

    @classmethod
    def attained(cls, model: ModelSpec, hardware: Hardware, ranks: int = 1) -> CostModel:
        """What the model attains on that many devices: kernels measured on the device where there
        are tables of it, else formulas fitted to measured ones."""
        one = cls.tensor_parallel(model, hardware, ranks)
        return cls(one.model, one.hardware, step_costs(model, hardware, ranks))

    @cached_property
    def step_costs(self) -> StepCosts:
        """What steps take: `steps`, else the datasheet's roofline."""
        if self.steps is not None:
            return self.steps
        return fitted_costs(self.model, self.hardware, attained=DATASHEET)

    @cached_property
    def rates(self) -> Rates:
        """Seconds per unit of work."""
        if self.steps is not None:
            return self.steps.rates
        model, device = self.model, self.hardware
        window, layers = model.shape.window, model.shape.full_layers
        pair = 4.0 * model.attention_width / device.compute_flops
        return Rates(
            token=2.0 * model.params_per_token / device.compute_flops,
            sampled=0.0,
            pair=pair * layers,
            context=model.kv_bytes_per_token / device.bandwidth_bytes,
            window=model.window_tokens,
            window_pair=pair * window.layers if window else 0.0,
            window_context=model.window_kv_bytes_per_token / device.bandwidth_bytes,
            state=2 * model.state_bytes / device.bandwidth_bytes,
        )

    def compute_seconds(self, prompt_tokens: ArrayLike, output_tokens: ArrayLike) -> Floats:
        """((p + d) * 2P + 4 p^2 H L) / FLOP/s: GEMMs of all tokens and prefill attention,
        without any prefix sharing. With attained rates each term at its own."""
        p = np.asarray(prompt_tokens, dtype=np.float64)
        d = np.asarray(output_tokens, dtype=np.float64)
        rates = self.rates
        found = (p + d) * rates.token + d * rates.sampled + p * p * rates.pair
        if rates.window:
            found = found + np.minimum(p * p, 2.0 * rates.window * p) * rates.window_pair
        return np.asarray(found, dtype=np.float64)

    def memory_seconds(self, prompt_tokens: ArrayLike, output_tokens: ArrayLike) -> Floats:
        """(p d + d^2 / 2) * KV bytes per token / bandwidth: the KV cache that decode attention
        reads over the d steps of the request; in layers with a window no more than that."""
        p = np.asarray(prompt_tokens, dtype=np.float64)
        d = np.asarray(output_tokens, dtype=np.float64)
        rates = self.rates
        found = (p * d + d * d / 2) * rates.context + d * rates.state
        if rates.window:
            found = found + window_reads(p, d, rates.window) * rates.window_context
        return np.asarray(found, dtype=np.float64)

    def prefill_seconds_saved(self, cached_tokens: ArrayLike) -> Floats:
        """(c 2P + 4 c^2 H L) / FLOP/s: the compute that a cached prefix of c tokens spares.

        It is the part of `compute_seconds` that the prefix would have cost, so a request with a
        wholly cached prompt keeps exactly the GEMMs of its d output tokens.
        """
        return self.compute_seconds(cached_tokens, 0.0)

    def encoder_seconds(self, patches: ArrayLike) -> Floats:
        """2 V P + 4 L H P min(P, R) FLOPs at the rate of the GEMMs: what the vision encoder takes
        for a picture of P patches, each of which V parameters work on, and which attends to R
        others at most. 0 where the model has no encoder, or it is not known."""
        p = np.asarray(patches, dtype=np.float64)
        vision = self.model.vision
        if vision is None:
            return np.zeros_like(p)
        pairs = p * (np.minimum(p, vision.reach) if vision.reach else p)
        if vision.window:
            full = vision.full_layers / vision.layers
            pairs = full * pairs + (1 - full) * p * np.minimum(p, vision.window)
        flops = 2.0 * vision.params_per_patch * p + 4.0 * vision.layers * vision.width * pairs
        return np.asarray(flops * self.rates.token / (2.0 * self.model.params_per_token))

    def density(self, prompt_tokens: ArrayLike, output_tokens: ArrayLike) -> Floats:
        """rho of requests on their own; inf where d = 0."""
        return density(
            self.compute_seconds(prompt_tokens, output_tokens),
            self.memory_seconds(prompt_tokens, output_tokens),
        )


def window_reads(prompt: Floats, output: Floats, window: int) -> Floats:
    """Tokens that d decode steps read in a layer with a window w: the integral of min(p + x, w)."""
    growing = np.clip(window - prompt, 0.0, output)
    reads = prompt * growing + growing * growing / 2 + (output - growing) * window
    return np.asarray(reads, dtype=np.float64)
