"""Odd bodies for responses."""

from __future__ import annotations

from collections.abc import Iterator

from odd_lines.parts import NUMBERS, PIXEL, SHAPES, TEXTS, Body, function, nested, one_each, say


def responses() -> Iterator[Body]:
    """Bodies for responses."""
    for value in (
        *SHAPES,
        5,
        [5],
        [[]],
        [{}],
        ["a"],
        [say()],
        [say(None)],
        [say([])],
        [say([{"type": "input_text", "text": "a"}])],
        [say([{"type": "input_text"}])],
        [say([{"type": "input_image", "image_url": PIXEL}])],
        [say([{"type": "input_image"}])],
        [say([{"type": "input_file", "file_id": "f"}])],
        [say([{"type": "output_text", "text": "a"}])],
        [say([None])],
        [{"role": "nobody", "content": "a"}],
        [{"role": "user"}],
        [{"content": "a"}],
        [
            {
                "type": "message",
                "role": "assistant",
                "content": [{"type": "refusal", "refusal": "n"}],
            }
        ],
        [{"type": "message", "role": "user", "content": "a", "status": "x"}],
        [{"type": "item_reference", "id": "x"}],
        [{"type": "function_call", "name": "f", "arguments": "{", "call_id": "c"}],
        [{"type": "function_call"}],
        [{"type": "function_call_output", "call_id": "c", "output": "1"}],
        [{"type": "function_call_output", "call_id": None, "output": None}],
        [{"type": "function_call_output", "output": [{"type": "input_text", "text": "a"}]}],
        [{"type": "reasoning", "summary": []}],
        [{"type": "reasoning"}],
        [{"type": "reasoning", "id": "r", "summary": [], "encrypted_content": "x"}],
        [{"type": "web_search_call", "id": "w", "status": "completed"}],
        [{"type": "computer_call"}],
        [{"type": "unheard_of"}],
        [say(), {"role": "assistant", "content": "x"}],
        [{"role": "developer", "content": "a"}, {"role": "system", "content": "b"}, say()],
        "word " * 30_000,
        nested(100),
    ):
        yield {"input": value}
    for text in TEXTS:
        yield {"input": text}
    yield {}
    yield {"prompt": "a"}
    for more in (
        *one_each("temperature", NUMBERS),
        *one_each("top_p", NUMBERS),
        *one_each("max_output_tokens", (-1, 0, 3.7, "8", True, [], 2**70)),
        *one_each("top_logprobs", (*NUMBERS, 20, 21, 100_000)),
        *one_each("instructions", (*SHAPES, "x" * 20_000, [say()])),
        *one_each("metadata", (*SHAPES, {"a": 1}, nested(300), nested(900))),
        *one_each("tools", (*SHAPES, [function()], [{"type": "web_search_preview"}])),
        *one_each("tool_choice", (*SHAPES, "required", {"type": "function", "name": "f"})),
        *one_each("reasoning", (*SHAPES, {"effort": "low"}, {"effort": 5}, {"effort": "huge"})),
        *one_each("text", (*SHAPES, {"format": 5}, {"format": {"type": "json_object"}})),
        *one_each("include", (*SHAPES, ["message.output_text.logprobs"], ["nothing"])),
        *one_each("previous_response_id", (*SHAPES, "resp_missing")),
        *one_each("truncation", (*SHAPES, "auto", "never")),
        *one_each("store", SHAPES),
        *one_each("request_id", SHAPES),
        *one_each("parallel_tool_calls", SHAPES),
        *one_each("user", SHAPES),
        *one_each("conversation", SHAPES),
        *one_each("stop", (*SHAPES, ["a"] * 40)),
        *one_each("priority", NUMBERS),
        {"text": {"format": {"type": "json_schema"}}},
        {"text": {"format": {"type": "json_schema", "name": "s", "schema": None}}},
        {"text": {"format": {"type": "json_schema", "name": "s", "schema": {"type": "x"}}}},
        {"text": {"format": {"type": "json_schema", "name": "s", "schema": {"type": "object"}}}},
        {"text": {"format": {"type": "grammar"}, "verbosity": "low"}},
        {"tools": [{"type": "function", "name": "f", "parameters": 5}]},
        {"tools": [{"type": "function", "name": "f", "parameters": {"type": "object"}}]},
        {"tools": [{"type": "function", "name": "f"}], "tool_choice": "required"},
        {"tools": [{"type": "function"}]},
        {"tools": [{"type": "code_interpreter", "container": {"type": "auto"}}]},
        {"tools": [{"type": "mcp", "server_label": "x", "server_url": "http://127.0.0.1:9/"}]},
        {"tools": [{"type": "file_search", "vector_store_ids": []}]},
        {"tools": [{"type": "image_generation"}]},
        {"include": ["message.output_text.logprobs"], "top_logprobs": 100_000},
        {"include": ["message.output_text.logprobs"], "top_logprobs": 5},
        {"max_tool_calls": -1},
        {"service_tier": "fast"},
        {"top_k": -7},
        {"min_p": 5},
        {"frequency_penalty": 50},
        {"presence_penalty": "x"},
        {"repetition_penalty": 0},
        {"prompt": {"id": "p"}},
        {"chat_template_kwargs": {"tokenize": False}},
        {"logit_bias": {"5": 1e300}},
        {"stream_options": {"include_obfuscation": True}},
        {"rid": ["a", "b"]},
        {"extra_key": 5},
        {"cache_salt": ["x"]},
    ):
        yield {"input": "Say it.", **more}
