"""The engine that `plan` and `simulate` reckon with: model, devices and KV cache, from one set of
flags with the server's names."""

from __future__ import annotations

import argparse
import math

from blendserve.cli.arguments import positive
from blendserve.planner import (
    HARDWARE,
    MODEL_SPECS,
    CostModel,
    hardware,
    kv_capacity_tokens,
    model_spec,
)

# SGLang's names for what it can keep in the KV cache, with bytes per element.
KV_CACHE_DTYPES = {"auto": None, "bfloat16": 2.0, "fp8_e4m3": 1.0, "fp8_e5m2": 1.0}
KNOWN = f"Models: {', '.join(sorted(MODEL_SPECS))}. Hardware: {', '.join(sorted(HARDWARE))}."


def add_engine_flags(parser: argparse.ArgumentParser) -> None:
    """--model-spec, --hardware, --tp, --kv-cache-dtype, --page-size and --kv-tokens."""
    parser.add_argument(
        "--model-spec", required=True, metavar="NAME|PATH", help="model, config.json or its folder"
    )
    parser.add_argument(
        "--hardware",
        required=True,
        metavar="NAME|FILE.json",
        help="device of a replica, or a file of its measured ceilings",
    )
    parser.add_argument("--tp", type=positive, default=1, help="devices per replica (default: 1)")
    parser.add_argument(
        "--kv-cache-dtype",
        choices=KV_CACHE_DTYPES,
        default="auto",
        help="as for the server (default: auto, the model's dtype)",
    )
    parser.add_argument(
        "--page-size",
        type=positive,
        default=1,
        help="tokens of a page of KV cache; only whole pages are shared (default: 1)",
    )
    parser.add_argument(
        "--kv-tokens",
        type=positive,
        help="tokens of KV cache per replica (default: 0.9 of the memory, less the weights)",
    )


def engine_of(options: argparse.Namespace) -> tuple[CostModel, int]:
    """(costs, tokens of KV cache of a replica).

    Raises ModelSpecError or HardwareError for unknown names and files that cannot be used,
    ValueError where the weights leave no room for a KV cache.
    """
    model = model_spec(options.model_spec, KV_CACHE_DTYPES[options.kv_cache_dtype])
    cost_model = CostModel.attained(model, hardware(options.hardware), options.tp)
    capacity = options.kv_tokens
    if capacity is None:
        try:
            capacity = kv_capacity_tokens(cost_model)
        except ValueError as error:
            raise ValueError(f"{error} (--tp, or --kv-tokens for a size of your own)") from error
    return cost_model, math.floor(capacity / options.page_size) * options.page_size
