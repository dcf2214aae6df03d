"""Weights packed once: the same products, the way back for updates, and memory let go."""

from __future__ import annotations

import weakref
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch.nn import functional

from blendserve.runtime.cpu_platform import activate, needs_cpu_engine

if not needs_cpu_engine():
    pytest.skip("SGLang's CPU engine is for CPUs", allow_module_level=True)
activate()

from sglang.srt.layers.linear import (  # noqa: E402
    ColumnParallelLinear,
    ReplicatedLinear,
    RowParallelLinear,
)
from sglang.srt.layers.logits_processor import LogitsProcessor  # noqa: E402
from sglang.srt.layers.quantization.unquant import (  # noqa: E402
    UnquantizedEmbeddingMethod,
    UnquantizedLinearMethod,
)
from sglang.srt.layers.vocab_parallel_embedding import (  # noqa: E402
    ParallelLMHead,
    VocabParallelEmbedding,
)

from blendserve.runtime import packed_weights  # noqa: E402
from blendserve.runtime.packed_weights import PackedModel, pack, pack_model, product  # noqa: E402

TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 1e-2}


def dtypes() -> list[torch.dtype]:
    return [dtype for dtype in TOLERANCE if packed_weights.unavailable_reason(dtype) is None]


def module(kind: type[Any], weight: torch.Tensor, method: Any) -> Any:
    """One of SGLang's layers as far as its product goes, without its process groups."""
    layer = kind.__new__(kind)
    torch.nn.Module.__init__(layer)
    layer.weight = torch.nn.Parameter(weight, requires_grad=False)
    layer.weight.output_dim = 0
    layer.quant_method = method()
    return layer


class Model(torch.nn.Module):
    """Two layers, a router and a head, which may be the embedding itself or share its weight."""

    def __init__(self, head: str, dtype: torch.dtype = torch.float32) -> None:
        super().__init__()
        torch.manual_seed(0)
        new = lambda *size: torch.randn(*size).to(dtype)  # noqa: E731
        self.up = module(ColumnParallelLinear, new(33, 20), UnquantizedLinearMethod)
        self.down = module(RowParallelLinear, new(20, 33), UnquantizedLinearMethod)
        self.router = module(ReplicatedLinear, new(4, 20), UnquantizedLinearMethod)
        self.embed = module(VocabParallelEmbedding, new(101, 20), UnquantizedEmbeddingMethod)
        self.lm_head = self.embed
        if head != "embedding":
            self.lm_head = module(ParallelLMHead, new(101, 20), UnquantizedEmbeddingMethod)
        if head == "shared":
            self.lm_head.weight = self.embed.weight
        self.logits = LogitsProcessor.__new__(LogitsProcessor)
        torch.nn.Module.__init__(self.logits)
        self.logits.use_fp32_lm_head = False
        self.logits.rl_on_policy_target = None

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        """Logits, by the calls that SGLang's layers make."""
        x = self.embed.quant_method.embedding(self.embed, ids)
        x = self.up.quant_method.apply(self.up, x, None)
        x = self.down.quant_method.apply(self.down, x, None)
        x = x + functional.linear(x, self.router.weight).sum(-1, keepdim=True)
        return self.logits._compute_lm_head(x, self.lm_head)

    def load_weights(self, weights: Any) -> None:
        """As SGLang's models do: into a part of a parameter, found by its attributes."""
        for name, weight in weights:
            parameter = dict(self.named_parameters())[name]
            half = weight.shape[0] // 2
            for start, length in ((0, half), (half, weight.shape[0] - half)):
                part = parameter.data.narrow(parameter.output_dim, start, length)
                part.copy_(weight[start : start + length])


def runner(model: Model, dtype: torch.dtype = torch.float32, **changes: Any) -> Any:
    return SimpleNamespace(
        **{"device": "cpu", "model": model, "dtype": dtype, "is_generation": True, **changes}
    )


@pytest.mark.parametrize("dtype", dtypes())
@pytest.mark.parametrize("shape", [(33, 20), (1, 7), (576, 64), (1001, 129)])
@pytest.mark.parametrize("biased", [False, True])
@pytest.mark.parametrize("tokens", [0, 1, 7, 512])
def test_a_product_with_a_packed_weight_is_that_with_the_plain_one(
    dtype: torch.dtype, shape: tuple[int, int], biased: bool, tokens: int
) -> None:
    torch.manual_seed(tokens)
    weight, x = torch.randn(shape).to(dtype), torch.randn(tokens, shape[1]).to(dtype)
    bias = torch.randn(shape[0]).to(dtype) if biased else None
    expected = functional.linear(
        x.double(), weight.double(), None if bias is None else bias.double()
    )
    actual = product(x, pack(weight), bias)
    assert actual.dtype == dtype
    assert actual.shape == expected.shape
    scale = float(expected.abs().max()) if tokens else 1.0
    assert torch.allclose(actual.double(), expected, rtol=0, atol=TOLERANCE[dtype] * scale)


@pytest.mark.parametrize("dtype", dtypes())
@pytest.mark.parametrize("shape", [(33, 20), (1, 7), (1001, 129)])
def test_the_plain_weight_comes_back_bit_for_bit(
    dtype: torch.dtype, shape: tuple[int, int]
) -> None:
    weight = torch.randn(shape).to(dtype)
    assert torch.equal(pack(weight).to_dense(), weight)


@pytest.mark.parametrize("dtype", dtypes())
@pytest.mark.parametrize("head", ["own", "embedding", "shared"])
def test_a_packed_model_gives_the_logits_of_the_plain_one(head: str, dtype: torch.dtype) -> None:
    ids = torch.arange(9)
    expected = Model(head, dtype)(ids)
    model = Model(head, dtype)
    pack_model(runner(model, dtype))
    packed = model.packed_weights
    assert (len(packed.linears), len(packed.heads)) == (2, 1)
    scale = float(expected.abs().max())
    assert torch.allclose(model(ids), expected, rtol=0, atol=TOLERANCE[dtype] * scale)


@pytest.mark.parametrize(("head", "doubled"), [("own", 0), ("embedding", 8080), ("shared", 8080)])
def test_only_a_weight_that_is_also_the_embedding_is_kept_twice(head: str, doubled: int) -> None:
    model = Model(head)
    plain = [weakref.ref(layer.weight) for layer in (model.up, model.down)]
    if head == "own":
        plain.append(weakref.ref(model.lm_head.weight))
    pack_model(runner(model))
    assert [weight() for weight in plain] == [None] * len(plain)
    assert model.packed_weights.doubled_bytes == doubled
    assert model.packed_weights.packed_bytes == 4 * (2 * 33 * 20 + 101 * 20)
    assert model.embed.weight.layout == torch.strided


def test_routers_and_layers_that_are_no_matrices_are_left_alone() -> None:
    model = Model("own")
    model.conv = module(ColumnParallelLinear, torch.randn(8, 1, 4), UnquantizedLinearMethod)
    pack_model(runner(model))
    for layer in (model.router, model.conv, model.embed):
        assert layer.weight.layout == torch.strided


@pytest.mark.parametrize("head", ["own", "embedding", "shared"])
@pytest.mark.parametrize("direct", [False, True])
def test_new_weights_are_loaded_as_into_a_plain_model(head: str, direct: bool) -> None:
    from sglang.srt.model_executor.model_runner_components import weight_updater

    ids = torch.arange(9)
    torch.manual_seed(1)
    new = {name: torch.randn_like(p) for name, p in Model(head).named_parameters()}
    expected_model = Model(head)
    expected_model.load_weights(new.items())
    model = Model(head)
    pack_model(runner(model))
    if direct:
        load = weight_updater._model_load_weights_direct
        packed_weights._load_directly(load, model, list(new.items()))
    else:
        model.load_weights(new.items())
    assert model.up.weight.layout != torch.strided
    assert torch.allclose(model(ids), expected_model(ids), rtol=1e-4, atol=1e-3)


def test_weights_are_packed_again_after_a_failed_update() -> None:
    model = Model("own")
    pack_model(runner(model))
    with pytest.raises(KeyError):
        model.load_weights([("gone", torch.zeros(1))])
    assert model.up.weight.layout != torch.strided
    assert model.up.weight.output_dim == 0


def test_a_model_without_logits_gets_no_packed_head() -> None:
    model = Model("embedding")
    pack_model(runner(model, is_generation=False))
    assert model.packed_weights.heads == []


def test_logits_that_are_computed_in_another_type_are_left_to_sglang() -> None:
    model = Model("embedding")
    model.logits.use_fp32_lm_head = True
    pack_model(runner(model))
    assert model.packed_weights.heads == []


def test_without_the_operators_the_model_stays_plain_and_the_log_says_so(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(torch.backends.mkldnn, "is_available", lambda: False)
    model = Model("own")
    pack_model(runner(model))
    assert not hasattr(model, "packed_weights")
    assert model.up.weight.layout == torch.strided
    assert "was built without oneDNN's linear operators" in caplog.text


def test_a_type_without_a_packed_product_stays_plain(caplog: pytest.LogCaptureFixture) -> None:
    model = Model("own", torch.float16)
    pack_model(runner(model, torch.float16))
    assert model.up.weight.layout == torch.strided
    assert "no packed product for torch.float16" in caplog.text


def test_a_layer_that_sglang_packed_for_amx_is_left_alone() -> None:
    model = Model("own")
    model.up.use_intel_amx_backend = True
    pack_model(runner(model))
    assert model.up.weight.layout == torch.strided
    assert model.down.weight.layout != torch.strided


def test_nothing_happens_on_an_accelerator() -> None:
    model = Model("own")
    pack_model(runner(model, device="cuda"))
    assert not hasattr(model, "packed_weights")


def test_nested_readers_see_plain_weights_until_the_last_has_left() -> None:
    packed = PackedModel(Model("own"), with_head=True)
    with packed.plain():
        with packed.plain():
            pass
        assert packed.model.up.weight.layout == torch.strided
    assert packed.model.up.weight.layout != torch.strided
