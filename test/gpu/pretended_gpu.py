"""What SGLang makes of our default flags on a GPU that is only pretended; no weights are loaded.

    LD_LIBRARY_PATH=STUB .venv-gpu/bin/python test/gpu/pretended_gpu.py CHIP MODEL [flags of serve]

Needs the environment of `make setup-gpu` and, without a driver, the stub of cuda_imports.py, which
runs this. Prints the line of `blendserve doctor`'s own process.
"""

from __future__ import annotations

import json
import sys
import tempfile
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch

# Name as the driver says it, compute capability, MiB, multiprocessors.
CHIPS = {
    "a100": ("NVIDIA A100-SXM4-80GB", (8, 0), 81_920, 108),
    "h100": ("NVIDIA H100 80GB HBM3", (9, 0), 81_559, 132),
    "h200": ("NVIDIA H200", (9, 0), 143_771, 132),
    "b200": ("NVIDIA B200", (10, 0), 183_359, 148),
}
MODELS: dict[str, dict[str, Any]] = {"llama": {
    "architectures": ["LlamaForCausalLM"], "model_type": "llama", "torch_dtype": "bfloat16",
    "hidden_size": 4096, "num_hidden_layers": 32, "num_attention_heads": 32,
    "num_key_value_heads": 8, "intermediate_size": 14336, "vocab_size": 128256,
    "max_position_embeddings": 131072, "rope_theta": 500000.0, "rms_norm_eps": 1e-5,
    "hidden_act": "silu", "bos_token_id": 128000, "eos_token_id": 128001,
}, "mla": {  # DeepSeek-V2-Lite
    "architectures": ["DeepseekV2ForCausalLM"], "model_type": "deepseek_v2",
    "torch_dtype": "bfloat16", "hidden_size": 2048, "num_hidden_layers": 27,
    "num_attention_heads": 16, "num_key_value_heads": 16, "intermediate_size": 10944,
    "moe_intermediate_size": 1408, "n_routed_experts": 64, "n_shared_experts": 2,
    "num_experts_per_tok": 6, "first_k_dense_replace": 1, "moe_layer_freq": 1, "n_group": 1,
    "topk_group": 1, "topk_method": "greedy", "scoring_func": "softmax", "norm_topk_prob": False,
    "routed_scaling_factor": 1.0, "kv_lora_rank": 512, "q_lora_rank": None,
    "qk_nope_head_dim": 128, "qk_rope_head_dim": 64, "v_head_dim": 128, "vocab_size": 102400,
    "max_position_embeddings": 32768, "rope_theta": 10000.0, "rms_norm_eps": 1e-6,
    "hidden_act": "silu", "bos_token_id": 100000, "eos_token_id": 100001,
}}  # fmt: skip


class NoStream:
    def __init__(self, *_: Any, **__: Any) -> None:
        pass


def pretend(chip: str) -> None:
    """PyTorch says that there is this GPU."""
    name, capability, mib, multiprocessors = CHIPS[chip]
    properties = SimpleNamespace(
        name=name, major=capability[0], minor=capability[1], total_memory=mib << 20,
        multi_processor_count=multiprocessors, warp_size=32, gcnArchName="",
        shared_memory_per_block_optin=232_448,
    )  # fmt: skip
    answers: dict[str, Any] = {
        "is_available": True, "device_count": 1, "current_device": 0,
        "get_device_capability": capability, "get_device_name": name,
        "get_device_properties": properties, "mem_get_info": (mib << 20, mib << 20),
        "synchronize": None, "empty_cache": None, "set_device": None,
    }  # fmt: skip
    for method, answer in answers.items():
        setattr(torch.cuda, method, lambda *_, _answer=answer, **__: _answer)
    torch.cuda.Stream = NoStream  # type: ignore[misc, assignment]
    import sglang.srt.utils as utils

    for module in (utils, *(m for n, m in sys.modules.items() if n.startswith("sglang.srt"))):
        if hasattr(module, "get_device_memory_capacity"):
            module.get_device_memory_capacity = lambda *_, **__: mib


def main() -> int:
    pretend(sys.argv[1])
    with tempfile.TemporaryDirectory() as folder:
        (Path(folder) / "config.json").write_text(json.dumps(MODELS[sys.argv[2]]))
        from blendserve.cli import doctor

        model = ["--model-path", folder, "--load-format", "dummy", "--skip-tokenizer-init"]
        status = doctor.resolve([*model, *sys.argv[3:]])
    if status:
        return status
    from sglang.srt.managers import scheduler
    from sglang.srt.model_executor.runner import decode_cuda_graph_runner

    # What a GPU alone registers.
    can_run = decode_cuda_graph_runner.DecodeCudaGraphRunner.can_run_graph
    assert getattr(can_run, "__wrapped__", None) is not None
    for kind in (scheduler.Scheduler, scheduler.PrefillAdder):
        assert kind.__module__.startswith("blendserve"), kind
    return 0


if __name__ == "__main__":
    sys.exit(main())
