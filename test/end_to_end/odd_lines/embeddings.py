"""Odd bodies for embeddings."""

from __future__ import annotations

from collections.abc import Iterator

from odd_lines.parts import NUMBERS, PIXEL, SHAPES, TEXTS, Body, nested, one_each


def embeddings() -> Iterator[Body]:
    """Bodies for embeddings."""
    for value in (
        *SHAPES,
        5,
        [-5],
        [5],
        [49_152],
        [2**31],
        [2**40],
        [2**63],
        [2**70],
        [True],
        [1.5],
        [[], [1]],
        [[1], []],
        [[1], [-5]],
        [[1], [2**40]],
        [[1], "a"],
        [["a"]],
        ["a", 1],
        ["a", None],
        ["a", ""],
        ["", ""],
        [""],
        ["a"] * 50,
        [[1]] * 50,
        [[[1]]],
        [{}],
        [{"text": "a"}],
        [{"text": None}],
        [{"image": PIXEL}],
        [{"text": "a", "image": "x"}],
        [{"video": "x"}],
        {"text": "a"},
        "word " * 30_000,
        [1] * 20_000,
        nested(100),
        nested(900),
    ):
        yield {"input": value}
    for text in TEXTS:
        yield {"input": text}
        yield {"input": [text, "a"]}
    yield {}
    yield {"prompt": "a"}
    for more in (
        *one_each("dimensions", NUMBERS),
        *one_each("priority", NUMBERS),
        *one_each("encoding_format", (*SHAPES, "float", "base64", "hex")),
        *one_each("user", SHAPES),
        *one_each("rid", (*SHAPES, ["a"], ["a", "b"])),
        *one_each("lora_path", (*SHAPES, "x")),
        *one_each("embed_overrides", (*SHAPES, [[[1.0]]], [[[1e308] * 64]], [None])),
        *one_each("embed_override_token_id", (*NUMBERS, 5, 49_152)),
        {"embed_override_token_id": 5, "embed_overrides": [[[0.5] * 64]], "input": [5, 6]},
        {"embed_override_token_id": 5, "embed_overrides": [[[0.5] * 63]], "input": [5, 6]},
        {"embed_override_token_id": 5, "embed_overrides": [[[0.5] * 64, [1.0]]], "input": [5, 5]},
        {"embed_override_token_id": -5, "embed_overrides": [[[0.5] * 64]], "input": [5, 6]},
        {"input_type": "query", "truncate": "END"},
        {"normalize": True},
        {"pooling": "mean"},
        {"metadata": nested(300)},
    ):
        yield {"input": "Say it.", **more}
