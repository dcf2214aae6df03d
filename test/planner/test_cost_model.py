"""Costs against numbers worked out by hand, and configs of many kinds of model."""

import json
import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from planner_workloads import LLAMA_ON_A100

from blendserve.planner import (
    HARDWARE,
    MODEL_SPECS,
    CostModel,
    Hardware,
    HardwareError,
    ModelSpec,
    ModelSpecError,
    UnknownHardwareError,
    hardware,
    model_spec,
)

BASE = {
    "model_type": "llama",
    "hidden_size": 64,
    "intermediate_size": 256,
    "num_hidden_layers": 2,
    "num_attention_heads": 8,
    "num_key_value_heads": 2,
    "vocab_size": 1000,
    "max_position_embeddings": 512,
    "tie_word_embeddings": False,
}


def test_llama_8b_has_its_published_sizes():
    spec = MODEL_SPECS["llama-3.1-8b"]
    assert spec.total_params == 8_030_261_248
    assert spec.params_per_token == 8_030_261_248 - 128_256 * 4096
    assert spec.kv_bytes_per_token == 8 * 128 * 32 * 2 * 2
    assert spec.weight_bytes == 2 * spec.total_params


def test_smollm2_ties_its_embeddings():
    spec = MODEL_SPECS["smollm2-135m"]
    assert spec.total_params == spec.params_per_token == 134_515_008
    assert spec.weight_bytes == 4 * 134_515_008
    assert spec.kv_bytes_per_token == 2 * 3 * 64 * 30 * 4
    assert spec.context_length == 8192


def test_llama_8b_on_a100_by_hand():
    """p = 1000, d = 100: 1100 * 2 * 7,504,924,672 = 16.511 TFLOP of GEMM and
    4 * 10^6 * 4096 * 32 = 0.524 TFLOP of attention, at 312 TFLOP/s; 105,000 token reads of
    131,072 bytes at 2.039 TB/s."""
    assert float(LLAMA_ON_A100.compute_seconds(1000, 100)) == pytest.approx(54.600e-3, rel=1e-4)
    assert float(LLAMA_ON_A100.memory_seconds(1000, 100)) == pytest.approx(6.7497e-3, rel=1e-4)
    assert float(LLAMA_ON_A100.density(1000, 100)) == pytest.approx(8.0893, rel=1e-4)
    saved = float(LLAMA_ON_A100.prefill_seconds_saved(1000))
    assert saved == pytest.approx((2 * 7_504_924_672e3 + 4e6 * 4096 * 32) / 312e12)


def test_attention_dominates_very_long_prompts():
    p = np.array([1_000, 128_000])
    gemm = p * 2 * 7_504_924_672 / 312e12
    assert (LLAMA_ON_A100.compute_seconds(p, 0) / gemm).round(2).tolist() == [1.03, 5.47]


def test_requests_without_decode_have_infinite_density():
    assert LLAMA_ON_A100.density(np.array([10, 0, 10]), np.array([0, 0, 1])).tolist()[:2] == [
        math.inf,
        math.inf,
    ]
    assert np.isfinite(LLAMA_ON_A100.density(10, 1))


@given(st.integers(0, 131_072), st.integers(0, 131_072))
def test_sharing_never_saves_more_than_the_prompt_costs(p, d):
    compute = float(LLAMA_ON_A100.compute_seconds(p, d))
    assert 0 <= float(LLAMA_ON_A100.prefill_seconds_saved(p)) <= compute


def test_grouped_query_heads_shrink_the_cache():
    assert ModelSpec.from_config(BASE).kv_bytes_per_token == 2 * 2 * 8 * 2 * 2
    multi_query = {k: v for k, v in BASE.items() if k != "num_key_value_heads"}
    assert ModelSpec.from_config(multi_query).num_kv_heads == 8
    assert ModelSpec.from_config({**multi_query, "multi_query": True}).num_kv_heads == 1


def test_quantised_weights_and_cache():
    plain = ModelSpec.from_config(BASE)
    fp8 = ModelSpec.from_config({**BASE, "quantization_config": {"quant_method": "fp8"}})
    tables = 2 * 1000 * 64
    assert fp8.weight_bytes == (plain.total_params - tables) + 2 * tables
    assert fp8.kv_bytes_per_token == plain.kv_bytes_per_token
    small = ModelSpec.from_config(BASE, weight_bytes_per_param=0.5, kv_bytes_per_element=1)
    assert small.weight_bytes == round(plain.total_params / 2)
    assert small.kv_bytes_per_token == plain.kv_bytes_per_token / 2


def test_mixtral_counts_two_of_eight_experts():
    spec = ModelSpec.from_config(
        {
            "model_type": "mixtral",
            "hidden_size": 4096,
            "intermediate_size": 14336,
            "num_hidden_layers": 32,
            "num_attention_heads": 32,
            "num_key_value_heads": 8,
            "num_local_experts": 8,
            "num_experts_per_tok": 2,
            "vocab_size": 32000,
            "max_position_embeddings": 32768,
            "tie_word_embeddings": False,
        }
    )
    assert spec.total_params == 46_702_792_704
    assert spec.params_per_token == pytest.approx(12.88e9 - 32000 * 4096, rel=1e-3)


def test_qwen_moe_has_shared_experts():
    spec = ModelSpec.from_config(
        {
            "model_type": "qwen2_moe",
            "hidden_size": 2048,
            "intermediate_size": 5632,
            "moe_intermediate_size": 1408,
            "shared_expert_intermediate_size": 5632,
            "num_experts": 60,
            "num_experts_per_tok": 4,
            "decoder_sparse_step": 1,
            "num_hidden_layers": 24,
            "num_attention_heads": 16,
            "num_key_value_heads": 16,
            "vocab_size": 151936,
            "max_position_embeddings": 8192,
            "tie_word_embeddings": False,
        }
    )
    assert spec.total_params == pytest.approx(14.3e9, rel=0.01)
    assert spec.params_per_token == pytest.approx(2.7e9 - 151936 * 2048, rel=0.03)


def test_deepseek_v3_uses_latent_attention():
    spec = ModelSpec.from_config(
        {
            "model_type": "deepseek_v3",
            "hidden_size": 7168,
            "intermediate_size": 18432,
            "moe_intermediate_size": 2048,
            "num_hidden_layers": 61,
            "num_attention_heads": 128,
            "num_key_value_heads": 128,
            "n_routed_experts": 256,
            "n_shared_experts": 1,
            "num_experts_per_tok": 8,
            "first_k_dense_replace": 3,
            "kv_lora_rank": 512,
            "q_lora_rank": 1536,
            "qk_nope_head_dim": 128,
            "qk_rope_head_dim": 64,
            "v_head_dim": 128,
            "vocab_size": 129280,
            "max_position_embeddings": 163840,
            "torch_dtype": "bfloat16",
            "tie_word_embeddings": False,
        }
    )
    assert spec.total_params == pytest.approx(671e9, rel=0.001)
    assert spec.params_per_token == pytest.approx(37.55e9 - 129280 * 7168, rel=0.005)
    assert spec.kv_bytes_per_token == (512 + 64) * 61 * 2


def test_gpt2_spells_its_keys_differently():
    spec = ModelSpec.from_config(
        {
            "model_type": "gpt2",
            "n_embd": 768,
            "n_layer": 12,
            "n_head": 12,
            "vocab_size": 50257,
            "n_positions": 1024,
            "torch_dtype": "float32",
        }
    )
    assert spec.total_params == pytest.approx(124.4e6 - 1024 * 768, rel=1e-2)
    assert spec.context_length == 1024


def test_a_nested_text_config_and_a_folder_are_followed(tmp_path):
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "x", "text_config": BASE}))
    nested = ModelSpec.from_config(tmp_path)
    assert nested.total_params == ModelSpec.from_config(BASE).total_params
    assert model_spec(tmp_path / "config.json") == nested
    assert model_spec("SmolLM2-135M") is MODEL_SPECS["smollm2-135m"]


@pytest.mark.parametrize(
    "key",
    ["hidden_size", "num_hidden_layers", "num_attention_heads", "intermediate_size", "vocab_size"],
)
def test_a_missing_key_is_named_with_its_file(tmp_path, key):
    path = tmp_path / "config.json"
    path.write_text(json.dumps({k: v for k, v in BASE.items() if k != key}))
    with pytest.raises(ModelSpecError, match=rf"config\.json.*'{key}'.*add it"):
        ModelSpec.from_config(path)


def test_unreadable_configs_are_refused(tmp_path):
    with pytest.raises(ModelSpecError, match=r"no such file.*smollm2-135m"):
        ModelSpec.from_config(tmp_path)
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(ModelSpecError, match="not valid JSON"):
        ModelSpec.from_config(tmp_path)
    (tmp_path / "config.json").write_text("[]")
    with pytest.raises(ModelSpecError, match="JSON object"):
        ModelSpec.from_config(tmp_path)
    with pytest.raises(ModelSpecError, match="'hidden_size' must be a whole number"):
        ModelSpec.from_config({**BASE, "hidden_size": "64"})
    with pytest.raises(ModelSpecError, match="add head_dim"):
        ModelSpec.from_config({**BASE, "num_attention_heads": 7})
    with pytest.raises(ModelSpecError, match="'complex64' is unknown"):
        ModelSpec.from_config({**BASE, "torch_dtype": "complex64"})


def test_hardware_rows_say_where_they_are_from():
    for name, row in HARDWARE.items():
        assert row.name == name
        assert len(row.source) > 20
    two = hardware("A100-80G-SXM").scaled(2)
    assert (two.compute_flops, two.memory_bytes) == (624e12, 160e9)
    one = CostModel(MODEL_SPECS["llama-3.1-8b"], HARDWARE["a100-80g-sxm"])
    both = CostModel(MODEL_SPECS["llama-3.1-8b"], two)
    assert both.density(500, 50) == pytest.approx(one.density(500, 50))


@pytest.mark.parametrize(("ranks", "copies"), [(1, 1), (2, 1), (4, 2), (8, 4)])
def test_ranks_beyond_the_kv_heads_keep_copies(ranks, copies):
    """BASE has two KV heads: on 4 ranks each is kept twice, and read twice."""
    spec, device = ModelSpec.from_config(BASE), HARDWARE["a100-80g-sxm"]
    one, many = CostModel(spec, device), CostModel.tensor_parallel(spec, device, ranks)
    assert many.compute_seconds(500, 50) == pytest.approx(one.compute_seconds(500, 50) / ranks)
    assert many.memory_seconds(500, 50) == pytest.approx(
        one.memory_seconds(500, 50) * copies / ranks
    )
    assert many.model.weight_bytes == spec.weight_bytes


def test_every_rank_keeps_the_latent_of_mla():
    config = {
        **BASE,
        "kv_lora_rank": 32,
        "qk_nope_head_dim": 8,
        "qk_rope_head_dim": 4,
        "v_head_dim": 8,
    }
    spec = ModelSpec.from_config(config)
    assert spec.kv_bytes_per_token == (32 + 4) * 2 * 2
    eight = CostModel.tensor_parallel(spec, HARDWARE["a100-80g-sxm"], 8)
    one = CostModel(spec, HARDWARE["a100-80g-sxm"])
    assert eight.memory_seconds(500, 50) == pytest.approx(one.memory_seconds(500, 50))


def test_an_unknown_device_names_the_nearest():
    with pytest.raises(UnknownHardwareError, match=r"valid names are .*l40s.*'h100-80g-sxm'"):
        hardware("h100-80g-sxn")
    with pytest.raises(ValueError, match="ranks"):
        HARDWARE["cpu"].scaled(0)
    with pytest.raises(ValueError, match="bandwidth_bytes must be positive"):
        Hardware("x", 1.0, 0.0, 1.0, "nowhere")


def written(tmp_path, document):
    path = tmp_path / "measured.json"
    path.write_text(document if isinstance(document, str) else json.dumps(document))
    return str(path)


def test_measured_ceilings_stand_in_for_the_table(tmp_path):
    figures = {"compute_flops": 2.5e14, "bandwidth_bytes": 1.7e12, "memory_bytes": 7.9e10}
    found = hardware(written(tmp_path, figures))
    assert (found.compute_flops, found.bandwidth_bytes, found.memory_bytes) == (
        2.5e14,
        1.7e12,
        7.9e10,
    )
    assert "measured.json" in found.source
    # A benchmark's results may be handed over whole, and the rest comes from a row.
    measured = {"base": "A100-80G-SXM", "compute_flops": 2.5e14, "source": "cuBLAS, bf16"}
    found = hardware(written(tmp_path, {"command": "x", "hardware": measured}))
    base = HARDWARE["a100-80g-sxm"]
    assert (found.compute_flops, found.bandwidth_bytes) == (2.5e14, base.bandwidth_bytes)
    assert found.source.startswith("cuBLAS, bf16; bandwidth_bytes, memory_bytes: NVIDIA A100")
    fast, slow = (CostModel(MODEL_SPECS["llama-3.1-8b"], row) for row in (base, found))
    assert slow.density(500, 50) == pytest.approx(fast.density(500, 50) * 312 / 250)


@pytest.mark.parametrize(
    ("document", "message"),
    [
        ("{", "not valid JSON"),
        ("[1]", "must hold an object"),
        ({"base": "cpu", "compute_flop": 1}, "'compute_flop'; did you mean 'compute_flops'"),
        ({"base": "v100"}, "base 'v100' is unknown; use one of a10, .*a100-80g-sxm"),
        ({"base": 7}, "base is 7; it must be a text"),
        ({"compute_flops": 1e12, "memory_bytes": 1e9}, "bandwidth_bytes is missing; add it"),
        ({"base": "cpu", "compute_flops": -1}, "compute_flops is -1; it must be a positive"),
        ({"base": "cpu", "compute_flops": True}, "compute_flops is True; it must be a positive"),
        ({"base": "cpu", "kernels": "gone.npz"}, "kernels: .*gone.npz is no file of kernel times"),
        ({"base": "cpu", "kernels": "measured.json"}, "or leave the key away"),
    ],
)
def test_a_file_of_figures_that_cannot_be_used_is_refused(tmp_path, document, message):
    with pytest.raises(HardwareError, match=message):
        hardware(written(tmp_path, document))


def test_a_file_of_figures_that_is_not_there_is_named():
    with pytest.raises(HardwareError, match=r"absent\.json: No such file"):
        hardware("absent.json")
