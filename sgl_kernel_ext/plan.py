"""Cuts a step's attention into work items: once per step, for all layers with the same window.

Decodes are cut along their shared prefixes: one item reads a shared stretch of KV once, for all the
requests that hold it. Prefill chunks are cut into tiles of query tokens. A CPU and a GPU cut at
different sizes (``Tiling``), and the plan is the same otherwise.
"""

from __future__ import annotations

import itertools
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from sgl_kernel_ext.batch import AttentionShape, PagedBatch
from sgl_kernel_ext.groups import Segment, SlotLookup, shared_segments

# Kernels take so many KV positions at a time, and a part of a tile costs as much as a whole one.
KV_TILE = 64


@dataclass(frozen=True)
class Tiling:
    """Sizes of work items for one kind of device."""

    query_tile: int  # query tokens of one prefill item
    max_members: int  # requests of one decode item: what they gather must stay close to the core
    min_split_tokens: int  # a decode item is not cut shorter than this
    items_per_worker: int  # cut decodes until each worker has this many items, for an even end
    # A further request on KV that is being read anyway costs about this much of a read.
    shared_read_cost: float

    def weight(self, members: int) -> float:
        """Cost of a KV position for so many query tokens, in reads of a position."""
        return 1.0 + self.shared_read_cost * (members - 1)

    def spare(self, members: int) -> float:
        """Reads of other positions that computing one for so many query tokens can hide."""
        return self.weight(members) - 2.0


@dataclass(frozen=True)
class Plan:
    """Work items as the kernels take them, and what they read.

    An item is (table row, first position, end position, KV head or -1 for all, first row, end row):
    some rows look at some positions of one slot-table row. A row is (query token, end of the
    positions that it may see, place of its partial result or -1 if the item makes the output).
    Query token ``merged_query[i]`` is joined from partial results ``merge_begin[i]`` to
    ``merge_begin[i + 1]``.
    """

    items: NDArray[
        np.int64
    ]  # [items, 6], the compute-bound first, of each kind the costliest first
    # [compute-bound items]: positions of memory-bound items whose reading each KV_TILE positions of
    # this one can hide.
    beside: NDArray[np.int64]
    rows: NDArray[np.int64]  # [rows, 3]
    merged_query: NDArray[np.int64]  # [merges]
    merge_begin: NDArray[np.int64]  # [merges + 1]
    window: int

    @property
    def partial_count(self) -> int:
        """Partial results that need a place, each of [heads, head_dim + 2] floats."""
        return int(self.merge_begin[-1])

    def read_bytes(self, shape: AttentionShape, element_bytes: int) -> int:
        """Bytes of KV and of partial results that the decode items of one layer read."""
        whole = self.items[self.items[:, 3] < 0]
        token_bytes = 2 * shape.kv_heads * shape.head_dim * element_bytes
        partial_bytes = shape.heads * (shape.head_dim + 2) * 4
        return int((whole[:, 2] - whole[:, 1]).sum()) * token_bytes + (
            self.partial_count * partial_bytes
        )


def make_plan(
    batch: PagedBatch,
    shape: AttentionShape,
    tiling: Tiling,
    workers: int,
    lookup: SlotLookup | None = None,
) -> Plan:
    """Plan one step.

    Args:
        batch: requests of any kind, mixed.
        shape: of the layers that the plan is for; the window counts.
        tiling: of the device.
        workers: threads or multiprocessors that will work on it.
        lookup: KV slots of the requests, by their number in the batch; None: share nothing.
    """
    decodes = np.flatnonzero(batch.query_lens == 1)
    segments = _decode_segments(batch, shape, decodes, lookup) if len(decodes) else []
    return plan_segments(batch, shape, tiling, workers, segments)


def plan_segments(
    batch: PagedBatch,
    shape: AttentionShape,
    tiling: Tiling,
    workers: int,
    segments: list[Segment],
) -> Plan:
    """Plan one step whose decodes are cut into segments already (`groups.shared_segments`).

    A window looks back over less than a segment, so with one the segments are cut anew.
    """
    builder = _Builder(batch, shape, tiling)
    if shape.window >= 0:
        decodes = np.flatnonzero(batch.query_lens == 1)
        segments = _decode_segments(batch, shape, decodes, None)
    if segments:
        builder.add_decodes(segments, workers)
    for request in np.flatnonzero(batch.query_lens > 1).tolist():
        builder.add_prefill(request)
    return builder.finish()


def _decode_segments(
    batch: PagedBatch, shape: AttentionShape, decodes: NDArray[np.int64], lookup: SlotLookup | None
) -> list[Segment]:
    kv_lens = batch.kv_lens[decodes]
    if shape.window >= 0 or lookup is None or len(decodes) == 1:
        # A window rarely reaches back into a shared prefix.
        begins = np.zeros_like(kv_lens)
        if shape.window >= 0:
            begins = np.maximum(kv_lens - 1 - shape.window, 0)
        return [
            Segment(begin, end, np.array([member]))
            for begin, end, member in zip(
                begins.tolist(), kv_lens.tolist(), decodes.tolist(), strict=True
            )
        ]
    return [
        Segment(segment.begin, segment.end, decodes[segment.members])
        for segment in shared_segments(
            lambda members, positions: lookup(decodes[members], positions), kv_lens
        )
    ]


class _Builder:
    """Collects items and rows; the partial results get their places at the end."""

    def __init__(self, batch: PagedBatch, shape: AttentionShape, tiling: Tiling) -> None:
        self.batch = batch
        self.shape = shape
        self.tiling = tiling
        self.query_starts = batch.query_starts
        # (cost, reads that each position hides) and (table row, token begin, token end, KV head,
        # row begin, row end)
        self.costs: list[tuple[float, float]] = []
        self.items: list[tuple[int, int, int, int, int, int]] = []
        self.row_queries: list[NDArray[np.int64]] = []
        self.row_visible: list[NDArray[np.int64]] = []
        self.row_count = 0

    def add_decodes(self, segments: list[Segment], workers: int) -> None:
        tiling = self.tiling
        whole = compute_bound = 0.0
        for segment in segments:
            cost = (segment.end - segment.begin) * tiling.weight(len(segment.members))
            whole += cost
            compute_bound += cost if tiling.spare(len(segment.members)) > 0.0 else 0.0
        for segment in segments:
            for first in range(0, len(segment.members), tiling.max_members):
                members = segment.members[first : first + tiling.max_members]
                rows = self._add_rows(self.query_starts[members], self.batch.kv_lens[members])
                weight = tiling.weight(len(members))
                length = segment.end - segment.begin
                spare = tiling.spare(len(members))
                # What hides behind compute-bound items cannot even out their end.
                total = compute_bound if spare > 0.0 else whole
                share = total / (workers * tiling.items_per_worker)
                wanted = round(length * weight / max(share, 1.0))
                pieces = max(1, min(length // tiling.min_split_tokens, wanted))
                inner = {
                    segment.begin + round(length * i / pieces / KV_TILE) * KV_TILE
                    for i in range(1, pieces)
                }
                # Pieces shorter than a tile have no cut of their own.
                inside = sorted(cut for cut in inner if segment.begin < cut < segment.end)
                cuts = [segment.begin, *inside, segment.end]
                table_row = int(self.batch.table_rows[members[0]])
                for begin, end in itertools.pairwise(cuts):
                    if begin > cuts[0]:
                        rows = self._add_rows(
                            self.query_starts[members], self.batch.kv_lens[members]
                        )
                    self.costs.append(((end - begin) * weight, spare))
                    self.items.append((table_row, begin, end, -1, *rows))

    def add_prefill(self, request: int) -> None:
        table_row = int(self.batch.table_rows[request])
        kv_len, query_len = int(self.batch.kv_lens[request]), int(self.batch.query_lens[request])
        first_query = int(self.query_starts[request])
        for tile in range(0, query_len, self.tiling.query_tile):
            tile_end = min(tile + self.tiling.query_tile, query_len)
            position = kv_len - query_len + tile
            end = kv_len - query_len + tile_end
            begin = max(position - self.shape.window, 0) if self.shape.window >= 0 else 0
            rows = self._add_rows(
                np.arange(first_query + tile, first_query + tile_end), np.arange(position, end) + 1
            )
            cost = (end - begin) * self.tiling.weight(tile_end - tile) / self.shape.kv_heads
            spare = self.tiling.spare(tile_end - tile) / self.shape.kv_heads
            for kv_head in range(self.shape.kv_heads):
                self.costs.append((cost, spare))
                self.items.append((table_row, begin, end, kv_head, *rows))

    def _add_rows(self, queries: NDArray[np.int64], visible: NDArray[np.int64]) -> tuple[int, int]:
        begin = self.row_count
        self.row_queries.append(queries)
        self.row_visible.append(visible)
        self.row_count += len(queries)
        return begin, self.row_count

    def finish(self) -> Plan:
        """Items in order; a query token with several rows gets partial results."""
        if not self.items:
            nothing = np.empty(0, dtype=np.int64)
            return Plan(
                items=nothing.reshape(0, 6),
                beside=nothing,
                rows=nothing.reshape(0, 3),
                merged_query=nothing,
                merge_begin=np.zeros(1, dtype=np.int64),
                window=self.shape.window,
            )
        rows = np.full((self.row_count, 3), -1)
        rows[:, 0] = np.concatenate(self.row_queries)
        rows[:, 1] = np.concatenate(self.row_visible)
        costs, spare = np.array(self.costs).T
        order = np.lexsort((-costs, spare <= 0.0))
        items = np.array(self.items, dtype=np.int64)[order]
        spare = spare[order][: int((spare > 0.0).sum())]
        lengths = items[:, 2] - items[:, 1]
        hidden = spare * lengths[: len(spare)]
        # Evenly, so that the last memory-bound item comes with the last compute-bound one.
        rate = min(1.0, lengths[len(spare) :].sum() / hidden.sum()) if len(spare) else 0.0
        by_query = np.argsort(rows[:, 0], kind="stable")
        queries, counts = np.unique(rows[:, 0], return_counts=True)
        merged = counts > 1
        several = np.repeat(merged, counts)
        places = by_query[several]
        rows[places, 2] = np.arange(len(places))
        return Plan(
            items=items,
            beside=np.rint(spare * rate * KV_TILE).astype(np.int64),
            rows=rows,
            merged_query=np.ascontiguousarray(queries[merged]),
            merge_begin=np.concatenate([[0], np.cumsum(counts[merged])]),
            window=self.shape.window,
        )
