"""Random attention problems: ragged lengths, scattered slots, shared prefixes; poisoned outputs."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch

from sgl_kernel_ext.batch import AttentionShape, PagedBatch
from sgl_kernel_ext.groups import IntArray


@dataclass
class Case:
    """One attention call with its inputs. The table's rows beyond a request's KV are garbage."""

    shape: AttentionShape
    batch: PagedBatch
    query: torch.Tensor
    key_pool: torch.Tensor
    value_pool: torch.Tensor
    slot_table: torch.Tensor

    def lookup(self, members: IntArray, positions: IntArray) -> IntArray:
        return self.slot_table.cpu().numpy()[self.batch.table_rows[members], positions]

    def poisoned_output(self) -> torch.Tensor:
        return torch.full_like(self.query, float("nan"), memory_format=torch.contiguous_format)


def make_case(
    seed: int,
    *,
    shape: AttentionShape,
    kv_lens: list[int],
    query_lens: list[int],
    shared: list[int] | None = None,
    page_size: int = 1,
    dtype: torch.dtype = torch.float32,
) -> Case:
    """A batch whose requests hold `shared[i]` positions of one common prefix, in whole pages.

    Pages are dealt out at random, and everything that no request owns, slot 0 included, holds NaN.
    """
    rng = np.random.default_rng(seed)
    generator = torch.Generator().manual_seed(seed)
    requests = len(kv_lens)
    shared = [s // page_size * page_size for s in (shared or [0] * requests)]
    assert all(s <= k for s, k in zip(shared, kv_lens, strict=True))
    pages_needed = -(-max(shared) // page_size) + sum(
        -(-(k - s) // page_size) for k, s in zip(kv_lens, shared, strict=True)
    )
    pages = rng.permutation(np.arange(1, pages_needed + 3))
    prefix_pages, pages = np.split(pages, [max(shared) // page_size])
    slots_of = lambda p: (p[:, None] * page_size + np.arange(page_size)).ravel()  # noqa: E731
    prefix = slots_of(prefix_pages)
    rows = rng.permutation(requests + 2)[:requests]
    slots = (pages_needed + 3) * page_size
    table = rng.integers(0, slots, (requests + 2, max(kv_lens) + 5)).astype(np.int32)
    owned = np.zeros(slots, dtype=bool)
    for row, kv_len, common in zip(rows, kv_lens, shared, strict=True):
        own, pages = np.split(pages, [-(-(kv_len - common) // page_size)])
        line = np.concatenate([prefix[:common], slots_of(own)[: kv_len - common]])
        table[row, :kv_len] = line
        owned[line] = True

    def pool() -> torch.Tensor:
        values = torch.randn(slots, shape.kv_heads, shape.head_dim, generator=generator)
        values[~torch.from_numpy(owned)] = float("nan")
        return values.to(dtype)

    # Query rows lie apart, as in the slice of a fused projection.
    fused = torch.randn(sum(query_lens), shape.heads + 1, shape.head_dim, generator=generator)
    return Case(
        shape=shape,
        batch=PagedBatch.of(rows.tolist(), kv_lens, query_lens),
        query=(2 * fused).to(dtype)[:, : shape.heads],
        key_pool=pool(),
        value_pool=pool(),
        slot_table=torch.from_numpy(table),
    )


def case_with_empty_prompts(seed: int, query_lens: list[int]) -> Case:
    """Requests without a query token are among the others, or alone."""
    shape = AttentionShape(heads=4, kv_heads=2, head_dim=16, scale=0.25)
    cached = [0, 3, 7]
    kv_lens = [cached[k % 3] + length for k, length in enumerate(query_lens)]
    return make_case(seed, shape=shape, kv_lens=kv_lens, query_lens=query_lens)


def random_case(seed: int, *, small: bool = False) -> Case:
    """A batch of any kind: decodes, one-token chunks, chunks with and without a cached prefix.

    Args:
        small: lengths and head dimensions for an interpreter.
    """
    rng = np.random.default_rng(seed)
    page_size = int(rng.choice([1, 16]))
    kv_heads, group = int(rng.choice([1, 2, 3])), int(rng.choice([1, 2, 3, 4, 7]))
    head_dim = int(rng.choice([16, 32, 64] if small else [8, 16, 64, 80, 128, 256]))
    requests = int(rng.integers(1, 4 if small else 9))
    longest = 24 if small else 70
    query_lens = np.where(rng.random(requests) < 0.6, 1, rng.integers(1, longest, requests))
    shared = int(rng.choice([0, 16, 32] if small else [0, 64, 128, 200]))
    # All, some, or one of the requests hold the prefix; boundaries of pages and tiles are likely.
    holds = rng.random(requests) < rng.choice([0.5, 1.0])
    prefix = rng.choice([0, 0, 1, 15, 16, 17, 63, 64, 65, 130], requests) // (2 if small else 1)
    shared_lens = np.where(holds, shared, 0)
    return make_case(
        seed,
        shape=AttentionShape(
            heads=kv_heads * group,
            kv_heads=kv_heads,
            head_dim=head_dim,
            scale=head_dim**-0.5,
            soft_cap=float(rng.choice([0.0, 0.0, 0.0, 30.0])),
            window=int(rng.choice([-1, -1, -1, 0, 5, 70])),
        ),
        kv_lens=(shared_lens + prefix + query_lens).tolist(),
        query_lens=query_lens.tolist(),
        shared=shared_lens.tolist(),
        page_size=page_size,
    )
