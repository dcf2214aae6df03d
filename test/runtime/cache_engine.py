"""An engine without a model: SGLang's requests, pools and allocators around one radix cache."""

from __future__ import annotations

from array import array
from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from blendserve.runtime import cpu_platform

cpu_platform.activate()

import sglang.srt.managers.scheduler  # noqa: E402, F401  (the order of imports that SGLang needs)
import torch  # noqa: E402
from sglang.srt.managers.schedule_batch import Req  # noqa: E402
from sglang.srt.mem_cache.allocator import (  # noqa: E402
    PagedTokenToKVPoolAllocator,
    TokenToKVPoolAllocator,
)
from sglang.srt.mem_cache.cache_init_params import CacheInitParams  # noqa: E402
from sglang.srt.mem_cache.common import evict_from_tree_cache  # noqa: E402
from sglang.srt.mem_cache.memory_pool import ReqToTokenPool  # noqa: E402
from sglang.srt.mem_cache.radix_cache import RadixCache  # noqa: E402
from sglang.srt.sampling.sampling_params import SamplingParams  # noqa: E402

from blendserve.planner import HARDWARE, MODEL_SPECS, CostModel  # noqa: E402
from blendserve.runtime.radix_cache import BlendRadixCache  # noqa: E402

COST_MODEL = CostModel(MODEL_SPECS["llama-3.1-8b"], HARDWARE["a100-80g-sxm"])


def make_cache(kind: str, params: CacheInitParams) -> Any:
    """ "blendserve", "python" (SGLang's RadixCache) or "rust" (its default)."""
    if kind == "blendserve":
        return BlendRadixCache(params, COST_MODEL)
    if kind == "python":
        return RadixCache(params)
    from sglang.srt.mem_cache.unified_cache.components import ComponentType
    from sglang.srt.mem_cache.unified_radix_cache import UnifiedRadixCache

    params.tree_components = (ComponentType.FULL,)
    params.tree_core_backend = kind
    return UnifiedRadixCache(params)


class CacheEngine:
    """Takes requests in and gives their memory back, as SGLang's scheduler does.

    Args:
        kind: which cache, see `make_cache`.
        kv_tokens: size of the KV pool.
        context: longest prompt with output.
        slots: requests that can run at a time.
    """

    def __init__(
        self,
        kind: str,
        kv_tokens: int,
        context: int,
        *,
        page_size: int = 1,
        slots: int = 64,
        policy: str = "lru",
    ) -> None:
        self.page_size = page_size
        self.kv_tokens = kv_tokens
        self.rows = ReqToTokenPool(slots, context, "cpu", enable_memory_saver=False)
        pool = {"dtype": torch.float32, "device": "cpu", "kvcache": None, "need_sort": False}
        self.allocator = (
            TokenToKVPoolAllocator(kv_tokens, **pool)
            if page_size == 1
            else PagedTokenToKVPoolAllocator(kv_tokens, page_size, **pool)
        )
        self.cache = make_cache(
            kind,
            CacheInitParams(
                disable=False,
                req_to_token_pool=self.rows,
                token_to_kv_pool_allocator=self.allocator,
                page_size=page_size,
                eviction_policy=policy,
            ),
        )
        self.running: dict[str, Req] = {}
        # Of each slot the hash of all tokens up to the one whose KV it holds.
        self.written = np.zeros(kv_tokens + page_size, dtype=np.int64)

    # -- a request's life ----------------------------------------------------------------------

    def start(
        self,
        rid: str,
        tokens: Sequence[int],
        params: dict[str, Any] | None = None,
        chunk: int | None = None,
    ) -> int | None:
        """Prefill a prompt, `chunk` tokens at a time; the tokens that it found in the cache.

        None, and nothing has changed, when the pool has no room for it.
        """
        sampling = SamplingParams(max_new_tokens=1, custom_params=params)
        req = Req(rid, "", array("q", tokens), sampling)
        req.init_next_round_input(self.cache)
        cached = len(req.prefix_indices)
        req.lock_receipt = self.cache.inc_lock_ref(req.last_node).to_dec_params()
        if self._pages(cached, len(tokens)) > self.free_tokens:
            self.cache.dec_lock_ref(req.last_node, req.lock_receipt)
            return None
        self.running[rid] = req
        end = cached
        while end < len(tokens):
            start, end = end, min(end + (chunk or len(tokens)), len(tokens))
            self._allocate(req, start, end)
            req.set_extend_range(start, end)
            self.cache.cache_unfinished_req(req, chunked=end < len(tokens))
        return cached

    def decode(self, rid: str, tokens: Sequence[int]) -> bool:
        """Append output tokens; False, and nothing has changed, when the pool has no room."""
        req = self.running[rid]
        start = req.kv.kv_committed_len
        if self._pages(start, start + len(tokens)) > self.free_tokens:
            return False
        req.output_ids.extend(tokens)
        self._allocate(req, start, start + len(tokens))
        return True

    def end(self, rid: str, keep: bool = True) -> None:
        """A request has finished, or (keep=False) was aborted or retracted."""
        req = self.running.pop(rid)
        # As SGLang's release_kv_cache, which also asks for the settings of a whole server.
        if keep:
            self.cache.insert_req(req, up_to=req.kv.kv_committed_len)
        self.cache.free_kv_row(req.kv, [(req.kv.cache_protected_len, req.kv.kv_allocated_len)])
        self.cache.unpin(req)
        self.rows.free(req)
        req.kv.mark_kv_released()

    # -- memory --------------------------------------------------------------------------------

    @property
    def free_tokens(self) -> int:
        return int(self.allocator.available_size()) + int(self.cache.evictable_size())

    def leaked_tokens(self) -> int:
        """SGLang's own account: what is neither free, nor cached, nor a running request's."""
        own = sum(
            self._pages(req.kv.cache_protected_len, req.kv.kv_allocated_len)
            for req in self.running.values()
        )
        held = int(self.cache.protected_size()) + own
        return self.kv_tokens - self.free_tokens - held

    def _pages(self, start: int, end: int) -> int:
        """Tokens of the pages that positions start to end need besides those of [0, start)."""
        page = self.page_size
        return (-(-end // page) - -(-start // page)) * page

    def _allocate(self, req: Req, start: int, end: int) -> None:
        needed = self._pages(start, end)
        evict_from_tree_cache(self.cache, needed)
        slots = self.allocator.alloc(needed)
        assert slots is not None, "evicting did not free what was counted as evictable"
        if not req.kv.holds_kv:
            self.rows.alloc([req])
            self.rows.write((req.kv.req_pool_idx, slice(0, start)), req.prefix_indices)
        row = self.rows.req_to_token[req.kv.req_pool_idx]
        in_page = min(-(-start // self.page_size) * self.page_size, end)
        # What still fits into the last page that the request holds, then the new pages.
        row[start:in_page] = row[start - 1] + 1 + torch.arange(in_page - start)
        row[in_page:end] = slots[: end - in_page].to(torch.int32)
        self.written[row[start:end].numpy()] = _prefix_hashes(req)[start:end]
        req.kv.kv_committed_len = req.kv.kv_allocated_len = end

    def wrong_tokens(self, rid: str) -> int:
        """Positions of a running request whose slots hold the KV of other text."""
        req = self.running[rid]
        row = self.rows.req_to_token[req.kv.req_pool_idx, : req.kv.kv_committed_len].numpy()
        return int((self.written[row] != _prefix_hashes(req)[: len(row)]).sum())


def _prefix_hashes(req: Req) -> NDArray[np.int64]:
    hashes, running = [], 0
    for token in req.origin_input_ids + req.output_ids:
        running = hash((running, token))
        hashes.append(running)
    return np.array(hashes, dtype=np.int64)
