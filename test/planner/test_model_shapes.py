"""Models whose layers are not all of full attention, and those that are not known."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from public_configs import (
    DEEPSEEK_V3,
    GEMMA_3_27B,
    GPT_OSS_20B,
    LLAMA_4_SCOUT,
    QWEN3_NEXT_80B,
)

from blendserve.planner import CostModel, ModelSpec, hardware, kv_capacity_tokens, step_costs
from blendserve.planner.cost_model import window_reads


@pytest.mark.parametrize(
    ("config", "billions", "active", "full", "windowed", "window"),
    [
        (GPT_OSS_20B, 20.9, 3.6, 12, 12, 128),
        (GEMMA_3_27B, 27.0, 27.0, 10, 52, 1_024),
        (LLAMA_4_SCOUT, 107.8, 16.1, 12, 36, 8_192),
        (QWEN3_NEXT_80B, 79.7, 3.6, 12, 0, 0),
    ],
)
def test_layers_that_reach_only_so_far_back_keep_and_read_less(
    config: dict[str, Any], billions: float, active: float, full: int, windowed: int, window: int
) -> None:
    spec = ModelSpec.from_config(config)
    assert spec.caveats == ()
    assert spec.total_params / 1e9 == pytest.approx(billions, rel=0.02)
    assert spec.params_per_token / 1e9 == pytest.approx(active, rel=0.06)
    layer = 2 * spec.num_kv_heads * spec.head_dim * 2
    assert spec.kv_bytes_per_token == full * layer
    assert spec.window_kv_bytes_per_token == windowed * layer
    assert spec.window_tokens == window


def test_gpt_oss_holds_and_reads_half_at_long_contexts() -> None:
    """SGLang's pool for windows has 0.8 times the tokens; a decode at 10,000 tokens of context
    reads 10,000 in twelve layers and 128 in the others."""
    spec = ModelSpec.from_config(GPT_OSS_20B)
    layer = 2 * 8 * 64 * 2
    assert spec.pool_bytes_per_token == pytest.approx(12 * layer + 0.8 * 12 * layer)
    datasheet = CostModel(spec, hardware("h100"))
    reads = 10_000 * 200 + 200**2 / 2
    expected = (reads * 12 + 128 * 200 * 12) * layer / 3.35e12
    assert float(datasheet.memory_seconds(10_000, 200)) == pytest.approx(expected)
    costs = step_costs(spec, hardware("h100"))
    moved = 12 * layer * (50 * 10_000 + 50 * 128)
    kv = costs.traffic_seconds(50, 50, 500_000.0) - costs.traffic_seconds(50, 50, 0.0)
    assert kv == pytest.approx(moved / (0.93 * 3.35e12))
    assert "fitted" not in costs.source.replace("fitted: GEMMs of mxfp4", "")


def test_gemma_keeps_all_tokens_of_its_windows() -> None:
    """SGLang has no pool of its own for them, so capacity counts every layer."""
    spec = ModelSpec.from_config(GEMMA_3_27B)
    assert spec.pool_bytes_per_token == 62 * 2 * 16 * 128 * 2
    free = 0.9 * 80e9 - spec.weight_bytes
    capacity = kv_capacity_tokens(CostModel(spec, hardware("a100")))
    assert capacity == int(free / spec.pool_bytes_per_token)


def test_qwen3_next_reads_a_state_of_fixed_size_for_most_layers() -> None:
    spec = ModelSpec.from_config(QWEN3_NEXT_80B)
    assert spec.state_bytes == 36 * 32 * 128 * 128 * 4
    costs = CostModel(spec, hardware("h200"))
    short, long = (float(costs.memory_seconds(prompt, 100)) for prompt in (0, 30_000))
    layer = 2 * 2 * 256 * 2
    assert long - short == pytest.approx(30_000 * 100 * 12 * layer / 4.8e12)
    assert short == pytest.approx((100**2 / 2 * 12 * layer + 200 * spec.state_bytes) / 4.8e12)


def test_a_lone_token_of_deepseek_reads_its_experts_only() -> None:
    """37.55 of 671 billion parameters, as their authors say, less the embedding table; hundreds of
    tokens read nearly all."""
    spec = ModelSpec.from_config(DEEPSEEK_V3)
    costs = step_costs(spec, hardware("h200"), 8)
    bandwidth = 8 * 0.93 * 4.8e12
    alone, many = (costs.traffic_seconds(n, 0, 0.0) * bandwidth for n in (1, 2_000))
    assert alone / 1e9 == pytest.approx(37.55 - 0.93, rel=0.01)
    assert many / 1e9 == pytest.approx(671 - 0.93, rel=0.01)
    assert costs.token_seconds(1) < costs.token_seconds(128)
    assert spec.weight_dtype == "fp8_block"


def test_reads_within_a_window_by_hand() -> None:
    """2 + 3 + 4 + 4 + 4 tokens, as integrals: from 1.5 to 4 in 2.5 steps, then 4."""
    whole = np.array([1.5]), np.array([5.0])
    assert window_reads(*whole, 4) == pytest.approx([(1.5 + 4) / 2 * 2.5 + 4 * 2.5])
    assert window_reads(np.array([9.0]), np.array([5.0]), 4) == pytest.approx([20.0])
    assert window_reads(np.array([1.0]), np.array([2.0]), 4) == pytest.approx([1.0 * 2 + 2.0])


@pytest.mark.parametrize(
    ("more", "says"),
    [
        ({"model_type": "jamba"}, "model_type jamba is not known"),
        ({"model_type": "deepseek_v32", "index_topk": 2_048}, "index_topk is not known"),
        ({"layer_types": ["mamba", "full_attention"] * 12}, "layers of type mamba is not known"),
    ],
)
def test_what_is_not_known_is_said(more: dict[str, Any], says: str) -> None:
    spec = ModelSpec.from_config({**GPT_OSS_20B, **more})
    assert says in " ".join(spec.caveats)
    assert "counted as if" in spec.caveats[0]
