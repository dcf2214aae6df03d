"""Which requests of a batch share which KV, from the radix cache's nodes: no word from the GPU.

The slot table says the same, but it lies on the GPU, and a step that is to be planned must not wait
for the one before it. Scheduler and model live in one process, so the scheduler leaves the batch's
requests where the attention backend finds them.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from sgl_kernel_ext.groups import IntArray, Segment, shared_segments

_FAR = np.iinfo(np.int64).max


class BatchRequests:
    """The requests of the batch that the scheduler has handed to the model, in its order."""

    def __init__(self) -> None:
        self.reqs: Sequence[Any] = ()

    def of(self, rids: Sequence[str] | None) -> Sequence[Any] | None:
        """The requests with these ids in this order; None if the batch is another one."""
        if rids is None or [req.rid for req in self.reqs] != list(rids):
            return None
        return self.reqs


current = BatchRequests()


class PrefixPaths:
    """The segments of one batch after the other; they are found anew where requests change."""

    def __init__(self) -> None:
        self._state: list[tuple[str, int]] = []
        self._shared: list[Segment] = []
        self._private: IntArray = np.empty(0, dtype=np.int64)
        self.searches = 0

    def segments(self, reqs: Sequence[Any], kv_lens: IntArray) -> list[Segment]:
        """The KV of decoding requests, cut as by `groups.shared_segments`; members are their
        numbers. kv_lens: [requests]."""
        state = [(req.rid, id(req.last_node)) for req in reqs]
        if state != self._state:
            self._search(reqs, kv_lens)
            self._state = state
        return [
            *self._shared,
            *(
                Segment(begin, end, np.array([member]))
                for member, (begin, end) in enumerate(
                    zip(self._private.tolist(), kv_lens.tolist(), strict=True)
                )
                if begin < end
            ),
        ]

    def _search(self, reqs: Sequence[Any], kv_lens: IntArray) -> None:
        self.searches += 1
        paths = [_path(req.last_node) for req in reqs]
        depth = max(map(len, paths), default=0)
        # Behind its path, each request has its own: numbers that no node has.
        nodes = np.repeat(-1 - np.arange(len(reqs))[:, None], depth + 1, axis=1)
        ends = np.full((len(reqs), depth + 1), _FAR)
        for member, path in enumerate(paths):
            for at, (node, end) in enumerate(path):
                nodes[member, at], ends[member, at] = node, end

        def lookup(members: IntArray, positions: IntArray) -> IntArray:
            found: IntArray = nodes[members, (ends[members] <= positions[:, None]).sum(1)]
            return found

        found = shared_segments(lookup, kv_lens)
        self._shared = [s for s in found if len(s.members) > 1]
        # As requests decode on, what is shared stays, and what is private grows.
        self._private = kv_lens.copy()
        for segment in found:
            if len(segment.members) == 1:
                self._private[segment.members] = segment.begin


def _path(node: Any) -> list[tuple[int, int]]:
    """(number, end position) of each node from below the root to this one; empty for caches whose
    nodes are not SGLang's Python ones."""
    found = []
    while node is not None and getattr(node, "parent", None) is not None:
        if node.value is None:
            return []
        found.append((node.id, len(node.value)))
        node = node.parent
    path, end = [], 0
    for number, length in reversed(found):
        end += length
        path.append((number, end))
    return path
