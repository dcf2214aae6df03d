"""What can be told from a request body alone, without a model or a tokenizer."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

from blendserve.batch.executor import LineFault
from blendserve.batch.limits import BatchLimits
from blendserve.batch.line_parser import MAX_BODY_DEPTH, too_deep
from blendserve.batch.media_urls import url_fault

# The fields that carry the prompt, and the JSON types they may have.
_TEXT_OR_LIST = (str, list)
_PROMPT_FIELDS: dict[str, dict[str, tuple[type, ...]]] = {
    "/v1/chat/completions": {"messages": (list,)},
    "/v1/completions": {"prompt": _TEXT_OR_LIST},
    "/v1/embeddings": {"input": _TEXT_OR_LIST},
    "/v1/responses": {"input": _TEXT_OR_LIST},
    # Without a `query` the items are whole prompts.
    "/v1/score": {"items": _TEXT_OR_LIST},
    "/v1/rerank": {"query": _TEXT_OR_LIST, "documents": (list,)},
    "/v1/classify": {"input": _TEXT_OR_LIST},
}
_LIMITS = ("max_tokens", "max_completion_tokens", "max_output_tokens")
_MAX_CHOICES = 128

# -- fields that steer the engine --------------------------------------------------------------
# From SGLang's request classes (entrypoints/openai/protocol.py, managers/io_struct.py). A field
# stands here if it reaches beyond its own request: to another request, to where or when it runs,
# or to the server's insides. What a flag of the server has to allow first is left to SGLang:
# custom_logit_processor, return_hidden_states, custom_labels.

_STEERED = "unsupported_parameter"
_SERVER_SETS = "is for the server to set"
_OWN_CACHE = "is set by the server, which plans what its requests share"
_STEERING = {
    # Two requests of one id, or one that aborts another.
    "rid": _SERVER_SETS,
    "request_id": _SERVER_SETS,
    # State of other requests.
    "session_params": "would tie the request to others, which run in any order",
    "session_id": "would tie the request to others, which run in any order",
    "conversation_id": "would tie the request to others, which run in any order",
    # Which process runs it, and which host it fetches its KV cache from.
    "routed_dp_rank": _SERVER_SETS,
    "data_parallel_rank": _SERVER_SETS,
    "disagg_prefill_dp_rank": _SERVER_SETS,
    "routing_key": _SERVER_SETS,
    "bootstrap_host": _SERVER_SETS,
    "bootstrap_port": _SERVER_SETS,
    "bootstrap_room": _SERVER_SETS,
    "bootstrap_pair_key": _SERVER_SETS,
    "decode_tp_size": _SERVER_SETS,
    "kv_hints": _SERVER_SETS,
    # When it runs: past what was planned, and past other tenants.
    "priority": "is for the server to set, which plans the order",
    # What it shares with others: nothing, or what somebody else computed.
    "cache_salt": _OWN_CACHE,
    "extra_key": _OWN_CACHE,
    "mm_hashes": _OWN_CACHE,
    "mm_content_hashes": _OWN_CACHE,
    # Weights are named by `model`, among those that are served.
    "lora_path": "may not be named here; `model` says what is to answer",
    "lora_id": "may not be named here; `model` says what is to answer",
    # SGLang's messages to itself.
    "http_worker_ipc": _SERVER_SETS,
    "external_trace_header": _SERVER_SETS,
    "received_time": _SERVER_SETS,
    "need_wait_for_mm_inputs": _SERVER_SETS,
    "num_items_assigned": _SERVER_SETS,
    "encoder_urls": _SERVER_SETS,
    "positional_embed_overrides": _SERVER_SETS,
}
# SGLang's own headers (serving_base.py, request_headers.py): a replica, a routing key, any field.
_STEERING_HEADERS = frozenset({"x-data-parallel-rank", "x-smg-routing-key"})
_OVERRIDING_HEADER = "x-override-"
# The key of our plan in `custom_params`, and how SGLang's own keys begin.
_PLAN_KEY = "blendserve_plan"
_PRIVATE_PREFIX = "__"

# -- media ---------------------------------------------------------------------------------------

_MEDIA_FIELDS = frozenset(
    {
        *("image_url", "video_url", "audio_url", "file_url"),
        *("image", "video", "audio"),
        *("image_data", "video_data", "audio_data"),
        # Anthropic's messages: an object; as a string it only says where a text is from.
        "source",
    }
)
_NESTED = frozenset({dict, list})
_SHOWN = 200
# They describe what may be written, or are only carried along; nobody fetches what they name.
_NOT_CONTENT = frozenset({"metadata", "tools", "response_format", "text", "json_schema"})

# The chain of the keys that lead to a value: those before, and its own. None: the body itself.
_Place = tuple[Any, Any] | None


def body_faults(endpoint: str, body: dict[str, Any], limits: BatchLimits) -> Iterator[LineFault]:
    """All faults of a body but those of its model, which concern the file as a whole."""
    yield from _prompt_faults(endpoint, body)
    yield from _batch_faults(endpoint, body)
    yield from _count_faults(body)
    yield from steering_faults(body)
    yield from content_faults(
        body, allow_remote_urls=limits.allow_remote_urls, media_root=limits.media_root
    )


def steering_faults(body: Mapping[str, Any]) -> Iterator[LineFault]:
    """Fields that only this server may set, also in bodies of requests that are passed on."""
    for name, value in body.items():
        if value is not None and name in _STEERING:
            yield LineFault(_STEERED, f"`{name}` {_STEERING[name]}; leave it out.", f"body.{name}")
    nested = body.get("sampling_params")
    for params in nested if isinstance(nested, list) else [nested]:
        if isinstance(params, dict):
            yield from _custom_faults(params.get("custom_params"))
    yield from _custom_faults(body.get("custom_params"))
    tools = body.get("tools")
    for position, tool in enumerate(tools if isinstance(tools, list) else []):
        if isinstance(tool, dict) and (tool.get("type") == "mcp" or tool.get("server_url")):
            yield LineFault(
                _STEERED,
                "The server calls no tools at other servers; leave `mcp` tools out.",
                f"body.tools[{position}]",
            )


def steering_headers(names: Iterable[str]) -> Iterator[LineFault]:
    """Headers by which SGLang takes what it takes from such a field, too."""
    for name in sorted({name.lower() for name in names}):
        if name in _STEERING_HEADERS or name.startswith(_OVERRIDING_HEADER):
            message = f"The header `{name}` {_SERVER_SETS}; leave it out."
            yield LineFault(_STEERED, message, name)


def content_faults(
    body: dict[str, Any], *, allow_remote_urls: bool = False, media_root: Path | None = None
) -> Iterator[LineFault]:
    """The first fault of what stands anywhere in a body; also for requests that are passed on.

    Media that may not be had from where a URL says (`url_fault`).
    Nesting that something on the way could not follow. Numbers that JSON does not have.
    """
    # Without recursion: a body may be nested deeper than Python follows.
    stack: list[tuple[Any, _Place, int]] = [(body, None, 1)]
    while stack:
        value, place, depth = stack.pop()
        if depth > MAX_BODY_DEPTH:
            yield too_deep(_text(place)[:_SHOWN])
            return
        named = isinstance(value, dict)
        # Prompts may be thousands of token ids: one pass in C for each list.
        kinds = set(map(type, value.values() if named else value))
        fault = None
        if float in kinds:
            fault = _number_fault(value, place)
        if fault is None and named and not _MEDIA_FIELDS.isdisjoint(value):
            fault = _media_fault(value, place, allow_remote_urls, media_root)
        if fault is not None:
            yield fault
            return
        if not kinds.isdisjoint(_NESTED):
            members = value.items() if named else enumerate(value)
            inner = [(one, (place, key), depth + 1) for key, one in members if type(one) in _NESTED]
            stack.extend(reversed(inner))


def _media_fault(
    value: dict[str, Any], place: _Place, allow_remote_urls: bool, media_root: Path | None
) -> LineFault | None:
    if _top(place) in _NOT_CONTENT:
        return None
    for name in sorted(_MEDIA_FIELDS.intersection(value)):
        param = _text((place, name))[:_SHOWN]
        found = [value[name]] if name != "source" or type(value[name]) is dict else []
        while found:
            one = found.pop()
            if isinstance(one, list):
                found.extend(one)
                continue
            if isinstance(one, dict):
                if one.get("content_hash") is not None:
                    return LineFault(_STEERED, f"`content_hash` {_OWN_CACHE}; leave it out.", param)
                one = one.get("url")
            if not isinstance(one, str):
                continue
            why = url_fault(one, allow_remote_urls=allow_remote_urls, media_root=media_root)
            if why is not None:
                return LineFault("remote_url_not_allowed", why, param)
    return None


def _number_fault(value: Any, place: _Place) -> LineFault | None:
    for key, number in value.items() if isinstance(value, dict) else enumerate(value):
        if type(number) is float and not math.isfinite(number):
            param = _text((place, key))[:_SHOWN]
            return LineFault(
                "invalid_value",
                f"{param} is no number that JSON has: NaN, Infinity, or beyond 1e308.",
                param,
            )
    return None


def _prompt_faults(endpoint: str, body: dict[str, Any]) -> Iterator[LineFault]:
    for name, types in _PROMPT_FIELDS.get(endpoint, {}).items():
        param, value = f"body.{name}", body.get(name)
        if value is None:
            yield LineFault("missing_required_parameter", f"{param} is missing.", param)
        elif not isinstance(value, types):
            expected = " or ".join("a list" if kind is list else "a string" for kind in types)
            yield LineFault("invalid_type", f"{name} must be {expected}.", param)
        elif not value:
            yield LineFault("invalid_value", f"{name} must not be empty.", param)


def _batch_faults(endpoint: str, body: dict[str, Any]) -> Iterator[LineFault]:
    """What makes sense online only."""
    if body.get("stream"):
        yield _pointless("stream", "A batch cannot stream")
    if endpoint == "/v1/responses":
        if body.get("background"):
            yield _pointless("background", "A batch waits for its answers")
        if body.get("store"):
            yield _pointless("store", "The answer is kept in the output file alone")
        if body.get("previous_response_id") is not None:
            yield _pointless(
                "previous_response_id", "Lines run in any order, and answers are not stored"
            )


def _pointless(name: str, why: str) -> LineFault:
    return LineFault("invalid_value", f"{why}; leave `{name}` out.", f"body.{name}")


def _count_faults(body: dict[str, Any]) -> Iterator[LineFault]:
    """Bounds. A limit of a wrong type is left to the engine, which takes 8.0 for 8."""
    choices = body.get("n")
    if choices is not None:
        if not _is_number(choices) or choices < 1 or choices != int(choices):
            yield LineFault("invalid_value", "n must be a whole number from 1.", "body.n")
        elif choices > _MAX_CHOICES:
            yield LineFault("invalid_value", f"n must not exceed {_MAX_CHOICES}.", "body.n")
    for name in _LIMITS:
        if _is_number(body.get(name)) and body[name] < 0:
            yield LineFault(
                "invalid_value", f"{name} must be a whole number from 0.", f"body.{name}"
            )


def _is_number(value: Any) -> bool:
    return type(value) is int or (type(value) is float and math.isfinite(value))


def _custom_faults(params: Any) -> Iterator[LineFault]:
    for name in params if isinstance(params, dict) else ():
        if name == _PLAN_KEY or name.startswith(_PRIVATE_PREFIX):
            yield LineFault(
                _STEERED,
                f"`custom_params` may not hold {name[:80]!r}, which {_SERVER_SETS}.",
                "body.custom_params",
            )


def _top(place: _Place) -> Any:
    key = None
    while place is not None:
        place, key = place
    return key


def _text(place: _Place) -> str:
    """`body.messages[0].content`, of a chain of keys."""
    parts: list[str] = []
    while place is not None:
        place, key = place
        parts.append(f"[{key}]" if isinstance(key, int) else f".{key[:_SHOWN]}")
    return "body" + "".join(reversed(parts))
