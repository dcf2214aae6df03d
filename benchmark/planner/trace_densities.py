"""Compute density and prefix sharing of the public traces, against the paper's Table 4.

    python benchmark/planner/trace_densities.py

Llama-3.1-8B in bfloat16 on one A100-80GB SXM. Two readings of a trace's density: that of the trace
(all compute over all memory seconds, after sharing), which is what the planner uses; and that of a
request of mean lengths. Real: lengths, MMLU's questions. Synthetic: MMLU's answers (2 tokens) and
tokens (see `traces.py`); OpenVid altogether (prompts of 60 tokens, outputs log-normal around a mean
of 16,000, as the paper scales them). WildChat is not to be had. Needs the data folder.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import sys
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from traces import (
    DATA,
    MMLU_OUTPUT_TOKENS,
    ROOT,
    burstgpt,
    lengths_csv,
    mmlu,
)

from blendserve.planner import HARDWARE, MODEL_SPECS, CostModel, PrefixTree
from blendserve.planner.cost_model import density

RESULTS = ROOT / "benchmark" / "results" / "trace_densities.json"
COST_MODEL = CostModel(MODEL_SPECS["llama-3.1-8b"], HARDWARE["a100-80g-sxm"])

# Sharing and density, BlendServe Table 4.
PAPER = {
    "MMLU": (0.86, 54.91),
    "Azure code": (0.01, 33.2),
    "BurstGPT": (0.02, 17.78),
    "ShareGPT": (0.02, 3.12),
    "WildChat": (0.19, 2.13),
    "OpenVid": (0.00, 0.05),
    "Azure conv": (None, None),
    "LMSYS": (None, None),
}
# As short as the paper's sharing of 0.02 for ShareGPT and BurstGPT lets expect.
SYSTEM_PROMPT_TOKENS = 7
VIDEO_PROMPT_TOKENS = 60
VIDEO_OUTPUT_TOKENS = 16_000
VIDEO_SPREAD = 0.8  # Standard deviation of the log of an output length.


def videos() -> list[tuple[int, int]]:
    drawn = np.random.default_rng(0).lognormal(0.0, VIDEO_SPREAD, 10_000)
    scaled = np.rint(drawn * VIDEO_OUTPUT_TOKENS / drawn.mean())
    return [(VIDEO_PROMPT_TOKENS, int(tokens)) for tokens in scaled]


def measure(
    prompt: NDArray[np.int64], output: NDArray[np.int64], shared: NDArray[np.int64]
) -> dict[str, Any]:
    """All (n,): prompt and output tokens, and tokens in common with the request before."""
    compute = COST_MODEL.compute_seconds(prompt, output).sum()
    saved = COST_MODEL.prefill_seconds_saved(shared).sum()
    memory = COST_MODEL.memory_seconds(prompt, output).sum()
    sharing = float(shared.sum() / prompt.sum())
    mean_prompt, mean_output = float(prompt.mean()), float(output.mean())
    of_mean = COST_MODEL.compute_seconds(mean_prompt, mean_output)
    of_mean -= COST_MODEL.prefill_seconds_saved(sharing * mean_prompt)
    gemm = (prompt + output).sum() * 2 * COST_MODEL.model.params_per_token
    return {
        "requests": len(prompt),
        "mean_prompt_tokens": round(mean_prompt, 1),
        "mean_output_tokens": round(mean_output, 1),
        "sharing": round(sharing, 4),
        "density": round(float(density(compute - saved, memory)), 3),
        "density_of_mean_request": round(
            float(density(of_mean, COST_MODEL.memory_seconds(mean_prompt, mean_output))), 3
        ),
        "density_without_sharing": round(float(density(compute, memory)), 3),
        "attention_part_of_compute": round(
            1 - float(gemm / COST_MODEL.hardware.compute_flops / compute), 4
        ),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--json", type=Path, default=RESULTS)
    options = parser.parse_args()
    if not DATA.is_dir():
        sys.exit("The data folder is absent; set BLENDSERVE_DATA to it.")
    pairs = {
        "Azure code": lengths_csv("azure2023", "AzureLLMInferenceTrace_code.csv"),
        "BurstGPT": burstgpt(),
        "ShareGPT": lengths_csv("nanoflow", "sharegpt.csv"),
        "OpenVid": videos(),
        "Azure conv": lengths_csv("azure2023", "AzureLLMInferenceTrace_conv.csv"),
        "LMSYS": lengths_csv("nanoflow", "lmsys.csv"),
    }
    found: dict[str, dict[str, Any]] = {}
    for name, rows in pairs.items():
        # All share the system prompt and nothing else, as in the paper's synthesis.
        prompt, output = np.array(rows).T
        shared = np.full(len(rows), SYSTEM_PROMPT_TOKENS)
        shared[0] = 0
        found[name] = measure(prompt + SYSTEM_PROMPT_TOKENS, output, shared)
    exam = PrefixTree.build(mmlu().prompts)
    answers = np.full(exam.num_leaves, MMLU_OUTPUT_TOKENS)
    found["MMLU"] = measure(exam.length, answers, exam.shared)
    print(f"{'trace':11} {'sharing':>8} {'paper':>6} {'density':>8} {'of mean':>8} {'paper':>6}")
    for name, (sharing, rho) in PAPER.items():
        if name in found:
            row = found[name]
            row["paper_sharing"], row["paper_density"] = sharing, rho
            print(
                f"{name:11} {row['sharing']:8.3f} {sharing if sharing is not None else '-':>6} "
                f"{row['density']:8.2f} {row['density_of_mean_request']:8.2f} {rho or '-':>6}"
            )
    document = {
        "command": "python benchmark/planner/trace_densities.py",
        "device": f"{platform.machine()}, {os.cpu_count()} cores",
        "model": COST_MODEL.model.name,
        "hardware": COST_MODEL.hardware.source,
        "synthetic": [
            "MMLU's output lengths (2 tokens) and its tokens (four bytes of the real text each)",
            f"OpenVid: prompts of {VIDEO_PROMPT_TOKENS} tokens, outputs log-normal (log deviation "
            f"{VIDEO_SPREAD}) with mean {VIDEO_OUTPUT_TOKENS}",
        ],
        "second_hand": "BurstGPT: a sample of 8,000 requests, without model or log type",
        "traces": found,
    }
    options.json.parent.mkdir(parents=True, exist_ok=True)
    options.json.write_text(json.dumps(document, indent=1) + "\n")


if __name__ == "__main__":
    main()
