"""The CPU attention backend beside SGLang's torch_native, both in one process, taking turns.

    python benchmark/kernels/cpu.py                 # everything, about 6 minutes on 2 cores
    python benchmark/kernels/cpu.py --threads 1     # what one core does; see `clock`

Inputs are synthetic: random tensors and random token ids. Each sample of one side is followed by a
sample of the other, so that what else the machine does meets both. Medians are reported, and the
ratio of medians. With one thread the clock is the process's own CPU time, which other processes
change little; with more it is wall time. `accuracy` is about errors, not time.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

# Read by SGLang when it is imported.
os.environ["BLENDSERVE_ENABLED"] = "1"
if "--threads" in sys.argv:
    os.environ["OMP_NUM_THREADS"] = sys.argv[sys.argv.index("--threads") + 1]

import torch
from sglang.srt.layers.attention.torch_native_backend import TorchNativeAttnBackend

from sgl_kernel_ext import cpu, reference
from sgl_kernel_ext.batch import AttentionShape, PagedBatch
from sgl_kernel_ext.plan import make_plan

RESULTS = Path(__file__).parents[1] / "results"
CASES = Path(__file__).parents[2] / "test" / "kernels"
# SmolLM2-135M.
SHAPE = AttentionShape(heads=9, kv_heads=3, head_dim=64, scale=0.125)
LAYERS = 10  # enough that a layer's KV has left the caches when its turn comes again
TOKEN_BYTES = 2 * SHAPE.kv_heads * SHAPE.head_dim * 4


def take_turns(
    sides: dict[str, Callable[[], Any]], samples: int, clock: Callable[[], float]
) -> dict[str, list[float]]:
    """Milliseconds of each side, sample by sample, after one call of each that does not count."""
    taken: dict[str, list[float]] = {name: [] for name in sides}
    for sample in range(samples + 1):
        for name, call in sides.items():
            start = clock()
            call()
            if sample:
                taken[name].append(round((clock() - start) * 1e3, 3))
    return taken


def summary(taken: dict[str, list[float]], of: str, over: str) -> dict[str, Any]:
    medians = {name: statistics.median(times) for name, times in taken.items()}
    return {
        "median_ms": {name: round(m, 3) for name, m in medians.items()},
        "speedup": round(medians[over] / medians[of], 2),
        "samples_ms": taken,
    }


class Layers:
    """Pools of several layers and the calls over all of them."""

    def __init__(self, prefix: int, private: int, requests: int, query_len: int = 1) -> None:
        used = 1 + prefix + requests * private
        generator = torch.Generator().manual_seed(0)
        new = lambda *size: torch.randn(*size, generator=generator)  # noqa: E731
        self.pools = [
            tuple(new(used, SHAPE.kv_heads, SHAPE.head_dim) for _ in "kv") for _ in range(LAYERS)
        ]
        kv_len = prefix + private
        self.table = torch.zeros(requests, kv_len, dtype=torch.int32)
        for i in range(requests):
            self.table[i, :prefix] = torch.arange(1, 1 + prefix)
            begin = 1 + prefix + i * private
            self.table[i, prefix:] = torch.arange(begin, begin + private)
        self.batch = PagedBatch.of(range(requests), [kv_len] * requests, [query_len] * requests)
        self.query = new(requests * query_len, SHAPE.heads, SHAPE.head_dim)
        self.output = torch.empty_like(self.query)

    def blend(self, share: bool = True) -> Callable[[], None]:
        """Plan and run, as the backend does once per step and once per layer."""
        table, rows = self.table.numpy(), self.batch.table_rows

        def call() -> None:
            lookup = (lambda members, at: table[rows[members], at]) if share else None
            plan = make_plan(self.batch, SHAPE, cpu.TILING, torch.get_num_threads(), lookup)
            for key, value in self.pools:
                cpu.run(plan, SHAPE, self.query, key, value, self.table, self.output)

        return call

    def torch_native(self) -> Callable[[], None]:
        lens = [torch.from_numpy(x) for x in (self.batch.kv_lens, self.batch.query_lens)]
        kv_lens, query_lens = lens
        rows = torch.from_numpy(self.batch.table_rows)
        options = {"scaling": SHAPE.scale, "enable_gqa": True, "causal": True}
        native: Any = TorchNativeAttnBackend

        def call() -> None:
            for key, value in self.pools:
                common = (self.query, self.output, key, value, self.table, rows, kv_lens)
                if int(query_lens.max()) == 1:
                    native._run_sdpa_forward_decode(native, *common, **options)
                else:
                    native._run_sdpa_forward_extend(
                        native, *common, kv_lens - query_lens, query_lens, **options
                    )

        return call


def read_bandwidth(clock: Callable[[], float]) -> float:
    """GB/s of a sum over 1 GiB with all threads, the best of ten."""
    data = torch.ones(2**28)
    times = take_turns({"sum": data.sum}, 10, clock)["sum"]
    return data.numel() * 4 / min(times) / 1e6


def decode_attention(samples: int, clock: Callable[[], float]) -> dict[str, Any]:
    """Batch 32, 512 positions each."""
    layers = Layers(prefix=0, private=512, requests=32)
    before = read_bandwidth(clock)
    sides = {"blend": layers.blend(), "torch_native": layers.torch_native()}
    result = summary(take_turns(sides, samples, clock), "blend", "torch_native")
    bandwidth = max(before, read_bandwidth(clock))
    gigabytes = LAYERS * 32 * 512 * TOKEN_BYTES / 1e9
    reached = gigabytes / (result["median_ms"]["blend"] / 1e3)
    return {
        **result,
        "read_bandwidth_gb_s": round(bandwidth, 1),
        "kv_gb_s": round(reached, 1),
        "share_of_bandwidth": round(reached / bandwidth, 2),
        "bars": {"speedup": 3.0, "share_of_bandwidth": 0.6},
    }


def prefill_attention(samples: int, clock: Callable[[], float]) -> dict[str, Any]:
    layers = Layers(prefix=0, private=1024, requests=1, query_len=1024)
    sides = {"blend": layers.blend(), "torch_native": layers.torch_native()}
    result = summary(take_turns(sides, samples, clock), "blend", "torch_native")
    return {**result, "bars": {"speedup": 1.0}}


def shared_prefix(samples: int, clock: Callable[[], float]) -> dict[str, Any]:
    """64 decodes, a common prefix of 4,096 tokens, 128 of their own."""
    layers = Layers(prefix=4096, private=128, requests=64)
    sides = {"groups": layers.blend(), "no_groups": layers.blend(share=False)}
    table = layers.table.numpy()
    threads = torch.get_num_threads()
    plan = make_plan(layers.batch, SHAPE, cpu.TILING, threads, lambda m, at: table[m, at])
    ideal = (4096 + 64 * 128) * TOKEN_BYTES
    return {
        **summary(take_turns(sides, samples, clock), "groups", "no_groups"),
        "bytes_read_over_ideal": round(plan.read_bytes(SHAPE, 4) / ideal, 3),
        "bars": {"speedup": 3.0, "bytes_read_over_ideal": 1.15},
    }


def accuracy(samples: int, clock: Callable[[], float]) -> dict[str, Any]:
    """Relative errors against float64 over the random batches of the tests, in float32."""
    sys.path.append(str(CASES))
    from kernel_cases import random_case

    errors = []
    for seed in range(320):
        case = random_case(seed)
        tensors = (case.query, case.key_pool, case.value_pool, case.slot_table)
        plan = make_plan(case.batch, case.shape, cpu.TILING, torch.get_num_threads(), case.lookup)
        output = case.poisoned_output()
        cpu.run(plan, case.shape, *tensors, output)
        expected = reference.attention(*tensors, case.batch, case.shape)
        errors.append(reference.relative_error(output, expected))
    return {
        "batches": len(errors),
        "worst": max(errors),
        "median": statistics.median(errors),
        "bars": {"worst": 1e-5},
    }


def engine(samples: int, clock: Callable[[], float]) -> dict[str, Any]:
    """A whole decode step, batch 32 over 512 tokens each, and a prefill of 1,024 tokens."""
    from in_process_engine import load_runner, random_requests

    runner = load_runner("float32", "blend")
    model = runner.torch_runner
    backends = {
        "blend": model.attn_backend,
        "torch_native": TorchNativeAttnBackend(model),
    }
    generator = torch.Generator().manual_seed(0)
    prefill: dict[str, list[float]] = {name: [] for name in backends}
    for sample in range(max(2, samples // 3) + 1):
        for name, backend in backends.items():
            model.attn_backend = backend
            runner.clear()
            batch = random_requests(1, 1024, generator)
            start = clock()
            runner.extend(batch)
            if sample:
                prefill[name].append(round((clock() - start) * 1e3, 1))

    # One batch, whose steps the two take by turns.
    model.attn_backend = backends["blend"]
    runner.clear()
    tokens, _, batch = runner.extend(random_requests(32, 512, generator))
    decode: dict[str, list[float]] = {name: [] for name in backends}
    for sample in range(samples + 1):
        for name, backend in backends.items():
            model.attn_backend = backend
            start = clock()
            tokens, _ = runner.decode(tokens, batch)
            if sample:
                decode[name].append(round((clock() - start) * 1e3, 1))
    return {
        "prefill_1024": {**summary(prefill, "blend", "torch_native"), "bars": {"speedup": 1.0}},
        "decode_step": {**summary(decode, "blend", "torch_native"), "bars": {"speedup": 1.8}},
    }


PARTS = {
    "decode_attention": decode_attention,
    "prefill_attention": prefill_attention,
    "shared_prefix": shared_prefix,
    "accuracy": accuracy,
    "engine": engine,
}


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--threads", type=int, default=os.cpu_count())
    parser.add_argument("--samples", type=int, default=15)
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=list(PARTS))
    parser.add_argument("--json", type=Path, default=RESULTS / "kernels-cpu.json")
    options = parser.parse_args(argv)
    torch.set_num_threads(options.threads)
    clock = time.process_time if options.threads == 1 else time.perf_counter
    results = {}
    for name in options.parts:
        results[name] = PARTS[name](options.samples, clock)
        print(name, json.dumps(_without_samples(results[name]), indent=1), flush=True)
    report = {
        "command": " ".join(["python", "benchmark/kernels/cpu.py", *sys.argv[1:]]),
        "device": f"{platform.machine()}, {os.cpu_count()} cores",
        "instruction_set": cpu.instruction_set(),
        "threads": options.threads,
        "clock": clock.__name__,
        "versions": {"python": platform.python_version(), "torch": torch.__version__},
        "synthetic": "tensors and token ids",
        "load_average_at_end": round(os.getloadavg()[0], 2),
        **results,
    }
    options.json.write_text(json.dumps(report, indent=1) + "\n")


def _without_samples(value: Any) -> Any:
    if not isinstance(value, dict):
        return value
    return {k: _without_samples(v) for k, v in value.items() if k != "samples_ms"}


if __name__ == "__main__":
    main()
