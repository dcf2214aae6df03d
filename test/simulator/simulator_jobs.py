"""Small jobs and a slow engine without shortcuts, to hold the fast one against."""

from __future__ import annotations

import numpy as np
from hypothesis import strategies as st

from blendserve.planner import HARDWARE, MODEL_SPECS, CostModel, FlatTokens
from blendserve.simulator.workloads import Workload

LLAMA_ON_A100 = CostModel(MODEL_SPECS["llama-3.1-8b"], HARDWARE["a100-80g-sxm"])


def workload(prompts: list[np.ndarray], output: list[int], limit: int = 4_096) -> Workload:
    n = len(output)
    return Workload(
        name="test",
        prompts=FlatTokens.of(prompts),
        output_tokens=np.array(output, dtype=np.int64),
        max_output_tokens=np.full(n, limit),
        source=np.zeros(n, dtype=np.int64),
        sources=("test",),
    )


@st.composite
def workloads(draw: st.DrawFn) -> Workload:
    return random_workload(draw(st.integers(1, 60)), draw(st.integers(0, 2**32 - 1)))


def random_workload(n: int, seed: int) -> Workload:
    """Random trees: a prompt is a walk down a few shared segments, then tokens of its own."""
    rng = np.random.default_rng(seed)
    segments = [rng.integers(0, 5_000, rng.integers(20, 400)) for _ in range(6)]
    prompts, output = [], []
    for _ in range(n):
        depth = rng.integers(0, 4)
        # A segment has the same continuations wherever it stands, as few-shot prompts do.
        path = [segments[(level * 2 + rng.integers(0, 2)) % 6] for level in range(depth)]
        own = rng.integers(0, 5_000, rng.integers(1, 200))
        prompts.append(np.concatenate([*path, own]).astype(np.int32))
        output.append(
            int(rng.choice([1, 2, 5, 60, 500, 2_000], p=[0.2, 0.3, 0.2, 0.15, 0.1, 0.05]))
        )
    return workload(prompts, output)


def mixed_workload(n: int, seed: int = 0, subjects: int = 20, longest: int = 4_000) -> Workload:
    """Questions behind long few-shot prompts, chat, and a few very long decodes."""
    rng = np.random.default_rng(seed)

    def tokens(count: int) -> np.ndarray:
        return rng.integers(0, 49_152, count).astype(np.int32)

    system = [tokens(20) for _ in range(3)]
    shots = [tokens(600) for _ in range(subjects)]
    prompts, output = [], []
    for kind in rng.choice(3, size=n, p=[0.5, 0.48, 0.02]):
        if kind == 0:
            prompts.append(np.concatenate((system[0], shots[rng.integers(subjects)], tokens(100))))
            output.append(2)
        elif kind == 1:
            prompts.append(np.concatenate((system[1], tokens(int(rng.integers(20, 700))))))
            output.append(1 + int(rng.exponential(60)))
        else:
            prompts.append(np.concatenate((system[2], tokens(60))))
            output.append(int(rng.integers(longest // 4, longest)))
    return workload(prompts, output)
