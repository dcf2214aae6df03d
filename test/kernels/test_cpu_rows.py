"""Norms, activations, rotary embeddings and KV writes in C++, beside SGLang's own operators."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from blendserve.runtime.cpu_platform import activate, needs_cpu_engine
from sgl_kernel_ext import cpu

if not needs_cpu_engine():
    pytest.skip("SGLang's CPU engine is for CPUs", allow_module_level=True)
if cpu.unavailable_reason() is not None:
    pytest.skip(str(cpu.unavailable_reason()), allow_module_level=True)
activate()

from sglang.srt.layers.activation import SiluAndMul  # noqa: E402
from sglang.srt.layers.layernorm import RMSNorm  # noqa: E402
from sglang.srt.layers.rotary_embedding.base import RotaryEmbedding  # noqa: E402

from blendserve.runtime.row_kernels import use_row_kernels  # noqa: E402
from sgl_kernel_ext.cpu import rows  # noqa: E402

# One rounding to the element type; in bfloat16 SGLang rounds between its operators, too.
TOLERANCE = {torch.float32: 2e-6, torch.bfloat16: 2e-2}
DTYPES = list(TOLERANCE)


def values(*size: int, dtype: torch.dtype, apart: bool = False, scale: float = 1.0) -> torch.Tensor:
    """Random rows; `apart`: as a slice of wider ones, as of a fused projection."""
    wide = torch.randn(size[0], size[1] + (24 if apart else 0)) * scale
    return wide.to(dtype)[:, : size[1]]


def operator(kind: type[Any], **fields: Any) -> Any:
    """One of SGLang's operators without its configuration."""
    op = kind.__new__(kind)
    torch.nn.Module.__init__(op)
    op._forward_method = None
    for name, value in fields.items():
        setattr(op, name, value)
    return op


def norm(width: int, dtype: torch.dtype, **changes: Any) -> Any:
    fields = {
        "has_weight": True,
        "cast_x_before_out_mul": False,
        "fp32_residual": False,
        "override_orig_dtype": None,
        "variance_size_override": None,
        "variance_epsilon": 1e-5,
        "hidden_size": width,
        "weight": torch.nn.Parameter(torch.randn(width).to(dtype), requires_grad=False),
    }
    return operator(RMSNorm, **{**fields, **changes})


def rotary(rotary_dim: int, dtype: torch.dtype, kind: type[Any] = RotaryEmbedding) -> Any:
    from sglang.srt.layers.rotary_embedding.utils import apply_rotary_emb

    angle = torch.rand(50, rotary_dim // 2) * 6.3
    op = operator(kind, head_size=24, rotary_dim=rotary_dim, is_neox_style=True)
    op.register_buffer("cos_sin_cache", torch.cat((angle.cos(), angle.sin()), -1).to(dtype))
    op._apply_rotary_emb_wrapped = apply_rotary_emb
    return op


def ours(op: Any) -> Any:
    """What is called in its place."""
    use_row_kernels(op)
    assert op._forward_method is not None, "the kernels do not cover it"
    return op._forward_method


def assert_close(actual: Any, expected: Any, dtype: torch.dtype) -> None:
    assert actual.dtype == expected.dtype
    assert actual.shape == expected.shape
    tolerance = TOLERANCE[dtype]
    torch.testing.assert_close(actual, expected, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("tokens", [0, 1, 7, 300])
@pytest.mark.parametrize("width", [1, 16, 33, 576])
def test_activations(dtype: torch.dtype, tokens: int, width: int) -> None:
    op = operator(SiluAndMul)
    x = values(tokens, 2 * width, dtype=dtype, scale=20)
    expected = op.forward_native(x.double())
    actual = ours(op)(x)
    scale = float(expected.abs().max()) if tokens else 1.0
    assert_close(
        actual.double() / scale,
        expected / scale,
        torch.bfloat16 if dtype != torch.float32 else dtype,
    )


@pytest.mark.parametrize("dtype", DTYPES)
def test_activations_of_extreme_values(dtype: torch.dtype) -> None:
    gate = torch.tensor([[-1e30, -200.0, -88.0, -0.0, 0.0, 88.0, 1e30, float("nan")] * 4])
    x = torch.cat((gate, torch.ones_like(gate)), -1).to(dtype)
    expected = torch.nn.functional.silu(x[:, :32].float())
    actual = rows.silu_and_multiply(x).float()
    torch.testing.assert_close(actual, expected, rtol=1e-2, atol=1e-7, equal_nan=True)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("tokens", [0, 1, 7, 300])
@pytest.mark.parametrize("width", [1, 16, 33, 576])
@pytest.mark.parametrize("apart", [False, True])
@pytest.mark.parametrize("added", [False, True])
def test_norms(dtype: torch.dtype, tokens: int, width: int, apart: bool, added: bool) -> None:
    op = norm(width, dtype)
    x = values(tokens, width, dtype=dtype, apart=apart)
    residual = values(tokens, width, dtype=dtype) if added else None
    before = x.clone(), None if residual is None else residual.clone()
    expected = op.forward_native(x, residual)
    actual = ours(op)(x, residual)
    if added:
        assert torch.equal(actual[1], expected[1])
        assert torch.equal(residual, before[1])
        actual, expected = actual[0], expected[0]
    assert_close(actual, expected, dtype)
    assert torch.equal(x, before[0])


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("tokens", [0, 1, 7, 300])
@pytest.mark.parametrize("rotary_dim", [2, 8, 24])
def test_rotary_embeddings(dtype: torch.dtype, tokens: int, rotary_dim: int) -> None:
    op = rotary(rotary_dim, dtype)
    # As SGLang's models have them: slices of one fused projection, three heads and one.
    fused = torch.randn(tokens, 5 * 24).to(dtype)
    query, key, value = fused.split([72, 24, 24], -1)
    kept = value.clone()
    positions = torch.randint(0, 50, (tokens,))
    if tokens:
        expected = op.forward_native(positions, query, key)
        actual = ours(op)(positions, query, key)
        for one, other in zip(actual, expected, strict=True):
            assert_close(one, other, dtype)
    else:
        ours(op)(positions, query, key)
    assert torch.equal(value, kept)


def test_a_position_outside_of_the_cache_is_an_error_and_changes_nothing() -> None:
    query, key = torch.randn(2, 24), torch.randn(2, 24)
    kept = query.clone()
    with pytest.raises(IndexError, match="outside of the 50"):
        ours(rotary(24, torch.float32))(torch.tensor([0, 50]), query, key)
    assert torch.equal(query, kept)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("tokens", [0, 1, 300])
def test_keys_and_values_are_written_to_their_slots_only(dtype: torch.dtype, tokens: int) -> None:
    pools = [torch.randn(400, 3, 8).to(dtype) for _ in "kv"]
    expected = [pool.clone() for pool in pools]
    fused = torch.randn(tokens, 72).to(dtype)
    _, *parts = fused.split([24, 24, 24], -1)
    slots = torch.randperm(400)[:tokens]
    for pool, part in zip(expected, parts, strict=True):
        pool[slots] = part.reshape(-1, 3, 8)
    rows.store(*parts, *pools, slots)
    for pool, one in zip(pools, expected, strict=True):
        assert torch.equal(pool, one)


@pytest.mark.parametrize("slot", [-1, 4])
def test_a_slot_outside_of_the_pools_is_an_error_and_writes_nothing(slot: int) -> None:
    pools = [torch.zeros(4, 1, 8) for _ in "kv"]
    part = torch.ones(2, 8)
    with pytest.raises(IndexError, match="outside of the pools' 4"):
        rows.store(part, part, *pools, torch.tensor([1, slot]))
    assert not any(pool.any() for pool in pools)


def uncovered() -> list[Any]:
    class OwnRotary(RotaryEmbedding):  # type: ignore[misc]
        def forward_native(self, *args: Any, **kwargs: Any) -> Any:
            raise AssertionError

    interleaved = rotary(24, torch.float32)
    interleaved.is_neox_style = False
    pinned = operator(SiluAndMul)
    pinned._forward_method = pinned.forward_native
    return [
        norm(8, torch.float32, cast_x_before_out_mul=True),
        norm(8, torch.float32, variance_size_override=4),
        norm(8, torch.float32, fp32_residual=True),
        rotary(24, torch.float32, OwnRotary),
        interleaved,
        pinned,
    ]


@pytest.mark.parametrize("op", uncovered())
def test_operators_that_compute_something_else_are_left_to_sglang(op: Any) -> None:
    before = op._forward_method
    use_row_kernels(op)
    assert op._forward_method == before


def test_calls_that_are_not_covered_go_sglangs_way() -> None:
    op = norm(8, torch.float32)
    x = torch.randn(2, 3, 8)
    assert torch.equal(ours(op)(x), op.forward_native(x))
    x, residual, addend = torch.randn(3, 4, 8)
    expected = op.forward_native(x, residual, addend)
    actual = ours(norm(8, torch.float32, weight=op.weight))(x, residual, addend)
    assert all(torch.equal(a, b) for a, b in zip(actual, expected, strict=True))


def test_without_compiled_kernels_the_log_says_so(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(cpu, "unavailable_reason", lambda: "they were not built")
    op = operator(SiluAndMul)
    use_row_kernels(op)
    assert op._forward_method is None
    assert "run as SGLang's: they were not built" in caplog.text
