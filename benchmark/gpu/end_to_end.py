"""Stock SGLang against ours on one GPU: same flags, same requests, one process after the other.

    python benchmark/gpu/end_to_end.py                       # fcfs, dfs, blend; under 8 minutes
    python benchmark/gpu/end_to_end.py --sides dfs-pdmux blend-pdmux

Llama-3.1-8B with dummy weights (throughput does not depend on their values) and prompts of random
token ids. The mix is small and reaches its steady state soon: a compute side of long prompts that
share prefixes in groups and answer shortly, and a memory side of short prompts with 2,048 tokens of
output; the KV pool is capped. Output lengths are fixed and known to the planner.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
from report import require_gpu, table, write

CONFIG = {
    "architectures": ["LlamaForCausalLM"], "model_type": "llama", "torch_dtype": "bfloat16",
    "hidden_size": 4096, "num_hidden_layers": 32, "num_attention_heads": 32,
    "num_key_value_heads": 8, "intermediate_size": 14336, "vocab_size": 128256,
    "max_position_embeddings": 131072, "rms_norm_eps": 1e-5, "rope_theta": 500000.0,
    "hidden_act": "silu", "bos_token_id": 128000, "eos_token_id": 128001,
    "tie_word_embeddings": False,
}  # fmt: skip
FLAGS: dict[str, Any] = {
    "load_format": "dummy",
    "skip_tokenizer_init": True,
    "dtype": "bfloat16",
    "max_total_tokens": 200_000,
    "schedule_policy": "fcfs",
    "log_level": "error",
}
MIXED = {"enable_mixed_chunk": True, "chunked_prefill_size": 2048}
PDMUX = {"enable_pdmux": True, "chunked_prefill_size": -1, "disable_overlap_schedule": True}
# Name -> (order of the requests, blended scheduling, flags).
SIDES: dict[str, tuple[str, bool, dict[str, Any]]] = {
    "fcfs": ("input", False, MIXED),
    "dfs": ("dfs", False, MIXED),
    "blend": ("plan", True, MIXED),
    "blend-attention": ("plan", True, {**MIXED, "attention_backend": "blend"}),
    "dfs-pdmux": ("dfs", False, PDMUX),
    "blend-pdmux": ("plan", True, PDMUX),
}


def workload(seed: int = 0) -> tuple[list[list[int]], list[int]]:
    """Prompts and output lengths, in an input order that mixes both sides."""
    rng = np.random.default_rng(seed)
    requests: list[tuple[list[int], int]] = []
    for _ in range(40):
        prefix = rng.integers(10, 120_000, 768).tolist()
        for _ in range(25):
            own = rng.integers(10, 120_000, int(rng.integers(700, 1800))).tolist()
            requests.append((prefix + own, int(rng.integers(8, 64))))
    for _ in range(300):
        requests.append((rng.integers(10, 120_000, int(rng.integers(50, 300))).tolist(), 2048))
    order = rng.permutation(len(requests))
    return [requests[i][0] for i in order], [requests[i][1] for i in order]


def planned(
    prompts: list[list[int]], outputs: list[int], hardware: str
) -> tuple[list[int], list[dict[str, Any]]]:
    """Order of the plan and each request's plan data: both ends towards the middle."""
    from blendserve.planner import HARDWARE, MODEL_SPECS, CostModel, Job, Side, make_plan
    from blendserve.runtime.plan_tag import PlanTag

    model = CostModel(MODEL_SPECS["llama-3.1-8b"], HARDWARE[hardware])
    known = np.asarray(outputs)
    plan = make_plan(Job([np.asarray(p) for p in prompts], known, known), model)
    left = int((plan.density >= plan.target_density).sum())
    tags: list[dict[str, Any]] = [{}] * len(prompts)
    for position, request in enumerate(plan.order.tolist()):
        on_left = position < left
        tags[request] = PlanTag(
            side=Side.LEFT if on_left else Side.RIGHT,
            rank=position if on_left else len(prompts) - 1 - position,
            density=float(plan.density[position]),
            output_tokens=float(outputs[request]),
            compute_seconds=float(plan.compute_seconds[position]),
            memory_seconds=float(plan.memory_seconds[position]),
        ).to_params()
    return plan.order.tolist(), tags


def serve(side: str, folder: str, hardware: str) -> None:
    """One side, in a process of its own; prints a line of JSON."""
    import sglang

    order_name, blended, flags = SIDES[side]
    prompts, outputs = workload()
    order, tags = list(range(len(prompts))), [{}] * len(prompts)
    if order_name == "dfs":
        order.sort(key=lambda i: prompts[i])
    elif order_name == "plan":
        order, tags = planned(prompts, outputs, hardware)
    engine = sglang.Engine(model_path=folder, **FLAGS, **flags)
    engine.generate(input_ids=[[1, 2, 3]] * 8, sampling_params={"max_new_tokens": 8})
    engine.flush_cache()
    sampling = [
        {
            "temperature": 0,
            "max_new_tokens": outputs[i],
            "ignore_eos": True,
            **({"custom_params": tags[i]} if blended else {}),
        }
        for i in order
    ]
    start = time.perf_counter()
    answers = engine.generate(input_ids=[prompts[i] for i in order], sampling_params=sampling)
    seconds = time.perf_counter() - start
    produced = sum(a["meta_info"]["completion_tokens"] for a in answers)
    cached = sum(a["meta_info"]["cached_tokens"] for a in answers)
    assert produced == sum(outputs)
    engine.shutdown()
    tokens = produced + sum(map(len, prompts))
    print(
        json.dumps(
            {
                "side": side,
                "seconds": seconds,
                "tokens_per_second": tokens / seconds,
                "cached_share": cached / sum(map(len, prompts)),
                "requests": len(prompts),
            }
        ),
        flush=True,
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--sides", nargs="+", choices=SIDES, default=["fcfs", "dfs", "blend"])
    parser.add_argument("--hardware", default="h100-80g-sxm")
    parser.add_argument("--serve", choices=SIDES, help=argparse.SUPPRESS)
    parser.add_argument("--folder", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.serve:
        serve(options.serve, options.folder, options.hardware)
        return
    require_gpu()
    rows: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory() as folder:
        (Path(folder) / "config.json").write_text(json.dumps(CONFIG))
        for side in options.sides:
            command = [sys.executable, __file__, "--serve", side, "--folder", folder]
            process = subprocess.run(
                [*command, "--hardware", options.hardware],
                env={**os.environ, "BLENDSERVE_ENABLED": str(int(SIDES[side][1]))},
                stdout=subprocess.PIPE,
                text=True,
                check=True,
            )
            rows.append(json.loads(process.stdout.strip().splitlines()[-1]))
            rows[-1]["speedup"] = rows[-1]["tokens_per_second"] / rows[0]["tokens_per_second"]
    table(rows, ["side", "seconds", "tokens_per_second", "cached_share", "speedup"])
    write("gpu-end-to-end", {"config": CONFIG, "flags": FLAGS, "sides": rows, "bar": 1.3})


if __name__ == "__main__":
    main()
