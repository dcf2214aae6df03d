"""What a request may hold, where SGLang does not check it and a scheduler would die of it.

All ways into the engine (OpenAI's routes, /generate, the lines of batches) meet where SGLang's
tokenizer manager has made a request that it is about to send: SGLang's own checks have run, the
prompt is tokens, and every field has its final form. There it is checked once more, by the tables
of this module. A ValueError becomes a 400 on each of these ways.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass
from typing import Any

import msgspec

from blendserve.runtime.stop_regex import check_stop_regex

_INT32 = 2**31 - 1
_FLOAT32 = 3.4028235e38
_SMALLEST_FLOAT32 = 1.1754944e-38
_VOCABULARY = "the vocabulary"

MAX_SEQUENCES = 128
_MAX_ID_CHARACTERS = 512
# OpenAI's limit. As many may be had of each token of the longest answer.
_MANY_LOGPROBS = 20
# More of each, no more than so many in all: SGLang's event loop needs 70 microseconds for one.
_MAX_LOGPROBS = 2**18


@dataclass(frozen=True)
class Bounds:
    """The least and the most that a number may be; NaN is neither. `name`: as clients know it."""

    least: float
    most: float | str
    name: str = ""


# Fields of SGLang's SamplingParams. Where SGLang checks one side itself, the other stands here.
SAMPLING_NUMBERS: Mapping[str, Bounds] = {
    "temperature": Bounds(0, _FLOAT32),
    # As a 32-bit number it must not become 0.
    "top_p": Bounds(_SMALLEST_FLOAT32, 1),
    "top_k": Bounds(1, _INT32),
    "min_p": Bounds(0, 1),
    "frequency_penalty": Bounds(-2, 2),
    "presence_penalty": Bounds(-2, 2),
    # Logits are divided by it, and must stay finite.
    "repetition_penalty": Bounds(1e-3, 2),
    "min_new_tokens": Bounds(0, _INT32, "min_tokens"),
    "max_new_tokens": Bounds(0, 2**53, "max_tokens"),
    "n": Bounds(1, MAX_SEQUENCES),
    "beam_width": Bounds(1, MAX_SEQUENCES),
    "stream_interval": Bounds(1, _INT32),
}
# Fields of the request itself.
REQUEST_NUMBERS: Mapping[str, Bounds] = {
    "top_logprobs_num": Bounds(0, _VOCABULARY, "top_logprobs (logprobs of a completion)"),
    "logprob_start_len": Bounds(-1, _INT32),
    "routed_experts_start_len": Bounds(0, _INT32),
    "priority": Bounds(-_INT32, _INT32),
}
# Lists of token ids, of the sampling parameters and of the request.
SAMPLING_TOKENS = ("stop_token_ids",)
REQUEST_TOKENS = ("token_ids_logprob",)
# Lists of places in the prompt.
REQUEST_PLACES = ("token_indices_to_pool", "multi_item_delimiter_indices")
# A ban is often written as -1e9. Divided by the least temperature and the least penalty, a logit
# with a bias must still be a finite 32-bit number.
_LARGEST_BIAS = 1e28


@dataclass(frozen=True)
class ModelLimits:
    """Of the model that is served.

    Attributes:
        vocab_size: token ids are below it.
        context_length: tokens of a prompt and its answer.
        prompt_tokens: a prompt must have fewer; None where SGLang cuts longer ones off.
    """

    vocab_size: int
    context_length: int
    prompt_tokens: int | None = None

    @classmethod
    def of(cls, tokenizer_manager: Any, kv_tokens: int | None, page_size: int) -> ModelLimits:
        """Those of a server whose scheduler has answered.

        Args:
            kv_tokens: size of its KV pool; None: not known.
            page_size: tokens that the pool gives out at a time.
        """
        config = tokenizer_manager.model_config
        most = int(tokenizer_manager.max_req_input_len)
        if kv_tokens is not None:
            # SGLang wants a page beyond the prompt's own to be free. What can never have it waits
            # in SGLang's queue for ever, or is answered without a token.
            most = min(most, max(kv_tokens, most) - 2 * page_size + 1)
        cuts = tokenizer_manager.server_args.allow_auto_truncate
        return cls(int(config.vocab_size), int(config.context_len), None if cuts else most)


def check_before(request: Any) -> None:
    """Check what SGLang multiplies before it looks at a request.

    Args:
        request: SGLang's GenerateReqInput or EmbeddingReqInput, as a route made it.

    Raises:
        ValueError: with a message that names the field.
    """
    params = request.sampling_params
    for one in params if isinstance(params, list) else [params]:
        if one is None:
            continue
        if not isinstance(one, Mapping):
            raise ValueError(f"sampling_params must be an object, not {one!r:.80}.")
        if one.get("is_normalized"):
            raise ValueError("is_normalized is not for clients to set.")
        n = one.get("n")
        if n is not None and (type(n) is not int or not 1 <= n <= MAX_SEQUENCES):
            raise ValueError(f"n must be a whole number from 1 to {MAX_SEQUENCES}, got {n!r:.80}.")
    rids = request.rid if isinstance(request.rid, list) else [request.rid]
    for rid in rids:
        # An abort of "" would end every request of the server.
        if rid is not None and not (isinstance(rid, str) and 0 < len(rid) <= _MAX_ID_CHARACTERS):
            raise ValueError(f"rid must be a text of 1 to {_MAX_ID_CHARACTERS} characters.")


def checked(create: Callable[..., Any], limits: ModelLimits) -> Callable[..., Any]:
    """SGLang's ``TokenizerManager._create_tokenized_object``, whose result is checked."""

    def create_tokenized_object(
        obj: Any, input_text: Any, input_ids: Any, *args: Any, **kwargs: Any
    ) -> Any:
        if input_ids is not None:
            # Also before: SGLang puts them into an array, which has an error of its own.
            _check_tokens("The prompt", input_ids, limits, bounded=not _has_media(args, kwargs))
        request = create(obj, input_text, input_ids, *args, **kwargs)
        check_tokenized(request, limits)
        return request

    return create_tokenized_object


def _has_media(args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> bool:
    # Images stand in a prompt as ids that are no tokens.
    return kwargs.get("mm_inputs", args[1] if len(args) > 1 else None) is not None


def check_tokenized(request: Any, limits: ModelLimits) -> None:
    """Check a request that is about to be sent to the scheduler.

    Args:
        request: SGLang's TokenizedGenerateReqInput or TokenizedEmbeddingReqInput.
        limits: of the model.

    Raises:
        ValueError: with a message that names the field.
    """
    params = request.sampling_params
    for fields, owner in ((SAMPLING_NUMBERS, params), (REQUEST_NUMBERS, request)):
        for name, bounds in fields.items():
            _check_number(name, getattr(owner, name, None), bounds, limits)
    for names, owner in ((SAMPLING_TOKENS, params), (REQUEST_TOKENS, request)):
        for name in names:
            _check_tokens(name, getattr(owner, name, None) or (), limits)
    _check_prompt(request, limits)
    _check_logit_bias(params.logit_bias or {}, limits)
    for pattern in params.stop_regex_strs or ():
        check_stop_regex(pattern)
    _check_logprobs(request, limits)
    _check_types(request)


def _check_number(name: str, value: Any, bounds: Bounds, limits: ModelLimits) -> None:
    if value is None:
        return
    most = limits.vocab_size if bounds.most == _VOCABULARY else bounds.most
    fits = isinstance(value, int | float) and bounds.least <= value <= most  # type: ignore[operator]
    if not fits:
        label = bounds.name or name
        end = f"{most} ({_VOCABULARY})" if bounds.most == _VOCABULARY else most
        raise ValueError(f"{label} must be from {bounds.least} to {end}, got {value!r:.80}.")


def _check_tokens(
    name: str, tokens: Collection[Any], limits: ModelLimits, bounded: bool = True
) -> None:
    # Passes in C: a prompt may have a hundred thousand of them.
    whole = all(issubclass(kind, int) for kind in set(map(type, tokens)))
    if whole and (not bounded or not tokens or _in_vocabulary(tokens, limits)):
        return
    for token in tokens:
        if not isinstance(token, int) or (bounded and not 0 <= token < limits.vocab_size):
            raise ValueError(
                f"{name} has {token!r:.80}, which is no token of this model: token ids go from 0 "
                f"to {limits.vocab_size - 1}."
            )


def _in_vocabulary(tokens: Collection[int], limits: ModelLimits) -> bool:
    return min(tokens) >= 0 and max(tokens) < limits.vocab_size


def _check_prompt(request: Any, limits: ModelLimits) -> None:
    session = getattr(request, "session_params", None)
    has_more = (request.mm_inputs, getattr(request, "input_embeds", None), session)
    length = len(request.input_ids) if request.input_ids is not None else 0
    if not length and all(more is None for more in has_more):
        raise ValueError("The prompt is empty: it has no token.")
    if limits.prompt_tokens is not None and length >= limits.prompt_tokens:
        # SGLang keeps such an embedding request in its queue for ever, and all behind it.
        raise ValueError(
            f"The prompt has {length} tokens; this server takes fewer than {limits.prompt_tokens}."
        )
    for name in REQUEST_PLACES:
        for place in getattr(request, name, None) or ():
            if not isinstance(place, int) or not 0 <= place < length:
                raise ValueError(f"{name} has {place!r:.80}, which is no place in the prompt.")


def _check_logit_bias(biases: Mapping[Any, Any], limits: ModelLimits) -> None:
    for token, bias in biases.items():
        _check_tokens("logit_bias", [int(token)], limits)
        if not isinstance(bias, int | float) or not -_LARGEST_BIAS <= bias <= _LARGEST_BIAS:
            raise ValueError(
                f"logit_bias must have finite numbers up to {_LARGEST_BIAS:g}, got {bias!r:.80}."
            )


def _check_logprobs(request: Any, limits: ModelLimits) -> None:
    if not getattr(request, "return_logprob", False):
        return
    prompt = len(request.input_ids or ())
    room = max(limits.context_length - prompt, 0)
    limit = request.sampling_params.max_new_tokens
    places = room if limit is None else min(limit, room)
    if request.logprob_start_len >= 0:
        places += max(prompt - request.logprob_start_len, 0)
    each = max(request.top_logprobs_num, len(request.token_ids_logprob or ()))
    if each > _MANY_LOGPROBS and places * each > _MAX_LOGPROBS:
        raise ValueError(
            f"{each} logprobs for each of up to {places} tokens are more than {_MAX_LOGPROBS} in "
            "all. Ask for fewer, or set max_tokens lower."
        )


def _check_types(request: Any) -> None:
    """Whether the scheduler can read it: a request that it cannot read ends it."""
    from sglang.srt.managers import io_struct

    # Neither comes from a client, and both may be large.
    light = msgspec.structs.replace(request, time_stats=None, mm_inputs=None)
    try:
        io_struct.msgpack_decode(io_struct.msgpack_encode(light))
    except Exception as error:
        raise ValueError(f"A field has a wrong type or is too large: {error}") from error
