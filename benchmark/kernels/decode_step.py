"""Where a decode step's time goes on a CPU: SGLang's own operators, packed weights, row kernels.

    python benchmark/kernels/decode_step.py --json benchmark/results/decode-step-cpu.json

Real: SmolLM2-135M in SGLang's model runner. Synthetic: 22 requests of 200 random token ids. One
process, one thread, its own CPU time, which other processes change little. The three forms of the
engine take turns step by step; parts are timed by hooks around the model's modules; medians.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import platform
import statistics
import sys
import time
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path
from typing import Any

# Read when SGLang and OpenMP are loaded.
os.environ["BLENDSERVE_ENABLED"] = "1"
os.environ["OMP_NUM_THREADS"] = "1"

import torch
from in_process_engine import load_runner, random_requests

REQUESTS, LENGTH, STEPS = 22, 200, 10


class Clock:
    """CPU milliseconds by part of the step at hand."""

    def __init__(self, model: torch.nn.Module) -> None:
        from sglang.srt.layers.activation import SiluAndMul
        from sglang.srt.layers.layernorm import RMSNorm
        from sglang.srt.layers.linear import LinearBase
        from sglang.srt.layers.logits_processor import LogitsProcessor
        from sglang.srt.layers.radix_attention import RadixAttention
        from sglang.srt.layers.rotary_embedding.base import RotaryEmbedding

        kinds = {
            "linear layers": LinearBase,
            "logits": LogitsProcessor,
            "norms": RMSNorm,
            "activation": SiluAndMul,
            "rotary embedding": RotaryEmbedding,
            "attention with KV store": RadixAttention,
        }
        self.parts: dict[str, float] = defaultdict(float)
        for module in model.modules():
            for name, kind in kinds.items():
                if isinstance(module, kind):
                    self._watch(module, name)

    def _watch(self, module: torch.nn.Module, name: str) -> None:
        begun: list[float] = []

        def before(*_: Any) -> None:
            begun.append(time.process_time())

        def after(*_: Any) -> None:
            self.parts[name] += (time.process_time() - begun.pop()) * 1e3

        module.register_forward_pre_hook(before)
        module.register_forward_hook(after)


@contextlib.contextmanager
def sglangs_rows(model: torch.nn.Module) -> Iterator[None]:
    """SGLang's own norms, activations, rotary embeddings and KV writes."""
    from sgl_kernel_ext.cpu import rows

    def store(key: Any, value: Any, key_pool: Any, value_pool: Any, slots: Any) -> None:
        key_pool[slots] = key.view(-1, *key_pool.shape[1:])
        value_pool[slots] = value.view(-1, *value_pool.shape[1:])

    chosen = [m for m in model.modules() if getattr(m, "_forward_method", None) is not None]
    methods: list[Any] = [module._forward_method for module in chosen]
    ours = rows.store
    for module in chosen:
        module._forward_method = module.forward_native
    rows.store = store
    try:
        yield
    finally:
        rows.store = ours
        for module, method in zip(chosen, methods, strict=True):
            module._forward_method = method


def measure(dtype: str, rounds: int) -> dict[str, dict[str, float]]:
    """Milliseconds of each part of a decode step, for each form of the engine."""
    runner = load_runner(dtype, "blend")
    model = runner.torch_runner.model
    clock = Clock(model)
    generator = torch.Generator().manual_seed(0)

    @contextlib.contextmanager
    def before() -> Iterator[None]:
        with sglangs_rows(model), model.packed_weights.plain():
            yield

    forms = {
        "SGLang's operators": before,
        "packed weights": lambda: sglangs_rows(model),
        "and row kernels": contextlib.nullcontext,
    }
    samples: dict[str, dict[str, list[float]]] = {form: defaultdict(list) for form in forms}
    for _ in range(rounds):
        runner.clear()
        tokens, _, batch = runner.extend(random_requests(REQUESTS, LENGTH, generator))
        for step in range(STEPS + 1):
            for form, entered in forms.items():
                with entered():
                    clock.parts.clear()
                    start = time.process_time()
                    tokens, _ = runner.decode(tokens, batch)
                    whole = (time.process_time() - start) * 1e3
                if step == 0:
                    continue
                for name, taken in clock.parts.items():
                    samples[form][name].append(taken)
                samples[form]["all else"].append(whole - sum(clock.parts.values()))
                samples[form]["whole decode step"].append(whole)
    return {
        form: {name: round(statistics.median(taken), 2) for name, taken in parts.items()}
        for form, parts in samples.items()
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--dtype", default="bfloat16", choices=("float32", "bfloat16"))
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--json", type=Path, help="add the figures to this file, by dtype")
    options = parser.parse_args()
    torch.set_num_threads(1)
    forms = measure(options.dtype, options.rounds)
    for name in next(iter(forms.values())):
        cells = "".join(f"{forms[form].get(name, 0.0):>22.2f}" for form in forms)
        print(f"{name:28}{cells}")
    if options.json:
        known = json.loads(options.json.read_text()) if options.json.exists() else {}
        known[options.dtype] = {
            "command": "python " + " ".join(sys.argv),
            "machine": platform.platform(),
            "torch": torch.__version__,
            "cpu_milliseconds": forms,
        }
        options.json.write_text(json.dumps(known, indent=1) + "\n")


if __name__ == "__main__":
    main()
