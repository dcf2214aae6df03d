"""The CPU backend next to SGLang's torch_native, on the same fake pool, as in an engine."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch

from blendserve.runtime.attention import BACKEND_NAME, _last_slots, _supports_triton
from blendserve.runtime.cpu_platform import activate, needs_cpu_engine
from sgl_kernel_ext import cpu

pytestmark = pytest.mark.skipif(not needs_cpu_engine(), reason="SGLang's CPU engine is for CPUs")


@pytest.fixture(scope="module")
def backends() -> tuple[type[Any], type[Any], type[Any]]:
    activate()
    import sglang.srt.layers.attention.torch_native_backend as native
    from sglang.srt.mem_cache.memory_pool import MHATokenToKVPool

    from blendserve.runtime.attention_cpu import BlendCpuAttention

    return BlendCpuAttention, native.TorchNativeAttnBackend, MHATokenToKVPool


class World:
    """A pool, a slot table and a batch of two requests with 7 and 40 positions."""

    def __init__(self, pool_class: type[Any], query_lens: list[int], **layer: Any) -> None:
        generator = torch.Generator().manual_seed(0)
        self.pool = pool_class.__new__(pool_class)
        self.keys = torch.randn(64, 2, 16, generator=generator)
        self.values = torch.randn(64, 2, 16, generator=generator)
        self.pool.dtype = self.pool.store_dtype = torch.float32
        self.pool.get_key_buffer = lambda _: self.keys
        self.pool.get_value_buffer = lambda _: self.values
        self.pool.set_kv_buffer = self.write
        table = torch.zeros(3, 50, dtype=torch.int32)
        table[2, :7] = torch.arange(1, 8)
        table[0, :40] = torch.arange(10, 50)
        self.runner = SimpleNamespace(
            device="cpu",
            token_to_kv_pool=self.pool,
            req_to_token_pool=SimpleNamespace(req_to_token=table),
        )
        decode = max(query_lens) == 1
        kv_lens = [7, 40]
        new = [table[row, k - q : k] for row, k, q in zip((2, 0), kv_lens, query_lens, strict=True)]
        self.forward_batch = SimpleNamespace(
            forward_mode=SimpleNamespace(is_decode=lambda: decode, is_idle=lambda: False),
            encoder_lens=None,
            req_pool_indices=torch.tensor([2, 0]),
            seq_lens=torch.tensor(kv_lens),
            extend_seq_lens=torch.tensor(query_lens),
            extend_prefix_lens=torch.tensor(kv_lens) - torch.tensor(query_lens),
            out_cache_loc=torch.cat(new).long(),
        )
        self.layer = SimpleNamespace(
            **{
                "layer_id": 0, "tp_q_head_num": 6, "tp_k_head_num": 2, "head_dim": 16,
                "qk_head_dim": 16, "v_head_dim": 16, "scaling": 0.25, "logit_cap": 0.0,
                "sliding_window_size": -1, "is_cross_attention": False, "attn_type": "decoder",
                **layer,
            }
        )  # fmt: skip
        tokens = sum(query_lens)
        self.q = torch.randn(tokens, 6 * 16, generator=generator)
        self.kv = [torch.randn(tokens, 2, 16, generator=generator) for _ in "kv"]
        self.decode = decode

    def write(self, layer: Any, where: Any, key: torch.Tensor, value: torch.Tensor) -> None:
        self.keys[where.loc], self.values[where.loc] = key, value

    def forward(self, backend_class: type[Any]) -> torch.Tensor:
        backend = backend_class(self.runner)
        backend.init_forward_metadata(self.forward_batch)
        method = backend.forward_decode if self.decode else backend.forward_extend
        return method(self.q, *self.kv, self.layer, self.forward_batch)


@pytest.mark.skipif(cpu.unavailable_reason() is not None, reason=str(cpu.unavailable_reason()))
@pytest.mark.parametrize("query_lens", [[1, 1], [7, 12], [3, 1]])
@pytest.mark.parametrize("window", [-1, 5])
def test_outputs_and_kv_writes_equal_torch_natives(
    backends: tuple[type[Any], ...], query_lens: list[int], window: int
) -> None:
    blend, native, pool_class = backends
    ours = World(pool_class, query_lens, sliding_window_size=window)
    theirs = World(pool_class, query_lens, sliding_window_size=window)
    torch.testing.assert_close(ours.forward(blend), theirs.forward(native), atol=1e-6, rtol=1e-5)
    torch.testing.assert_close(ours.keys, theirs.keys, atol=0, rtol=0)
    torch.testing.assert_close(ours.values, theirs.values, atol=0, rtol=0)


def test_without_compiled_kernels_the_backend_is_torch_native(
    backends: tuple[type[Any], ...],
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    blend, native, pool_class = backends
    monkeypatch.setattr(cpu, "unavailable_reason", lambda: "they were not built")
    ours, theirs = World(pool_class, [1, 1]), World(pool_class, [1, 1])
    monkeypatch.setattr(cpu, "run", lambda *_: pytest.fail("the kernels were called"))
    torch.testing.assert_close(ours.forward(blend), theirs.forward(native), atol=0, rtol=0)
    assert "runs as torch_native: they were not built" in caplog.text


def test_sglang_is_kept_from_triton_for_our_name_only() -> None:
    original = {"triton": True, "torch_native": False, BACKEND_NAME: True}.__getitem__
    assert [_supports_triton(original, name) for name in ("triton", "torch_native")] == [
        True,
        False,
    ]
    assert not _supports_triton(original, BACKEND_NAME)


def test_the_last_slot_of_an_empty_prefix_is_none() -> None:
    table = torch.tensor([[5, 6, 7], [8, 9, 10]], dtype=torch.int32)
    found = _last_slots(table, torch.tensor([1, 0]), torch.tensor([3, 0]))
    assert found.tolist() == [10, -1]
