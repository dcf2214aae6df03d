"""Bodies that must be refused: each ended an engine, or a job, or would have on a GPU."""

from __future__ import annotations

from odd_lines.parts import CHAT, COMPLETIONS, EMBEDDINGS, RESPONSES, Body, nested, say

DEADLY_SAMPLING: tuple[Body, ...] = (
    {"logit_bias": {"5": 1e300}},
    {"stop_token_ids": [9_999_999], "min_tokens": 3},
    {"stop_token_ids": [-7], "min_tokens": 3},
    {"stop_regex": "("},
    {"stop_regex": "(?<=a+)b"},
    {"stop_regex": "(a+)+$", "ignore_eos": True},
    {"top_k": 2**40},
    {"repetition_penalty": 5e-324},
    {"temperature": 1e308},
    {"custom_params": {"deep": nested(40)}},
    {"priority": 2**63},
    {"n": 10_000},
    {"n": 0},
)
DEADLY: dict[str, tuple[Body, ...]] = {
    CHAT: tuple(
        {"messages": [say()], **body}
        for body in (
            *DEADLY_SAMPLING,
            {"logprobs": True, "top_logprobs": 100_000},
            {"logprobs": True, "top_logprobs": -1},
            {"response_format": {"type": "json_schema"}},
            {"response_format": "json"},
            {"chat_template_kwargs": {"spaces_between_special_tokens": "x"}},
            {"input_ids": []},
            {"input_ids": [-5]},
            {"input_ids": [49_152]},
            {"input_ids": [2**63]},
        )
    ),
    COMPLETIONS: (
        *({"prompt": "Say it.", **body} for body in DEADLY_SAMPLING),
        {"prompt": "Say it.", "logprobs": 100_000},
        {"prompt": "Say it.", "logprobs": -1},
        *(
            {"prompt": prompt}
            for prompt in (
                [-1],
                [-5],
                [5, -1],
                [[5], [-1]],
                [49_152],
                [999_999, 5],
                [2**31],
                [2**40],
                [2**63],
                [[], [1]],
                [[1], []],
                [[]],
                ["a", ""],
            )
        ),
    ),
    RESPONSES: (
        {"input": "Say it.", "metadata": {"a": nested(600)}},
        {
            "input": "Say it.",
            "tools": [{"type": "function", "name": "f", "parameters": nested(300)}],
        },
    ),
    EMBEDDINGS: tuple(
        {"input": value}
        for value in (
            *([-5], [49_152], [2**31], [2**63], [2**70], [[1], [-5]], [[1], [2**40]], [[]]),
            *([[], [1]], [[1], []], "word " * 30_000, [1] * 20_000),
        )
    ),
}
