"""What this chip can do, what the cost model says, and what happens when both halves run at once.

    python benchmark/gpu/ceilings.py

GEMM and paged decode attention as in the paper's Table 1 (sequences of 1,024, batches of 512, 768
and 1,024, Llama-3.1-8B), against blendserve's cost model; then decode attention beside GEMMs in a
second stream, with more or fewer programs, as the interference curve of this chip.
"""

from __future__ import annotations

from typing import Any

import torch
from batches import SHAPE, TOKEN_BYTES, Layer
from report import median, milliseconds, require_gpu, table, write

# Weights of one Llama-3.1-8B layer: QKV, output, gate and up, down.
GEMMS = ((4096, 6144), (4096, 4096), (4096, 28672), (14336, 4096))
BATCHES = (512, 768, 1024)
SEQUENCE = 1024
LAYERS = 32


def ceilings() -> dict[str, float]:
    """Copy bandwidth in GB/s and the rate of a large bfloat16 GEMM in TFLOP/s."""
    source = torch.empty(2**30, dtype=torch.uint8, device="cuda")
    target = torch.empty_like(source)
    copy = median(milliseconds(lambda: target.copy_(source)))
    a, b = (torch.randn(8192, 8192, dtype=torch.bfloat16, device="cuda") for _ in range(2))
    gemm = median(milliseconds(lambda: a @ b))
    return {
        "copy_gb_s": 2 * source.numel() / copy / 1e6,
        "gemm_tflop_s": 2 * 8192**3 / gemm / 1e9,
    }


def weights() -> list[torch.Tensor]:
    return [torch.randn(n, k, dtype=torch.bfloat16, device="cuda") * k**-0.5 for k, n in GEMMS]


def gemms(layer: list[torch.Tensor], tokens: int) -> Any:
    inputs = [torch.randn(tokens, w.shape[1], dtype=torch.bfloat16, device="cuda") for w in layer]
    outputs = [torch.empty(tokens, w.shape[0], dtype=torch.bfloat16, device="cuda") for w in layer]

    def call() -> None:
        for x, w, out in zip(inputs, layer, outputs, strict=True):
            torch.mm(x, w.t(), out=out)

    return call


def cost_model_rows(measured: dict[str, float]) -> list[dict[str, Any]]:
    """One layer's GEMMs and decode attention; the model takes this chip's measured ceilings."""
    layer = weights()
    flops = sum(2 * w.numel() for w in layer)
    rows = []
    for batch in BATCHES:
        gemm = milliseconds(gemms(layer, batch))
        decode = milliseconds(Layer([], [SEQUENCE] * batch).triton(share=False))
        predicted_gemm = batch * flops / (measured["gemm_tflop_s"] * 1e9)
        predicted_decode = batch * SEQUENCE * TOKEN_BYTES / (measured["copy_gb_s"] * 1e6)
        rows.append(
            {
                "batch": batch,
                "gemm_ms": median(gemm),
                "gemm_model_ms": predicted_gemm,
                "gemm_error": median(gemm) / predicted_gemm - 1,
                "decode_ms": median(decode),
                "decode_model_ms": predicted_decode,
                "decode_error": median(decode) / predicted_decode - 1,
                "decode_share_of_copy": predicted_decode / median(decode),
                "samples": {"gemm": gemm, "decode": decode},
            }
        )
    return rows


def interference_rows() -> list[dict[str, Any]]:
    """Both at once, in two streams, at several mixes: speed of each relative to running alone."""
    layer = weights()
    rows = []
    other = torch.cuda.Stream()
    for batch in (128, 256, 512, 1024):
        decode = Layer([], [SEQUENCE] * batch).triton(share=False)
        for tokens in (512, 1024, 2048, 4096):
            gemm = gemms(layer, tokens)

            def together(gemm: Any = gemm, decode: Any = decode) -> None:
                other.wait_stream(torch.cuda.current_stream())
                with torch.cuda.stream(other):
                    decode()
                gemm()
                torch.cuda.current_stream().wait_stream(other)

            alone = median(milliseconds(gemm)), median(milliseconds(decode))
            both = milliseconds(together)
            rows.append(
                {
                    "decode_batch": batch,
                    "gemm_tokens": tokens,
                    "gemm_ms": alone[0],
                    "decode_ms": alone[1],
                    "together_ms": median(both),
                    "of_sum": median(both) / sum(alone),
                    "of_maximum": median(both) / max(alone),
                    "samples": both,
                }
            )
    return rows


def main() -> None:
    require_gpu()
    measured = ceilings()
    print(measured)
    model = cost_model_rows(measured)
    table(model, ["batch", "gemm_ms", "gemm_model_ms", "gemm_error", "decode_ms",
                  "decode_model_ms", "decode_error", "decode_share_of_copy"])  # fmt: skip
    both = interference_rows()
    table(both, ["decode_batch", "gemm_tokens", "gemm_ms", "decode_ms", "together_ms", "of_sum",
                 "of_maximum"])  # fmt: skip
    shape = {"heads": SHAPE.heads, "kv_heads": SHAPE.kv_heads, "head_dim": SHAPE.head_dim}
    write(
        "gpu-ceilings",
        {"ceilings": measured, "shape": shape, "cost_model": model, "interference": both},
    )


if __name__ == "__main__":
    main()
