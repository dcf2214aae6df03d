"""The vision encoder's work in plans: paid once where a picture is shared."""

import numpy as np
import pytest

from blendserve.planner import (
    CostModel,
    EncoderWork,
    Job,
    MediaRuns,
    ModelSpec,
    PlannerConfig,
    hardware,
    make_plan,
    partition,
    predict,
)
from blendserve.planner.vision_shape import vision_shape

TEXT = {
    "model_type": "qwen2_vl",
    "hidden_size": 3584,
    "intermediate_size": 18944,
    "num_hidden_layers": 28,
    "num_attention_heads": 28,
    "num_key_value_heads": 4,
    "vocab_size": 152064,
    "max_position_embeddings": 32768,
}
QWEN2_VL = {
    "depth": 32,
    "embed_dim": 1280,
    "hidden_size": 3584,
    "mlp_ratio": 4,
    "patch_size": 14,
    "spatial_merge_size": 2,
    "temporal_patch_size": 2,
}
QWEN2_5_VL = {
    "model_type": "qwen2_5_vl",
    "depth": 32,
    "hidden_size": 1280,
    "intermediate_size": 3420,
    "out_hidden_size": 3584,
    "patch_size": 14,
    "window_size": 112,
    "fullatt_block_indexes": [7, 15, 23, 31],
    "spatial_merge_size": 2,
    "temporal_patch_size": 2,
}
SIGLIP = {
    "model_type": "siglip_vision_model",
    "hidden_size": 1152,
    "intermediate_size": 4304,
    "num_hidden_layers": 27,
    "patch_size": 14,
    "image_size": 896,
}
A100 = hardware("a100-80g-sxm")
MODEL = CostModel(ModelSpec.from_config(TEXT | {"vision_config": QWEN2_VL}), A100)
PICTURE, TOKENS, PATCHES = 1_500_000, 300, 1200


def job(pictures, questions, output=20):
    """Each picture with each question: 10 tokens, the picture, the question."""
    prompts, runs = [], []
    for picture in range(pictures):
        for question in range(questions):
            ids = [*range(10), *[PICTURE + picture] * TOKENS, *[2_000 + question] * 15]
            runs.append((len(prompts), 10 + TOKENS, PATCHES))
            prompts.append(np.array(ids, dtype=np.int32))
    lengths = np.full(len(prompts), output)
    media = MediaRuns(*np.array(runs, dtype=np.int64).reshape(-1, 3).T)
    return Job(prompts, lengths, lengths, media)


def without_pictures(of):
    return Job(of.token_ids, of.max_output_tokens, of.known_output_tokens)


@pytest.mark.parametrize(
    ("config", "millions"), [(QWEN2_VL, 642), (QWEN2_5_VL, 640), (SIGLIP, 412)]
)
def test_encoders_are_as_large_as_published(config, millions):
    """Without three quarters of the mergers, which work on four patches at a time."""
    shape = vision_shape({"vision_config": config})
    assert shape.params_per_patch / 1e6 == pytest.approx(millions, rel=0.01)


def test_the_reach_of_attention():
    whole, windowed = (vision_shape({"vision_config": config}) for config in (QWEN2_VL, QWEN2_5_VL))
    assert (whole.full_layers, whole.window, whole.reach) == (32, 0, 0)
    assert (windowed.full_layers, windowed.window) == (4, 64)
    assert vision_shape({"vision_config": SIGLIP}).reach == 64 * 64


@pytest.mark.parametrize("config", [{}, {"vision_config": None}, {"vision_config": {"a": 1}}])
def test_an_unknown_encoder_costs_nothing(config):
    assert vision_shape(config) is None
    model = CostModel(ModelSpec.from_config(TEXT | config), A100)
    assert model.encoder_seconds([5.0, 0.0]).tolist() == [0.0, 0.0]


def test_seconds_of_a_picture():
    params = MODEL.model.vision.params_per_patch
    flops = 2 * params * PATCHES + 4 * 32 * 1280 * PATCHES**2
    assert float(MODEL.encoder_seconds(PATCHES)) == pytest.approx(flops / A100.compute_flops)


def test_a_shared_picture_is_paid_once():
    asked = job(pictures=6, questions=8)
    plan, plain = make_plan(asked, MODEL), make_plan(without_pictures(asked), MODEL)
    assert plan.sharing_planned == plan.sharing_best
    once = 6 * float(MODEL.encoder_seconds(PATCHES))
    more = plan.compute_seconds.sum() - plain.compute_seconds.sum()
    assert more == pytest.approx(once)
    # Equal parts for those that share it.
    assert plan.compute_seconds.std() < 0.01 * plan.compute_seconds.mean()


def test_the_encoder_makes_lines_dense():
    asked = job(pictures=6, questions=1)
    plan, plain = make_plan(asked, MODEL), make_plan(without_pictures(asked), MODEL)
    assert plan.density.min() > 1.2 * plain.density.max()


def test_a_prefix_that_ends_within_a_picture_saves_no_encoder():
    encoder = EncoderWork.of(MODEL, job(pictures=1, questions=2).media)
    requests = np.array([0, 1, 1, 1])
    found = encoder.within(requests, np.array([325, 9, 309, 310]))
    one = float(MODEL.encoder_seconds(PATCHES))
    assert found == pytest.approx([one, 0.0, 0.0, one])


def test_several_pictures_in_a_prompt_add_up():
    media = MediaRuns(np.array([1, 1, 3]), np.array([100, 250, 90]), np.array([400, 800, 100]))
    encoder = EncoderWork.of(MODEL, media)
    a, b, c = MODEL.encoder_seconds(media.patches).tolist()
    found = encoder.within(np.arange(4), np.full(4, 1_000))
    assert found == pytest.approx([0.0, a + b, 0.0, c])
    assert encoder.within(np.array([1]), np.array([249])) == pytest.approx([a])


def test_what_is_left_of_a_job_keeps_its_pictures():
    asked = job(pictures=6, questions=8)
    whole = make_plan(asked, MODEL)
    rest = make_plan(asked, MODEL, exclude=range(8), tree=whole.tree)
    assert rest.compute_seconds.sum() == pytest.approx(
        whole.compute_seconds.sum() * 5 / 6, rel=0.01
    )


def test_replicas_and_predictions_pay_for_pictures():
    asked = job(pictures=12, questions=8)
    plan = make_plan(asked, MODEL, PlannerConfig())
    one = float(MODEL.encoder_seconds(PATCHES))
    for part in partition(plan, 2, MODEL).plans:
        alone = MODEL.compute_seconds(np.full(len(part.order), 10 + TOKENS + 15), 20.0).sum()
        alone -= MODEL.prefill_seconds_saved(part.shared_with_previous).sum()
        pictures = len(set(part.order // 8))
        assert part.compute_seconds.sum() == pytest.approx(alone + pictures * one)
    prediction = predict(plan, MODEL, 100_000.0)
    assert prediction.bound_seconds == pytest.approx(plan.compute_seconds.sum(), rel=0.01)
    run = prediction.blend[0]
    assert run.compute_seconds.sum() == pytest.approx(plan.compute_seconds.sum(), rel=0.02)
