"""SGLang's settings, looked at before it loads weights: what cannot be served is refused then.

SGLang has resolved them by that time: which attention backend, which CUDA graphs it takes.
"""

from __future__ import annotations

import os
from typing import Any

from blendserve.runtime.attention import BACKEND_NAME

# What `blendserve doctor` shows of them.
SHOWN = (
    *("model_path", "device", "dtype", "kv_cache_dtype", "attention_backend"),
    *("prefill_attention_backend", "decode_attention_backend", "sampling_backend"),
    *("chunked_prefill_size", "enable_mixed_chunk", "disable_overlap_schedule", "page_size"),
    *("radix_cache_backend", "schedule_policy", "mem_fraction_static", "tp_size", "dp_size"),
)


def resolved(server_args: Any) -> Any:
    """SGLang's settings as resolved; the record keeps what the user gave from 0.5.20 on."""
    try:
        from sglang.srt.arg_groups.overrides import resolved_view
    except ImportError:
        return server_args
    return resolved_view(server_args)


def graph_backends(settings: Any) -> tuple[str, str]:
    """SGLang's kinds of CUDA graph for prefill and decode; "" where it has no such choice."""
    graphs = getattr(settings, "cuda_graph_config", None)
    return (
        _name(getattr(getattr(graphs, "prefill", None), "backend", "")),
        _name(getattr(getattr(graphs, "decode", None), "backend", "")),
    )


def most_graphed_decodes(settings: Any) -> int | None:
    """Decodes up to which a step is replayed from a CUDA graph; None where SGLang does not say."""
    graphs = getattr(settings, "cuda_graph_config", None)
    return getattr(getattr(graphs, "decode", None), "max_bs", None)


def _name(backend: Any) -> str:
    return str(getattr(backend, "value", backend) or "")


def refusals(settings: Any) -> list[str]:
    """Why these resolved settings cannot be served, a sentence with a remedy each."""
    found = []
    if (getattr(settings, "disaggregation_mode", None) or "null") != "null":
        found.append(
            "--disaggregation-mode: planned requests wait in queues of ours, which SGLang's "
            "disaggregated prefill and decode servers pass by. Leave the flag away; to overlap "
            "prefill and decode on one GPU, see --enable-pdmux in docs/kernels.md"
        )
    prefill, _ = graph_backends(settings)
    if (
        settings.enable_mixed_chunk
        and str(settings.device).startswith("cuda")
        and prefill not in ("", "breakable", "disabled")
    ):
        found.append(
            f"--enable-mixed-chunk: SGLang mixes steps only under its breakable prefill graphs, "
            f"and this model or these flags take {prefill} ones. Give --disable-mixed-chunk, or "
            "--cuda-graph-backend-prefill breakable where the model allows it"
        )
    if (
        str(settings.device) == "cpu"
        and (getattr(settings, "page_size", None) or 1) > 1
        # Its interpreter runs them, slowly: for tests.
        and os.environ.get("TRITON_INTERPRET") != "1"
    ):
        found.append(
            f"--page-size {settings.page_size}: SGLang allocates pages with kernels that need a "
            "GPU. Leave the flag away on a CPU"
        )
    backends = {
        getattr(settings, f"{part}attention_backend", None) for part in ("", "prefill_", "decode_")
    }
    if (
        BACKEND_NAME in backends
        and getattr(settings, "speculative_algorithm", None)
        and not getattr(settings, "speculative_draft_attention_backend", None)
    ):
        found.append(
            f"--attention-backend {BACKEND_NAME}: SGLang's draft models of speculative decoding do "
            "not know it. Leave it away, or add --speculative-draft-attention-backend flashinfer"
        )
    return found


def check(_: Any, server_args: Any) -> None:
    """After SGLang's own check of its settings. Raises SystemExit: they cannot be served."""
    found = refusals(resolved(server_args))
    if found:
        raise SystemExit("blendserve: " + "; ".join(found))
