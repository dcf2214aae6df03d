"""Seconds of compute and of memory traffic that a request costs (BlendServe, section 4.1).

Symbols: p prompt tokens, d output tokens, P parameters a token passes through, L layers,
H attention width (heads x head_dim; the hidden size for most models).
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import ArrayLike, NDArray

from .hardware import Hardware
from .model_spec import ModelSpec

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
    (or shapes that broadcast) and return float64 arrays of that shape, in seconds."""

    model: ModelSpec
    hardware: Hardware

    @classmethod
    def tensor_parallel(cls, model: ModelSpec, hardware: Hardware, ranks: int) -> CostModel:
        """The model on that many devices as one. Ranks beyond the KV heads keep copies of heads,
        so that together they hold, and read, more KV bytes per token (MLA: one copy a rank).
        Sequence and context parallelism divide the cache by tokens: for them scale the hardware
        alone. Raises ValueError for ranks < 1."""
        device = hardware.scaled(ranks)
        heads_per_rank = -(-model.kv_shards // ranks)
        copies = ranks * heads_per_rank / model.kv_shards
        return cls(replace(model, kv_bytes_per_token=model.kv_bytes_per_token * copies), device)

    def compute_seconds(self, prompt_tokens: ArrayLike, output_tokens: ArrayLike) -> Floats:
        """((p + d) * 2P + 4 p^2 H L) / FLOP/s: GEMMs of all tokens and prefill attention,
        without any prefix sharing."""
        p = np.asarray(prompt_tokens, dtype=np.float64)
        d = np.asarray(output_tokens, dtype=np.float64)
        flops = (p + d) * self._flops_per_token + p * p * self._flops_per_token_pair
        return np.asarray(flops / self.hardware.compute_flops, dtype=np.float64)

    def memory_seconds(self, prompt_tokens: ArrayLike, output_tokens: ArrayLike) -> Floats:
        """(p d + d^2 / 2) * KV bytes per token / bandwidth: the KV cache that decode attention
        reads over the d steps of the request."""
        p = np.asarray(prompt_tokens, dtype=np.float64)
        d = np.asarray(output_tokens, dtype=np.float64)
        token_reads = p * d + d * d / 2
        return np.asarray(
            token_reads * self.model.kv_bytes_per_token / self.hardware.bandwidth_bytes,
            dtype=np.float64,
        )

    def prefill_seconds_saved(self, cached_tokens: ArrayLike) -> Floats:
        """(c 2P + 4 c^2 H L) / FLOP/s: the compute that a cached prefix of c tokens spares.

        It is the part of `compute_seconds` that the prefix would have cost, so a request with a
        wholly cached prompt keeps exactly the GEMMs of its d output tokens.
        """
        return self.compute_seconds(cached_tokens, 0.0)

    def density(self, prompt_tokens: ArrayLike, output_tokens: ArrayLike) -> Floats:
        """rho of requests on their own; inf where d = 0."""
        return density(
            self.compute_seconds(prompt_tokens, output_tokens),
            self.memory_seconds(prompt_tokens, output_tokens),
        )

    @property
    def _flops_per_token(self) -> float:
        return 2.0 * self.model.params_per_token

    @property
    def _flops_per_token_pair(self) -> float:
        return 4.0 * self.model.attention_width * self.model.num_layers
