"""Small jobs for the planner's tests: random trees and a mix of three kinds of traffic."""

from __future__ import annotations

import numpy as np
from hypothesis import strategies as st

from blendserve.planner import HARDWARE, MODEL_SPECS, CostModel, Job

LLAMA_ON_A100 = CostModel(MODEL_SPECS["llama-3.1-8b"], HARDWARE["a100-80g-sxm"])

# A tiny vocabulary makes shared prefixes, prompts inside prompts and duplicates likely.
prompts = st.lists(
    st.lists(st.integers(0, 2), max_size=9).map(lambda ids: np.array(ids, dtype=np.int32)),
    max_size=24,
)


@st.composite
def jobs(draw: st.DrawFn, repeat: int = 1) -> Job:
    """Random prompts with known outputs, among them 0, 1 and very long ones. Each token is repeated
    that often, which multiplies all lengths and shared prefixes."""
    ids = [np.repeat(prompt, repeat) for prompt in draw(prompts)]
    n = len(ids)
    outputs = st.sampled_from([0, 1, 2, 7, 60, 900, 20_000])
    known = draw(st.lists(outputs, min_size=n, max_size=n))
    return Job(ids, np.full(n, 30_000), np.array(known, dtype=np.int64))


def shared_tokens(a: np.ndarray, b: np.ndarray) -> int:
    """Common prefix of two prompts, token by token."""
    count = 0
    for x, y in zip(a.tolist(), b.tolist(), strict=False):
        if x != y:
            break
        count += 1
    return count


def mixed_job(n: int, seed: int = 0) -> Job:
    """Questions behind long few-shot prompts (2 tokens out), chat (tens to hundreds out) and video
    generation (thousands out), each kind behind its own system prompt."""
    rng = np.random.default_rng(seed)

    def tokens(count: int) -> np.ndarray:
        return rng.integers(0, 49_152, count).astype(np.int32)

    exam, chat, video = tokens(30), tokens(40), tokens(40)
    subjects = [np.concatenate((exam, tokens(600))) for _ in range(20)]
    ids, outputs = [], []
    for kind in rng.choice(3, size=n, p=[0.6, 0.35, 0.05]):
        if kind == 0:
            subject = subjects[rng.integers(len(subjects))]
            ids.append(np.concatenate((subject, tokens(rng.integers(40, 150)))))
            outputs.append(2)
        elif kind == 1:
            ids.append(np.concatenate((chat, tokens(rng.integers(20, 700)))))
            outputs.append(1 + int(rng.exponential(60)))
        else:
            ids.append(np.concatenate((video, tokens(rng.integers(20, 100)))))
            outputs.append(int(rng.integers(2_000, 30_000)))
    return Job(ids, np.full(n, 40_000), np.array(outputs))


def permuted(job: Job, permutation: np.ndarray) -> Job:
    """The same job with its lines in another order."""
    assert job.known_output_tokens is not None
    return Job(
        [job.token_ids[i] for i in permutation],
        job.max_output_tokens[permutation],
        job.known_output_tokens[permutation],
    )
