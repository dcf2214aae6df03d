"""What no request may hold: it would end a scheduler, and is refused with its field named."""

from __future__ import annotations

from array import array
from types import SimpleNamespace
from typing import Any

import msgspec
import pytest
from sglang.srt.managers.io_struct import (
    EmbeddingReqInput,
    GenerateReqInput,
    TokenizedEmbeddingReqInput,
    TokenizedGenerateReqInput,
)
from sglang.srt.sampling.sampling_params import SamplingParams

from blendserve.runtime.request_checks import (
    REQUEST_NUMBERS,
    REQUEST_PLACES,
    REQUEST_TOKENS,
    SAMPLING_NUMBERS,
    SAMPLING_TOKENS,
    ModelLimits,
    check_before,
    check_tokenized,
    checked,
)

LIMITS = ModelLimits(vocab_size=1000, context_length=4096, prompt_tokens=40)
NAN = float("nan")


def request(prompt: list[int] | None = None, *, params: Any = None, **fields: Any) -> Any:
    sampling = SamplingParams(**{"max_new_tokens": 8, **(params or {})})
    sampling.normalize(SimpleNamespace(encode=lambda text, **_: list(text)))
    return TokenizedGenerateReqInput(
        **{
            "rid": "r",
            "input_text": "a",
            "input_ids": array("q", [1, 2] if prompt is None else prompt),
            "input_embeds": None,
            "mm_inputs": None,
            "token_type_ids": None,
            "sampling_params": sampling,
            "return_logprob": False,
            "logprob_start_len": -1,
            "top_logprobs_num": 0,
            "token_ids_logprob": None,
            "stream": False,
            **fields,
        }
    )


def test_the_tables_name_fields_that_sglang_has():
    of_params = {*SAMPLING_NUMBERS, *SAMPLING_TOKENS}
    of_request = {*REQUEST_NUMBERS, *REQUEST_TOKENS, *REQUEST_PLACES}
    assert of_params <= set(SamplingParams.__struct_fields__)
    assert of_request <= set(TokenizedGenerateReqInput.__struct_fields__)


@pytest.mark.parametrize(
    ("params", "name"),
    [
        ({"temperature": 1e39}, "temperature"),
        ({"temperature": NAN}, "temperature"),
        ({"top_p": 5e-324}, "top_p"),
        ({"top_k": 2**31}, "top_k"),
        ({"min_p": NAN}, "min_p"),
        ({"frequency_penalty": NAN}, "frequency_penalty"),
        ({"repetition_penalty": 1e-30}, "repetition_penalty"),
        ({"min_new_tokens": 2**31, "max_new_tokens": None}, "min_tokens"),
        ({"max_new_tokens": 2**60}, "max_tokens"),
        ({"n": 129}, "n must"),
        ({"beam_width": 1000}, "beam_width"),
        ({"stream_interval": -1}, "stream_interval"),
        ({"stream_interval": 0}, "stream_interval"),
        ({"stop_token_ids": [1000]}, "stop_token_ids"),
        ({"stop_token_ids": [-1]}, "stop_token_ids"),
        ({"logit_bias": {"5": 1e300}}, "logit_bias"),
        ({"logit_bias": {"5": NAN}}, "logit_bias"),
        ({"logit_bias": {"5": "much"}}, "logit_bias"),
        ({"logit_bias": {"1000": 1.0}}, "logit_bias"),
        ({"logit_bias": {"-1": 1.0}}, "logit_bias"),
        ({"stop_regex": "(?<=a+)b"}, "stop_regex"),
        ({"custom_params": {"deep": [[[1]]]}}, "wrong type"),
        ({"spaces_between_special_tokens": "x"}, "wrong type"),
        ({"skip_special_tokens": [1]}, "wrong type"),
        ({"ignore_eos": "x"}, "wrong type"),
    ],
)
def test_sampling_parameters_that_end_a_scheduler_are_refused(params, name):
    with pytest.raises(ValueError, match=name):
        check_tokenized(request(params=params), LIMITS)


@pytest.mark.parametrize(
    ("fields", "name"),
    [
        ({"prompt": []}, "prompt is empty"),
        ({"prompt": [1] * 40}, "40 tokens; this server takes fewer than 40"),
        ({"return_logprob": True, "top_logprobs_num": 1001}, "top_logprobs"),
        ({"top_logprobs_num": -1}, "top_logprobs"),
        ({"logprob_start_len": -2}, "logprob_start_len"),
        ({"routed_experts_start_len": -1}, "routed_experts_start_len"),
        ({"priority": 2**31}, "priority"),
        ({"priority": "first"}, "priority"),
        ({"token_ids_logprob": [1000]}, "token_ids_logprob"),
        ({"token_ids_logprob": [-1]}, "token_ids_logprob"),
        ({"token_indices_to_pool": [2]}, "token_indices_to_pool"),
        ({"multi_item_delimiter_indices": [-1]}, "multi_item_delimiter_indices"),
        ({"positional_embed_overrides": {"embeds": [[1.0]]}}, "wrong type"),
        ({"extra_key": ["a"]}, "wrong type"),
        ({"bootstrap_room": 2**70}, "wrong type"),
        ({"session_id": 5}, "wrong type"),
        (
            {"return_logprob": True, "top_logprobs_num": 500, "params": {"max_new_tokens": 4000}},
            "500 logprobs",
        ),
    ],
)
def test_fields_that_end_a_scheduler_are_refused(fields, name):
    with pytest.raises(ValueError, match=name):
        check_tokenized(request(**fields), LIMITS)


@pytest.mark.parametrize("prompt", [[-1], [1, -5], [1000], [2**31], [2**63], [2**70], ["a"], [1.5]])
def test_a_prompt_with_what_is_no_token_is_refused_before_sglang_touches_it(prompt):
    def create(*args: Any) -> Any:
        raise AssertionError("it got this far")

    with pytest.raises(ValueError, match="no token of this model"):
        checked(create, LIMITS)(None, None, prompt)


def test_ids_that_stand_for_images_are_let_through():
    made = request([1, 2])
    assert checked(lambda *args: made, LIMITS)(None, None, [1, 2**40], None, object()) is made
    assert checked(lambda *a, **k: made, LIMITS)(None, None, [2**40], mm_inputs=object()) is made


@pytest.mark.parametrize(
    ("kv_tokens", "page", "cuts", "most"),
    [
        (None, 16, False, 2042),
        (2048, 1, False, 2042),
        (2048, 16, False, 2017),
        (2048, 64, False, 1921),
        (100_000, 64, False, 2042),
        (2048, 16, True, None),
    ],
)
def test_a_prompt_leaves_room_for_a_page_of_its_answer(kv_tokens, page, cuts, most):
    manager = SimpleNamespace(
        model_config=SimpleNamespace(vocab_size=1000, context_len=8192),
        server_args=SimpleNamespace(allow_auto_truncate=cuts),
        max_req_input_len=2042,
    )
    assert ModelLimits.of(manager, kv_tokens, page).prompt_tokens == most


def test_an_embedding_request_is_checked_too():
    sampling = SamplingParams()
    sampling.normalize(None)
    made = TokenizedEmbeddingReqInput(
        rid="r",
        input_text=None,
        input_ids=array("q", []),
        mm_inputs=None,
        token_type_ids=None,
        sampling_params=sampling,
    )
    with pytest.raises(ValueError, match="prompt is empty"):
        check_tokenized(made, LIMITS)
    check_tokenized(msgspec.structs.replace(made, input_ids=array("q", [5])), LIMITS)


@pytest.mark.parametrize(
    "fields",
    [
        {},
        {"params": {"temperature": 0.0, "top_k": 1, "min_new_tokens": 8}},
        {"params": {"max_new_tokens": None, "n": 128, "stop": ["a"], "stop_regex": "a+"}},
        {"params": {"logit_bias": {"5": -1e9, "999": 100}, "stop_token_ids": [0, 999]}},
        {"params": {"custom_params": {"a": 1, "b": [1, "x"], "c": {"d": None}}}},
        {"return_logprob": True, "top_logprobs_num": 20, "params": {"max_new_tokens": None}},
        {"return_logprob": True, "top_logprobs_num": 1000, "params": {"max_new_tokens": 8}},
        {"priority": 5, "session_id": "a", "extra_key": "b"},
        {"prompt": [0, 999]},
    ],
)
def test_requests_that_an_engine_can_run_pass(fields):
    check_tokenized(request(**fields), LIMITS)


@pytest.mark.parametrize(
    ("fields", "name"),
    [
        ({"sampling_params": {"n": 0}}, "n must"),
        ({"sampling_params": {"n": 129}}, "n must"),
        ({"sampling_params": {"n": True}}, "n must"),
        ({"sampling_params": {"n": 1.5}}, "n must"),
        ({"sampling_params": [{"n": 2}, {"n": 10**9}]}, "n must"),
        ({"sampling_params": [5]}, "sampling_params"),
        ({"sampling_params": {"is_normalized": True}}, "is_normalized"),
        ({"rid": ""}, "rid"),
        ({"rid": ["a", ""]}, "rid"),
        ({"rid": "x" * 600}, "rid"),
    ],
)
def test_what_sglang_would_multiply_first_is_refused_first(fields, name):
    with pytest.raises(ValueError, match=name):
        check_before(GenerateReqInput(text="a", **fields))


def test_ordinary_requests_are_not_held_up():
    for params in (None, {}, {"n": 1}, {"n": None}, [{"n": 128}]):
        check_before(GenerateReqInput(text="a", sampling_params=params, rid="mine"))
    check_before(EmbeddingReqInput(text="a"))
