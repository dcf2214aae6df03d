"""What the cost model needs to know about a model, read from any Hugging Face config.json."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from .model_shape import ConfigReader, ModelShape, ModelSpecError, parameter_counts
from .vision_shape import VisionShape, vision_shape

__all__ = ["MODEL_SPECS", "ModelSpec", "ModelSpecError", "model_spec"]

_DTYPE_BYTES = {
    "float64": 8.0,
    "float32": 4.0,
    "float": 4.0,
    "float16": 2.0,
    "half": 2.0,
    "bfloat16": 2.0,
    "float8_e4m3fn": 1.0,
    "float8_e5m2": 1.0,
    "int8": 1.0,
}
# SGLang's pool for windows has 0.8 times the tokens of the other (--swa-full-tokens-ratio).
_WINDOW_POOL = 0.8
_STATE_BYTES = 4.0  # SGLang keeps the states of linear attention in float32.


@dataclass(frozen=True)
class ModelSpec:
    """Sizes of one model.

    params_per_token: parameters a token passes through (P): all layers, only the activated experts
        of a MoE, and the lm_head once; not the embedding table, which is looked up.
    total_params: all parameters, experts and embeddings included; tied embeddings once.
    weight_bytes: memory that the weights take.
    attention_width: query heads x head_dim, the H of the attention FLOPs; equals hidden_size for
        most models. With MLA the mean of the query-key and the value width.
    kv_bytes_per_token: KV cache of one token over the layers whose attention reaches the whole
        context. With MLA the compressed latent.
    window_kv_bytes_per_token, window_tokens: of the layers whose attention reaches only so many
        tokens back (sliding windows, chunks); 0 where there are none.
    pool_bytes_per_token: memory of the KV pool per token that it is said to hold.
    state_bytes: what linear-attention layers keep of a request, however long it is.
    kv_shards: ranks that tensor parallelism can divide that cache among: one per KV head; 1 with
        MLA, as every head needs the whole latent.
    context_length: the longest prompt plus output, in tokens.
    dtype_bytes: bytes per element of the serving dtype.
    weight_dtype, kv_dtype: of the matrices and of the KV cache, as kernel tables name them.
    shape: the integers that all this follows from.
    vision: the encoder of pictures; None where there is none.
    caveats: what of the config this reading does not know; to be shown to whoever relies on it.
    """

    name: str
    params_per_token: int
    total_params: int
    weight_bytes: int
    hidden_size: int
    attention_width: int
    num_layers: int
    num_attention_heads: int
    num_kv_heads: int
    head_dim: int
    kv_bytes_per_token: float
    window_kv_bytes_per_token: float
    window_tokens: int
    pool_bytes_per_token: float
    state_bytes: float
    kv_shards: int
    context_length: int
    dtype_bytes: float
    weight_dtype: str
    kv_dtype: str
    shape: ModelShape
    caveats: tuple[str, ...] = ()
    vision: VisionShape | None = None

    @classmethod
    def from_config(
        cls,
        config: Mapping[str, Any] | str | Path,
        *,
        weight_bytes_per_param: float | None = None,
        kv_bytes_per_element: float | None = None,
    ) -> ModelSpec:
        """Reads a parsed config.json, the path of one, or the folder that holds one.

        Dense, GQA/MQA, mixture-of-experts and MLA models; a nested text_config is followed. Biases
        and positional embeddings are not counted (below 0.1 % of the parameters).
        weight_bytes_per_param and kv_bytes_per_element override what the config's dtype and
        quantization_config imply. Raises ModelSpecError (a ValueError) that names the file, the
        key and the remedy.
        """
        mapping, source = _load(config)
        reader = ConfigReader(mapping, source)
        shape = reader.shape()
        dtype_bytes = _dtype_bytes(reader)
        active, total = parameter_counts(shape)
        table = shape.vocab_size * shape.hidden_size
        if weight_bytes_per_param is None:
            per_weight = _quantized_bytes(reader)
            # Quantisers leave the embedding table and the lm_head in the model's dtype.
            tables = table if shape.tied else 2 * table
            weight_bytes = (
                total * dtype_bytes
                if per_weight is None
                else (total - tables) * per_weight + tables * dtype_bytes
            )
        else:
            weight_bytes = total * weight_bytes_per_param
        kv_element = dtype_bytes if kv_bytes_per_element is None else kv_bytes_per_element
        per_layer = shape.kv_elements_per_layer * kv_element
        window = shape.window
        windowed = window.layers * per_layer if window else 0.0
        return cls(
            name=reader.name(),
            params_per_token=active,
            total_params=total,
            weight_bytes=round(weight_bytes),
            hidden_size=shape.hidden_size,
            attention_width=shape.attention_width,
            num_layers=shape.num_layers,
            num_attention_heads=shape.heads,
            num_kv_heads=shape.kv_heads,
            head_dim=shape.head_dim,
            kv_bytes_per_token=shape.full_layers * per_layer,
            window_kv_bytes_per_token=windowed,
            window_tokens=window.tokens if window else 0,
            pool_bytes_per_token=shape.full_layers * per_layer
            + (_WINDOW_POOL if window and window.pooled else 1.0) * windowed,
            state_bytes=shape.linear.state_elements * _STATE_BYTES if shape.linear else 0.0,
            kv_shards=shape.kv_heads if shape.mla is None else 1,
            context_length=reader.context_length(),
            dtype_bytes=dtype_bytes,
            weight_dtype=_weight_dtype(reader),
            kv_dtype="fp8" if kv_element == 1 else "bfloat16",
            shape=shape,
            caveats=reader.caveats(),
            vision=vision_shape(mapping),
        )

    def with_kv_bytes(self, factor: float) -> ModelSpec:
        """The same with so many times the KV bytes: another KV dtype, or copies on ranks."""
        return replace(
            self,
            kv_bytes_per_token=self.kv_bytes_per_token * factor,
            window_kv_bytes_per_token=self.window_kv_bytes_per_token * factor,
            pool_bytes_per_token=self.pool_bytes_per_token * factor,
        )


def _load(config: Mapping[str, Any] | str | Path) -> tuple[Mapping[str, Any], str]:
    if isinstance(config, Mapping):
        return config, "the given config"
    path = Path(config)
    if path.is_dir():
        path = path / "config.json"
    try:
        parsed = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise ModelSpecError(
            f"{path}: no such file; give a config.json, a folder that holds one, or one of the "
            f"known models: {', '.join(sorted(_KNOWN))}"
        ) from None
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise ModelSpecError(
            f"{path}: not valid JSON ({error}); fetch the model's config.json again"
        ) from error
    if not isinstance(parsed, dict):
        raise ModelSpecError(f"{path}: must hold a JSON object; fetch the model's config.json")
    return parsed, str(path)


def _dtype_bytes(reader: ConfigReader) -> float:
    name = reader.optional_text("torch_dtype", "dtype")
    if name is None:
        return 2.0  # Every serving engine's default for a config that does not say.
    size = _DTYPE_BYTES.get(name.removeprefix("torch."))
    if size is None:
        raise ModelSpecError(
            f"{reader.source}: torch_dtype {name!r} is unknown; use one of "
            f"{', '.join(sorted(_DTYPE_BYTES))}"
        )
    return size


def _quantized_bytes(reader: ConfigReader) -> float | None:
    """Bytes per quantised weight, None when the config names no (known) quantisation."""
    quantization = reader.section("quantization_config")
    if quantization is None:
        return None
    method = str(quantization.get("quant_method", "")).lower()
    bits = quantization.get("bits") or quantization.get("w_bit")
    if bits is None and quantization.get("load_in_4bit"):
        bits = 4
    if bits is None and (quantization.get("load_in_8bit") or "fp8" in method):
        bits = 8
    if bits is None and method == "mxfp4":
        bits = 4.25  # 4 bits and an 8-bit scale per 32 weights.
    if bits is None:
        for group in (quantization.get("config_groups") or {}).values():
            bits = (group.get("weights") or {}).get("num_bits")
    return None if bits is None else float(bits) / 8


def _weight_dtype(reader: ConfigReader) -> str:
    """As the kernel tables name it: "bfloat16" stands for both 16-bit types."""
    quantization = reader.section("quantization_config")
    if quantization is None:
        return "bfloat16"
    method = str(quantization.get("quant_method", "")).lower()
    if quantization.get("weight_block_size"):
        return "fp8_block"
    bits = _quantized_bytes(reader)
    return method if method == "mxfp4" else "fp8" if bits == 1.0 else f"{method} {bits} bytes"


_KNOWN: dict[str, dict[str, Any]] = {
    "llama-3.1-8b": {
        "model_type": "llama",
        "hidden_size": 4096,
        "intermediate_size": 14336,
        "num_hidden_layers": 32,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
        "vocab_size": 128256,
        "max_position_embeddings": 131072,
        "tie_word_embeddings": False,
        "torch_dtype": "bfloat16",
    },
    "llama-3.1-70b": {
        "model_type": "llama",
        "hidden_size": 8192,
        "intermediate_size": 28672,
        "num_hidden_layers": 80,
        "num_attention_heads": 64,
        "num_key_value_heads": 8,
        "vocab_size": 128256,
        "max_position_embeddings": 131072,
        "tie_word_embeddings": False,
        "torch_dtype": "bfloat16",
    },
    "smollm2-135m": {
        "model_type": "llama",
        "hidden_size": 576,
        "intermediate_size": 1536,
        "num_hidden_layers": 30,
        "num_attention_heads": 9,
        "num_key_value_heads": 3,
        "vocab_size": 49152,
        "max_position_embeddings": 8192,
        "tie_word_embeddings": True,
        "torch_dtype": "float32",
    },
}

MODEL_SPECS: dict[str, ModelSpec] = {
    name: replace(ModelSpec.from_config(config), name=name) for name, config in _KNOWN.items()
}


def model_spec(name_or_path: str | Path, kv_bytes_per_element: float | None = None) -> ModelSpec:
    """A model of `MODEL_SPECS` by name, else `ModelSpec.from_config` of the path; the KV cache in
    the model's dtype, or of elements of the given size."""
    name = str(name_or_path).lower()
    if name not in MODEL_SPECS:
        return ModelSpec.from_config(name_or_path, kv_bytes_per_element=kv_bytes_per_element)
    if kv_bytes_per_element is None:
        return MODEL_SPECS[name]
    spec = ModelSpec.from_config(_KNOWN[name], kv_bytes_per_element=kv_bytes_per_element)
    return replace(spec, name=name)
