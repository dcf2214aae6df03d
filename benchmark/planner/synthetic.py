"""Synthetic jobs for the planner's speed: flat token arrays, made without an object per prompt."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

VOCABULARY = 49_152
SUBJECTS = 57
QUESTION_TOKENS = (40, 160)  # Own tokens of an exam question, mean 100.


def exam_job(
    requests: int, tokens_each: int, seed: int = 0
) -> tuple[NDArray[np.int32], NDArray[np.int64]]:
    """(tokens, offsets) of requests that share prefixes as MMLU's 5-shot prompts do: 57 subjects,
    each with a prefix of its own behind a common first line; what follows is random.

    tokens_each: mean prompt length; a question takes 100 of it (all but 20 of a short one).
    """
    rng = np.random.default_rng(seed)
    low, high = QUESTION_TOKENS if tokens_each > 200 else (tokens_each - 40, tokens_each)
    own = rng.integers(low, high + 1, requests)
    prefix_mean = tokens_each - (low + high) // 2
    spread = rng.integers(-prefix_mean // 4, prefix_mean // 4 + 1, SUBJECTS)
    lengths = np.maximum(prefix_mean + spread, 1)
    first_line = rng.integers(0, VOCABULARY, min(12, prefix_mean // 2)).astype(np.int32)
    prefixes = []
    for length in lengths:
        prefix = rng.integers(0, VOCABULARY, length).astype(np.int32)
        prefix[: len(first_line)] = first_line[:length]
        prefixes.append(prefix)
    subject = _subjects(np.random.default_rng((seed, 1)), requests)
    offsets = np.concatenate(([0], np.cumsum(own + lengths[subject])))
    tokens = np.empty(int(offsets[-1]), dtype=np.int32)
    for r in range(requests):
        begin, prefix = offsets[r], prefixes[subject[r]]
        tokens[begin : begin + len(prefix)] = prefix
        tokens[begin + len(prefix) : offsets[r + 1]] = rng.integers(
            0, VOCABULARY, own[r], dtype=np.int32
        )
    return tokens, offsets


def exam_outputs(requests: int, seed: int = 0) -> NDArray[np.int64]:
    """(n,) output tokens for `exam_job` of the same seed: half of the subjects are answered with a
    letter, the others at length, each with a mean of its own."""
    subject = _subjects(np.random.default_rng((seed, 1)), requests)
    rng = np.random.default_rng((seed, 2))
    means = rng.uniform(50, 1_000, SUBJECTS)
    drawn = 1 + rng.exponential(means[subject]).astype(np.int64)
    return np.where(subject % 2 == 0, 2, np.minimum(drawn, 4_096))


def _subjects(rng: np.random.Generator, requests: int) -> NDArray[np.int64]:
    return rng.integers(0, SUBJECTS, requests)
