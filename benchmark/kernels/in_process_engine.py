"""SGLang's model runner in this process, for timing single steps."""

from __future__ import annotations

from typing import Any

import torch

from blendserve.runtime.default_model import MODEL_NAME, resolve_model_path


def load_runner(dtype: str, attention: str) -> Any:
    """A runner of `sglang.benchmark.one_batch` with SmolLM2-135M and our plugin, if it is on."""
    from sglang.benchmark import one_batch
    from sglang.srt.plugins import load_plugins

    load_plugins()
    from sglang.srt.server_args import PortArgs, prepare_server_args

    flags = f"--device cpu --dtype {dtype} --max-total-tokens 18500 --mem-fraction-static 0.4"
    flags += f" --attention-backend {attention}"
    args = prepare_server_args(["--model-path", resolve_model_path(MODEL_NAME), *flags.split()])
    one_batch._set_envs_and_config(args)
    rank = one_batch.spawn_world_rank(args, tp_rank=0, pp_rank=0)
    one_batch.publish(args, role="scheduler", ranks=one_batch.SpawnRanks(world_rank=rank, gpu_id=0))
    one_batch.initialize_moe_config()
    return one_batch.load_model(args, PortArgs.init_new(args), 0, 0)[0]


def random_requests(count: int, length: int, generator: torch.Generator) -> Any:
    """Requests of random token ids, as one_batch wants them."""
    from sglang.benchmark import one_batch

    ids = torch.randint(0, 10_000, (count, length), generator=generator).tolist()
    return one_batch.prepare_synthetic_inputs_for_latency_test(count, length, ids)
