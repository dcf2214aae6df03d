"""The measurements of the campaign that need no engine: each writes its rows as it goes.

    python benchmark/gpu/measurements.py STEP --out FOLDER

A step runs in a process of its own, which campaign.py starts; see there for the order.
"""

from __future__ import annotations

import argparse
import importlib
import itertools
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from batches import DTYPE, SHAPE, TOKEN_BYTES, Layer
from kernel_times import tables
from peers import KV_SPLITS, flash_attention_3, flashinfer_apart, sglang_triton
from report import (
    DEVICE,
    DRY,
    Rows,
    device_report,
    median,
    milliseconds,
    multiprocessors,
    synchronize,
)

from sgl_kernel_ext import gpu, reference
from sgl_kernel_ext.gpu import kernels
from sgl_kernel_ext.gpu.attention import to_device
from sgl_kernel_ext.gpu.choice import flashinfer_or_reason
from sgl_kernel_ext.gpu.flashinfer_steps import FlashInferSteps, plan_bytes
from sgl_kernel_ext.plan import plan_segments

# Weights of one Llama-3.1-8B layer: QKV, output, gate and up, down.
GEMMS = ((64, 96), (64, 64)) if DRY else ((4096, 6144), (4096, 4096), (4096, 28672), (14336, 4096))
# Sides (n, k) of the matrices that the table of GEMMs spans: those of 8B and 70B models, and ranks.
GEMM_SIDES = ((64, 96), (64,)) if DRY else ((4096, 6144, 28672), (4096, 14336))
MOST_CONTEXT_TOKENS = 600_000  # of a decode step: 2.5 GB of keys and values
LAYERS = 2 if DRY else 32
# Below what is allowed in half precision, and in the float32 of a dry run.
TOLERANCE = 1e-5 if DRY else 2e-2


def sized(full: int, dry: int) -> int:
    return dry if DRY else full


def few(*full: int) -> tuple[int, ...]:
    """These sizes; one small one in a dry run."""
    return (2,) if DRY else full


def ceilings() -> dict[str, float]:
    """Copy bandwidth in GB/s and the rate of a large GEMM in TFLOP/s."""
    size, side = sized(2**30, 2**16), sized(8192, 64)
    source = torch.empty(size, dtype=torch.uint8, device=DEVICE)
    target = torch.empty_like(source)
    copy = median(milliseconds(lambda: target.copy_(source)))
    a, b = (torch.randn(side, side, dtype=DTYPE, device=DEVICE) for _ in range(2))
    gemm = median(milliseconds(lambda: a @ b))
    return {"copy_gb_s": 2 * size / copy / 1e6, "gemm_tflop_s": 2 * side**3 / gemm / 1e9}


def error_of(layer: Layer, call: Callable[[], None]) -> float:
    """Relative error against float64; every output row is poisoned before."""
    layer.output.fill_(float("nan"))
    call()
    synchronize()
    tensors = (layer.query, layer.key_pool, layer.value_pool, layer.table)
    expected = reference.attention(*tensors, layer.batch, SHAPE)
    return float(reference.relative_error(layer.output, expected))


def flashinfer_call(layer: Layer, share: bool = True) -> Callable[[], None] | None:
    module, _ = flashinfer_or_reason()
    if module is None:
        return None
    family = FlashInferSteps(module, DEVICE, multiprocessors())
    run = family.plan(layer.step(share), SHAPE, DTYPE)
    if run is None:
        return None
    return lambda: run(layer.query, layer.key_pool, layer.value_pool, layer.output)


def small_layers() -> dict[str, Layer]:
    return {
        "mixed": Layer([(70, 40)], [200, 33, 128]),
        "decode": Layer([], [200, 33, 128, 64]),
        "shared": Layer([], [200] * 24, shared=128),
    }


def runs(rows: Rows) -> None:
    """Whether anything runs at all: what can be imported, one case per kernel against float64."""
    for name in ("triton", "sgl_kernel", "flashinfer", "sglang", "blendserve.runtime.guard"):
        try:
            module = importlib.import_module(name)
            rows.add(imported=name, version=str(getattr(module, "__version__", "")))
        except Exception as error:
            rows.add(imported=name, error=f"{type(error).__name__}: {error}"[:500])
    families = {"triton": Layer.triton, "flashinfer": flashinfer_call}
    # FlashInfer last: it compiles for minutes where nothing is compiled yet.
    for (family, make), (kind, layer) in itertools.product(
        families.items(), small_layers().items()
    ):
        _case(rows, kind, family, layer, lambda at=layer, m=make: m(at))


def _case(rows: Rows, kind: str, family: str, layer: Layer, make: Any) -> None:
    start = time.perf_counter()
    try:
        call = make()
        if call is None:
            return
        error = error_of(layer, call)
        rows.add(case=kind, family=family, error=error, right=bool(error < TOLERANCE),
                 seconds=time.perf_counter() - start)  # fmt: skip
    except Exception as problem:
        rows.add(case=kind, family=family, failed=f"{type(problem).__name__}: {problem}"[:500])


def measure_ceilings(rows: Rows) -> None:
    """What everything else is a share of."""
    rows.add(**ceilings())


def decode(rows: Rows) -> None:
    """Decode attention under each candidate: its share of the copy bandwidth."""
    copy = ceilings()["copy_gb_s"]
    length = sized(1024, 40)
    for batch in few(64, 256, 1024):
        layer = Layer([], [length] * batch)
        read = batch * length * TOKEN_BYTES
        for number, config in enumerate(kernels.candidates("decode_only", SHAPE.head_dim)):
            samples = milliseconds(_under(layer, config))
            rows.add(
                batch=batch, length=length, candidate=number, few_tile=config.kwargs["FEW_TILE"],
                warps=config.num_warps, stages=config.num_stages, ms=median(samples),
                share_of_copy=read / median(samples) / 1e6 / copy, samples=samples,
            )  # fmt: skip
            if DRY:
                break
        for name, make in PEERS.items():
            _timed(rows, {"batch": batch, "peer": name}, lambda at=layer, m=make: m(at))


def _under(layer: Layer, config: Any) -> Callable[[], None]:
    """The Triton decode kernel with one candidate and no other."""
    call = layer.triton(share=False)
    tuned = kernels.decode_only

    def run() -> None:
        if DRY:
            call()
            return
        kept, tuned.early_config_prune = tuned.early_config_prune, lambda *_, **__: [config]
        tuned.cache.clear()
        try:
            call()
        finally:
            tuned.early_config_prune = kept

    run()
    return call


PEERS: dict[str, Callable[[Layer], Callable[[], None] | None]] = {
    "fa3": flash_attention_3,
    **{f"sglang-triton-{n}": lambda layer, n=n: sglang_triton(layer, n) for n in KV_SPLITS},
    "flashinfer": lambda layer: flashinfer_apart(layer, flashinfer_or_reason()[0]),
}
if DRY:
    # In the interpreter one takes as long as all else; test/kernels checks it (peers.py).
    PEERS = {}


def _timed(rows: Rows, named: dict[str, Any], make: Callable[[], Any]) -> None:
    """A row with a call's time, or with what went wrong: one peer must not end the others."""
    try:
        call = make()
        if call is not None:
            samples = milliseconds(call)
            rows.add(**named, ms=median(samples), samples=samples)
    except Exception as error:
        rows.add(**named, failed=f"{type(error).__name__}: {error}"[:500])


def blended(rows: Rows) -> None:
    """A chunk over a prefix, beside decodes: one launch, two, and what SGLang would run."""
    chunk, cached, length = sized(2048, 24), sized(2048, 16), sized(2048, 40)
    for decodes in few(64, 256):
        lens = [length] * decodes
        mixed = Layer([(cached, chunk)], lens)
        named = {"decodes": decodes, "chunk": chunk}
        for part, layer in (("prefill", Layer([(cached, chunk)], [])), ("decode", Layer([], lens))):
            _timed(rows, {**named, "part": part}, lambda at=layer: at.triton(share=False))
        _timed(rows, {**named, "part": "blended"}, lambda at=mixed: at.triton(share=False))
        for name, make in PEERS.items():
            _timed(rows, {**named, "peer": name}, lambda at=mixed, m=make: m(at))
        _timed(rows, {**named, "part": "pod"}, lambda at=mixed: flashinfer_call(at, share=False))


def shared(rows: Rows) -> None:
    """64 decodes under a prefix: read once, or once each."""
    decodes, own = sized(64, 4), sized(512, 20)
    for prefix in (64,) if DRY else (4096, 16384):
        layer = Layer([], [prefix + own] * decodes, shared=prefix)
        for part, share in (("groups", True), ("no-groups", False)):
            _timed(rows, {"prefix": prefix, "part": part},
                   lambda at=layer, s=share: at.triton(share=s))  # fmt: skip
        for name, make in PEERS.items():
            _timed(rows, {"prefix": prefix, "peer": name}, lambda at=layer, m=make: m(at))
        _timed(rows, {"prefix": prefix, "part": "cascade"}, lambda at=layer: flashinfer_call(at))


def weights() -> list[torch.Tensor]:
    return [torch.randn(n, k, dtype=DTYPE, device=DEVICE) * k**-0.5 for k, n in GEMMS]


def gemms(layer: list[torch.Tensor], tokens: int) -> Callable[[], None]:
    inputs = [torch.randn(tokens, w.shape[1], dtype=DTYPE, device=DEVICE) for w in layer]
    outputs = [torch.empty(tokens, w.shape[0], dtype=DTYPE, device=DEVICE) for w in layer]

    def call() -> None:
        for x, w, out in zip(inputs, layer, outputs, strict=True):
            torch.mm(x, w.t(), out=out)

    return call


def graph(rows: Rows) -> None:
    """A decode step's layers replayed from a CUDA graph against launched one by one.

    A layer is its GEMMs, attention and 8 small kernels (norms, rotary embedding, activation, the
    KV write): what SGLang launches.
    """
    layer = weights()
    for decodes in few(1, 64, 256):
        attention = Layer([], [sized(1024, 40)] * decodes).triton(share=False)
        dense = gemms(layer, decodes)
        small = torch.zeros(decodes, GEMMS[0][0], dtype=DTYPE, device=DEVICE)

        def step(dense: Any = dense, attention: Any = attention, small: Any = small) -> None:
            for _ in range(LAYERS):
                dense()
                attention()
                for _ in range(8):
                    small.add_(1.0)

        samples = milliseconds(step, samples=10)
        eager = median(samples)
        row = {"decodes": decodes, "layers": LAYERS, "eager_ms": eager}
        if DRY:
            rows.add(**row, graph_ms=eager, seconds_per_layer=0.0)
            continue
        recorded = torch.cuda.CUDAGraph()
        with torch.cuda.graph(recorded):
            step()
        replayed = median(milliseconds(recorded.replay, samples=10))
        rows.add(**row, graph_ms=replayed, seconds_per_layer=(eager - replayed) / 1e3 / LAYERS)


def copies(rows: Rows) -> None:
    """How long planning keeps the host while the device is busy: it must not wait for it."""
    busy = torch.randn(sized(8192, 64), sized(8192, 64), dtype=DTYPE, device=DEVICE)
    for decodes in few(64, 256):
        layer = Layer([], [sized(1500, 40)] * decodes)
        step = layer.step(share=False)
        plan = plan_segments(
            layer.batch, SHAPE, gpu.tiling(SHAPE), multiprocessors(), step.segments
        )
        host = torch.from_numpy(np.ascontiguousarray(plan.items, dtype=np.int32))

        def pageable(host: torch.Tensor = host) -> None:
            host.to(DEVICE)

        def pinned(plan: Any = plan) -> None:
            to_device(plan, SHAPE, DEVICE)

        module, _ = flashinfer_or_reason()
        ways: dict[str, Callable[[], Any]] = {"pageable": pageable, "ours": pinned}
        if module is not None:
            family = FlashInferSteps(module, DEVICE, multiprocessors())
            ways["flashinfer-plan"] = lambda s=step, f=family: f.plan(s, SHAPE, DTYPE)
        for name, way in ways.items():
            way()
            synchronize()
            waits = []
            for _ in range(sized(10, 1)):
                for _ in range(sized(20, 1)):
                    busy @ busy
                start = time.perf_counter()
                way()
                waits.append(1e3 * (time.perf_counter() - start))
                synchronize()
            rows.add(decodes=decodes, way=name, host_ms=median(waits), samples=waits)


def interference(rows: Rows) -> None:
    """GEMMs and decode attention in two streams: the speed of each beside the other."""
    layer = weights()
    other = None if DRY else torch.cuda.Stream()
    for decodes in few(128, 256, 512, 1024):
        attention = Layer([], [sized(1024, 40)] * decodes).triton(share=False)
        for tokens in (sized(512, 8), sized(2048, 16)):
            dense = gemms(layer, tokens)

            def together(dense: Any = dense, attention: Any = attention) -> None:
                if other is None:
                    attention()
                    dense()
                    return
                other.wait_stream(torch.cuda.current_stream())
                with torch.cuda.stream(other):
                    attention()
                dense()
                torch.cuda.current_stream().wait_stream(other)

            alone = median(milliseconds(dense)), median(milliseconds(attention))
            both = median(milliseconds(together))
            rows.add(
                decodes=decodes, tokens=tokens, gemm_ms=alone[0], decode_ms=alone[1],
                together_ms=both, of_sum=both / sum(alone), of_maximum=both / max(alone),
            )  # fmt: skip


def costs(rows: Rows) -> None:
    """What step times are made of: GEMMs of a layer by tokens, attention by requests and tokens of
    each. Kept as the engine model reads them, beside hardware.json."""
    for n, k in itertools.product(*GEMM_SIDES):
        weight = torch.randn(n, k, dtype=DTYPE, device=DEVICE) * k**-0.5
        for tokens in few(1, 16, 64, 128, 256, 512, 1024, 2048, 4096, 8192):
            samples = milliseconds(gemms([weight], tokens), samples=10)
            rows.add(kind="gemm", n=n, k=k, tokens=tokens, seconds=median(samples) / 1e3)
    for requests, tokens in itertools.product(few(1, 8, 64, 256), few(512, 2048, 8192)):
        if requests * tokens <= MOST_CONTEXT_TOKENS:
            _attention_cost(rows, "decode", requests, tokens, Layer([], [tokens] * requests))
    for requests, tokens in itertools.product(few(1, 4), few(256, 1024, 2048, 8192)):
        _attention_cost(rows, "prefill", requests, tokens, Layer([(0, tokens)] * requests, []))
    measured, chip = rows.read(), device_report()
    kernels = sorted({row["kernel"] for row in measured if "kernel" in row})
    heads = (SHAPE.heads, SHAPE.kv_heads, SHAPE.head_dim, 0)
    source = f"benchmark/gpu/campaign.py, {chip['date']}, attention: {', '.join(kernels)}"
    tables(measured, heads, chip["device"], source).save(rows.path.with_name("kernels.npz"))


def _attention_cost(rows: Rows, kind: str, requests: int, tokens: int, layer: Layer) -> None:
    """By the kernel that `serve` runs on Hopper; where that is not installed, by ours."""
    call = None if DRY else flash_attention_3(layer)
    samples = milliseconds(call or layer.triton(share=False), samples=10)
    rows.add(
        kind=kind, requests=requests, tokens=tokens, kernel="fa3" if call else "triton",
        seconds=median(samples) / 1e3,
    )  # fmt: skip


def pod(rows: Rows) -> None:
    """POD attention at the shapes that need the largest workspace, and at usual ones."""
    for chunk, cached in ((sized(28, 8), sized(4000, 16)), (sized(128, 16), sized(4096, 16)),
                          (sized(2048, 24), sized(2048, 16))):  # fmt: skip
        for decodes in few(1, 8, 64, 256):
            layer = Layer([(cached, chunk)], [sized(2048, 40)] * decodes)
            named = {
                "chunk": chunk, "cached": cached, "decodes": decodes,
                "workspace_bytes": 2 * plan_bytes(SHAPE, multiprocessors()),
            }  # fmt: skip
            _timed(rows, named, lambda at=layer: flashinfer_call(at, share=False))
            _timed(rows, {**named, "peer": "blended"}, lambda at=layer: at.triton(share=False))


STEPS: dict[str, Callable[[Rows], None]] = {
    "runs": runs, "ceilings": measure_ceilings, "decode": decode, "blended": blended,
    "shared": shared, "graph": graph, "copies": copies, "interference": interference,
    "costs": costs, "pod": pod,
}  # fmt: skip


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("step", choices=STEPS)
    parser.add_argument("--out", type=Path, required=True)
    options = parser.parse_args()
    rows = Rows(options.out / f"{options.step}.jsonl")
    STEPS[options.step](rows)
    written = rows.read()
    wrong = [row for row in written if row.get("right") is False]
    return 1 if wrong or not written else 0


if __name__ == "__main__":
    sys.exit(main())
