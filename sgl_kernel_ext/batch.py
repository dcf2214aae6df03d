"""What one attention call is about: whose tokens, how many of them, and where their KV lies."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray


@dataclass(frozen=True)
class PagedBatch:
    """The requests of one step; their query tokens lie one request after the other.

    ``table_rows[i]`` is request i's row of the slot table, whose column p names the KV slot of
    position p. The request has ``kv_lens[i]`` positions, of which the last ``query_lens[i]`` are
    the query tokens: 1 for a decode, more for a chunk of prefill, whose earlier positions are the
    cached prefix. One without a query token, an empty prompt, has nothing to attend to: no plan
    names it.

    Raises:
        ValueError: the lengths differ, or a request has more query tokens than positions.
    """

    table_rows: NDArray[np.int64]  # [requests]
    kv_lens: NDArray[np.int64]  # [requests]
    query_lens: NDArray[np.int64]  # [requests]

    def __post_init__(self) -> None:
        if not len(self.table_rows) == len(self.kv_lens) == len(self.query_lens):
            raise ValueError(
                f"a batch of {len(self.table_rows)} table rows, {len(self.kv_lens)} KV lengths and "
                f"{len(self.query_lens)} query lengths; it needs one of each per request"
            )
        wrong = np.flatnonzero((self.query_lens < 0) | (self.query_lens > self.kv_lens))
        if len(wrong):
            first = int(wrong[0])
            raise ValueError(
                f"request {first} of the batch has {self.query_lens[first]} query tokens and "
                f"{self.kv_lens[first]} positions; it needs 0 <= query tokens <= positions"
            )

    @classmethod
    def of(
        cls, table_rows: Sequence[int], kv_lens: Sequence[int], query_lens: Sequence[int]
    ) -> PagedBatch:
        """The batch of plain sequences or arrays, one entry per request."""
        return cls(
            np.asarray(table_rows, dtype=np.int64),
            np.asarray(kv_lens, dtype=np.int64),
            np.asarray(query_lens, dtype=np.int64),
        )

    def __len__(self) -> int:
        return len(self.table_rows)

    @property
    def query_starts(self) -> NDArray[np.int64]:
        """Index of each request's first query token, shape [requests]."""
        return np.cumsum(self.query_lens) - self.query_lens


@dataclass(frozen=True)
class AttentionShape:
    """What a layer fixes: heads, head dimension, and how scores are made.

    A query at position p sees positions up to p, with ``window`` >= 0 only the last ``window``
    before p and p itself. Scores are ``scale`` times the dot product, then, with ``soft_cap`` > 0,
    ``soft_cap * tanh(score / soft_cap)``.
    """

    heads: int
    kv_heads: int
    head_dim: int
    scale: float
    soft_cap: float = 0.0
    window: int = -1

    def __post_init__(self) -> None:
        if self.kv_heads < 1 or self.heads % self.kv_heads:
            raise ValueError(f"{self.heads} heads cannot share {self.kv_heads} KV heads evenly")

    @property
    def group(self) -> int:
        """Query heads per KV head."""
        return self.heads // self.kv_heads
