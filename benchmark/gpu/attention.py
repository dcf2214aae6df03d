"""Attention kernels on blended batches: ours in one launch and apart, and what SGLang would run.

    python benchmark/gpu/attention.py

First every kernel is compared with the float64 reference over random shapes (as in
test/kernels/triton_cases.py); a wrong one ends the run. Bars: blended at least 1.15 times the sum
of separate launches at a balanced mix; decode at least 80 % of the copy bandwidth.
"""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from batches import SHAPE, TOKEN_BYTES, Layer
from ceilings import ceilings
from peers import KV_SPLITS, flashinfer_apart, sglang_triton
from report import median, milliseconds, require_gpu, table, write

from sgl_kernel_ext.gpu.flashinfer_steps import FlashInferSteps
from sgl_kernel_ext.gpu.steps import flashinfer_or_reason

CASES = Path(__file__).parents[2] / "test" / "kernels" / "triton_cases.py"


def check() -> list[str]:
    """The random cases of the tests, compiled for this GPU, in each element type."""
    found = []
    for dtype in ("float32", "bfloat16", "float16"):
        command = [sys.executable, str(CASES), "--count", "100", "--dtype", dtype]
        found.append(subprocess.run(command, check=True, capture_output=True, text=True).stdout)
        print(found[-1], end="")
    return found


def flashinfer_call(layer: Layer, steps: FlashInferSteps | None) -> Callable[[], None] | None:
    run = steps.plan(layer.step(), SHAPE, torch.bfloat16) if steps else None
    if run is None:
        return None
    return lambda: run(layer.query, layer.key_pool, layer.value_pool, layer.output)


def peers(layer: Layer, module: Any | None) -> dict[str, Any]:
    """Milliseconds of stock SGLang's kernels for this step, each at its best setting, and what went
    wrong with those that could not run: that must not end the measurement of the others."""
    candidates = {"flashinfer": [lambda: flashinfer_apart(layer, module)]}
    candidates["sglang_triton"] = [
        lambda splits=splits: sglang_triton(layer, splits) for splits in KV_SPLITS
    ]
    found: dict[str, Any] = {"samples": {}}
    for name, makers in candidates.items():
        times: list[list[float]] = []
        try:
            times = [milliseconds(call) for make in makers if (call := make()) is not None]
        except Exception as error:
            found[f"{name}_error"] = f"{type(error).__name__}: {error}"
            print(f"{name} could not be measured: {found[f'{name}_error']}")
        best = min(times, key=median, default=[])
        found["samples"][name] = best
        found[f"{name}_ms"] = median(best) if best else None
    measured = [found[f"{name}_ms"] for name in candidates if found[f"{name}_ms"]]
    found["best_peer_ms"] = min(measured, default=None)
    return found


def over_peers(peer: dict[str, Any], *ours: list[float]) -> float | None:
    best = min((median(samples) for samples in ours if samples), default=None)
    return peer["best_peer_ms"] / best if best and peer["best_peer_ms"] else None


def blended_rows(steps: FlashInferSteps | None, module: Any | None) -> list[dict[str, Any]]:
    """A chunk of 2,048 tokens over 2,048 cached ones, beside more and more decodes."""
    chunk = [(2048, 2048)]
    prefill = milliseconds(Layer(chunk, []).triton())
    rows = []
    for decodes in (32, 64, 128, 256, 512):
        lens = [2048] * decodes
        decode = milliseconds(Layer([], lens).triton(share=False))
        mixed = Layer(chunk, lens)
        blended = milliseconds(mixed.triton(share=False))
        call = flashinfer_call(mixed, steps)
        pod = milliseconds(call) if call else []
        apart = median(prefill) + median(decode)
        peer = peers(mixed, module)
        rows.append(
            {
                "decodes": decodes,
                "prefill_ms": median(prefill),
                "decode_ms": median(decode),
                "blended_ms": median(blended),
                "gain": apart / median(blended),
                "pod_ms": median(pod) if pod else None,
                "gain_over_peers": over_peers(peer, blended, pod),
                "peers": peer,
                "samples": {"prefill": prefill, "decode": decode, "blended": blended, "pod": pod},
            }
        )
    return rows


def shared_rows(
    copy_gb_s: float, steps: FlashInferSteps | None, module: Any | None
) -> list[dict[str, Any]]:
    """64 decodes, 512 positions of their own, under a prefix of growing length."""
    rows = []
    for prefix in (0, 1024, 4096, 16384):
        layer = Layer([], [prefix + 512] * 64, shared=prefix)
        groups = milliseconds(layer.triton())
        apart = milliseconds(layer.triton(share=False))
        call = flashinfer_call(layer, steps) if prefix else None
        cascade = milliseconds(call) if call else []
        peer = peers(layer, module)
        read = 64 * (prefix + 512) * TOKEN_BYTES
        rows.append(
            {
                "prefix": prefix,
                "groups_ms": median(groups),
                "no_groups_ms": median(apart),
                "gain": median(apart) / median(groups),
                "cascade_ms": median(cascade) if cascade else None,
                "gain_over_peers": over_peers(peer, groups, cascade),
                "peers": peer,
                "no_groups_share_of_copy": read / median(apart) / 1e6 / copy_gb_s,
                "samples": {"groups": groups, "no_groups": apart, "cascade": cascade},
            }
        )
    return rows


def main() -> None:
    device = require_gpu()
    checked = check()
    module, reason = flashinfer_or_reason()
    print(reason)
    steps = FlashInferSteps(module, device) if module else None
    measured = ceilings()
    blended = blended_rows(steps, module)
    table(blended, ["decodes", "prefill_ms", "decode_ms", "blended_ms", "gain", "pod_ms",
                    "gain_over_peers"])  # fmt: skip
    shared = shared_rows(measured["copy_gb_s"], steps, module)
    table(shared, ["prefix", "groups_ms", "no_groups_ms", "gain", "cascade_ms", "gain_over_peers",
                   "no_groups_share_of_copy"])  # fmt: skip
    write(
        "gpu-attention",
        {
            "checked": checked,
            "flashinfer": reason,
            "ceilings": measured,
            "blended": blended,
            "shared_prefix": shared,
            "bars": {"blended_gain": 1.15, "decode_share_of_copy": 0.8},
        },
    )


if __name__ == "__main__":
    main()
