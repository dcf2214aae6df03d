"""Stock SGLang against ours on one GPU: same flags, same requests, one process after the other.

    python benchmark/gpu/end_to_end.py --out FOLDER                    # dfs, blend
    python benchmark/gpu/end_to_end.py --out FOLDER --sides fcfs dfs blend --scale 1 --layers 32

Llama-3.1-8B, or the first layers of it, with dummy weights (throughput does not depend on their
values) and prompts of random token ids. The mix is small and reaches its steady state soon: a
compute side of long prompts that share prefixes in groups and answer shortly, and a memory side of
short prompts with 2,048 tokens of output; the KV pool is capped. Output lengths are fixed and known
to the planner.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
from report import DRY, Rows

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
    "schedule_policy": "fcfs",
    "log_level": "error",
    "grammar_backend": "none",
}
# At scale 1.
KV_TOKENS = 200_000
SIDE_SECONDS = 180.0
OURS = {"radix_cache_backend": "blendserve"}
MIXED = {"enable_mixed_chunk": True, "chunked_prefill_size": 2048}
PDMUX = {"enable_pdmux": True, "chunked_prefill_size": -1, "disable_overlap_schedule": True}
# Name -> (order of the requests, blended scheduling, flags).
SIDES: dict[str, tuple[str, bool, dict[str, Any]]] = {
    "fcfs": ("input", False, MIXED),
    "dfs": ("dfs", False, MIXED),
    "blend": ("plan", True, {**MIXED, **OURS}),
    "blend-attention": ("plan", True, {**MIXED, **OURS, "attention_backend": "blend"}),
    "dfs-pdmux": ("dfs", False, PDMUX),
    "blend-pdmux": ("plan", True, {**PDMUX, **OURS}),
}


def usable_backend() -> str:
    """SGLang's default on the chip, or the next of what is installed."""
    import torch

    if torch.cuda.get_device_capability()[0] == 9 and _has("sgl_kernel.flash_ops"):
        return "fa3"
    return "flashinfer" if _has("flashinfer") else "triton"


def _has(module: str) -> bool:
    try:
        return importlib.util.find_spec(module) is not None
    except ImportError:
        return False


def workload(scale: float, seed: int = 0) -> tuple[list[list[int]], list[int]]:
    """Prompts and output lengths, in an input order that mixes both sides."""
    rng = np.random.default_rng(seed)
    requests: list[tuple[list[int], int]] = []
    for _ in range(max(round(40 * scale), 1)):
        prefix = rng.integers(10, 120_000, 768).tolist()
        for _ in range(25):
            own = rng.integers(10, 120_000, int(rng.integers(700, 1800))).tolist()
            requests.append((prefix + own, int(rng.integers(8, 64))))
    for _ in range(max(round(300 * scale), 1)):
        requests.append((rng.integers(10, 120_000, int(rng.integers(50, 300))).tolist(), 2048))
    order = rng.permutation(len(requests))
    return [requests[i][0] for i in order], [requests[i][1] for i in order]


def planned(
    prompts: list[list[int]], outputs: list[int], hardware: str
) -> tuple[list[int], list[dict[str, Any]]]:
    """Order of the plan and each request's plan data: both ends towards the middle."""
    from blendserve.planner import MODEL_SPECS, CostModel, Job, Side, make_plan
    from blendserve.planner import hardware as device
    from blendserve.runtime.device import choose_hardware
    from blendserve.runtime.plan_tag import PlanTag

    chip = choose_hardware("auto") if hardware == "auto" else device(hardware)
    model = CostModel(MODEL_SPECS["llama-3.1-8b"], chip)
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


def serve(side: str, folder: str, hardware: str, scale: float) -> dict[str, Any]:
    """One side, in a process of its own."""
    order_name, blended, flags = SIDES[side]
    prompts, outputs = workload(scale)
    order, tags = list(range(len(prompts))), [{}] * len(prompts)
    if order_name == "dfs":
        order.sort(key=lambda i: prompts[i])
    elif order_name == "plan":
        order, tags = planned(prompts, outputs, hardware)
    assert sorted(order) == list(range(len(prompts)))
    sampling = [
        {
            "temperature": 0,
            "max_new_tokens": outputs[i],
            "ignore_eos": True,
            **({"custom_params": tags[i]} if blended else {}),
        }
        for i in order
    ]
    size = {
        "requests": len(prompts), "prompt_tokens": sum(map(len, prompts)),
        "output_tokens": sum(outputs),
    }  # fmt: skip
    if DRY:
        return {"side": side, **size, "dry_run": True}
    import sglang

    given = {"attention_backend": usable_backend(), "max_total_tokens": int(KV_TOKENS * scale)}
    start = time.perf_counter()
    engine = sglang.Engine(model_path=folder, **{**FLAGS, **given, **flags})
    loaded = time.perf_counter() - start
    engine.generate(input_ids=[[1, 2, 3]] * 8, sampling_params={"max_new_tokens": 8})
    engine.flush_cache()
    start = time.perf_counter()
    answers = engine.generate(input_ids=[prompts[i] for i in order], sampling_params=sampling)
    seconds = time.perf_counter() - start
    produced = sum(a["meta_info"]["completion_tokens"] for a in answers)
    cached = sum(a["meta_info"]["cached_tokens"] for a in answers)
    assert produced == sum(outputs)
    engine.shutdown()
    return {
        "side": side, **size, **given, **flags, "load_seconds": loaded, "seconds": seconds,
        "tokens_per_second": (produced + size["prompt_tokens"]) / seconds,
        "cached_share": cached / size["prompt_tokens"],
    }  # fmt: skip


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--sides", nargs="+", choices=SIDES, default=["dfs", "blend"])
    parser.add_argument("--hardware", default="auto")
    parser.add_argument("--layers", type=int, default=32)
    parser.add_argument("--scale", type=float, default=0.2)
    parser.add_argument("--serve", choices=SIDES, help=argparse.SUPPRESS)
    parser.add_argument("--folder", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.serve:
        print(json.dumps(serve(options.serve, options.folder, options.hardware, options.scale)))
        return 0
    rows, failed = Rows(options.out / "end-to-end.jsonl"), 0
    with tempfile.TemporaryDirectory() as folder:
        config = {**CONFIG, "num_hidden_layers": options.layers}
        (Path(folder) / "config.json").write_text(json.dumps(config))
        for side in options.sides:
            command = [sys.executable, __file__, "--serve", side, "--folder", folder]
            command += ["--hardware", options.hardware, "--scale", str(options.scale)]
            command += ["--out", str(options.out)]
            blended = SIDES[side][1]
            environment = {**os.environ, "BLENDSERVE_ENABLED": str(int(blended))}
            if blended:
                environment["BLENDSERVE_TRACE_FILE"] = str(options.out / f"trace-{side}.jsonl")
            try:
                done = subprocess.run(
                    command, env=environment, stdout=subprocess.PIPE, text=True,
                    timeout=SIDE_SECONDS,
                )  # fmt: skip
                row = json.loads(done.stdout.strip().splitlines()[-1])
            except (subprocess.TimeoutExpired, IndexError, ValueError) as error:
                failed += 1
                rows.add(side=side, failed=f"{type(error).__name__}: {error}"[:500])
                continue
            rows.add(layers=options.layers, **row)
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
