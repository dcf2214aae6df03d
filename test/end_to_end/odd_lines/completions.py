"""Odd bodies for completions."""

from __future__ import annotations

from collections.abc import Iterator

from odd_lines.parts import NUMBERS, SHAPES, TEXTS, Body, nested, one_each, say
from odd_lines.sampling import sampling


def completions() -> Iterator[Body]:
    """Bodies for completions."""
    for prompt in (
        *SHAPES,
        [-1],
        [-5],
        [-1, 5],
        [5, -1],
        [49_151],
        [49_152],
        [999_999, 5],
        [2**31 - 1],
        [2**31],
        [2**40],
        [8_589_934_592],
        [2**63 - 1],
        [2**63],
        [2**70],
        [-(2**70)],
        [True],
        [True, False],
        [1.0],
        [1.5],
        ["1"],
        ["a", 1],
        [1, "a"],
        [1, None],
        [None, 1],
        [[], [1]],
        [[1], []],
        [[], []],
        [[[]]],
        [[[1]]],
        [[1], 2],
        [1, [2]],
        [[1], [-5]],
        [[1], [2**40]],
        [[1], [49_152]],
        [[1], "a"],
        ["a", [1]],
        [[1], [True]],
        [[1], [1.5]],
        [["a"]],
        ["", "a"],
        ["a", ""],
        ["", ""],
        [""],
        ["a", None],
        ["a"] * 50,
        [[1]] * 50,
        [{"text": "a"}],
        {"text": "a"},
        [0] * 20_000,
        "word " * 30_000,
        5,
        5.5,
        nested(100),
        nested(300, 1),
        nested(900, 1),
    ):
        yield {"prompt": prompt}
    for text in TEXTS:
        yield {"prompt": text}
        yield {"prompt": [text, "a"]}
    yield {"prompt": "a", "messages": [say()]}
    yield {"messages": [say()]}
    yield {}
    for more in sampling():
        yield {"prompt": "Say it.", **more}
    for more in (
        *one_each("logprobs", (*NUMBERS, 5, 20, 21, 49_152, 49_153, 100_000)),
        *one_each("echo", ("x", True, 5)),
        {"echo": True, "logprobs": 5},
        {"echo": True, "logprobs": 100_000},
        {"echo": True, "logprobs": 0},
        {"echo": True, "logprobs": 2, "n": 2},
        {"echo": True, "max_tokens": 0},
        {"prompt": [5, 6], "echo": True, "logprobs": 2},
        {"prompt": [[5], [6]], "echo": True, "n": 2},
        {"prompt": ["a", "b"], "n": 3},
        {"prompt": ["a", "b"], "n": 128},
        {"prompt": [[5], [6]], "logprobs": 2, "n": 2},
        {"prompt": ["a", "b"], "rid": ["x", "x"]},
        {"prompt": ["a", "b"], "rid": ["x"]},
        {"prompt": ["a", "b"], "lora_path": ["x"]},
        {"prompt": ["a", "b"], "cache_salt": ["x"]},
        {"prompt": ["a", "b"], "extra_key": [1, 2]},
        {"prompt": ["a", "b"], "bootstrap_room": [1]},
        {"prompt": ["a", "b"], "bootstrap_port": [None, 2]},
        {"suffix": "end"},
        {"suffix": 5},
        {"suffix": ""},
        {"json_schema": "{"},
        {"json_schema": "5"},
        {"json_schema": "null"},
        {"json_schema": '"string"'},
        {"json_schema": "[]"},
        {"json_schema": ""},
        {"json_schema": "not json"},
        {"json_schema": '{"type": "nothing"}'},
        {"json_schema": '{"$ref": "#"}'},
        {"json_schema": '{"type": "string", "pattern": "("}'},
        {"json_schema": "[" * 5000},
        {"json_schema": '{"type": "integer", "maximum": NaN}'},
        {"json_schema": {"type": "object"}},
        {"json_schema": "{}", "regex": "a"},
        {"template": "x"},
        {"raw": True},
        {"stream_options": {"include_usage": "x"}},
    ):
        yield {"prompt": "Say it.", **more}
