"""The vision encoder of a model, from the vision_config of its config.json."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

_DEPTH = ("depth", "num_hidden_layers", "num_layers", "n_layers")
# Qwen2-VL's hidden_size is the language model's; its encoder's is embed_dim.
_WIDTH = ("embed_dim", "hidden_size", "embed_size")
_FFN = ("intermediate_size", "ffn_hidden_size")
# Three matrices in the feed-forward block.
_GATED = ("qwen2_5_vl", "qwen2_5_omni_vision_encoder", "pixtral", "mistral3", "mllama_vision_model")


@dataclass(frozen=True)
class VisionShape:
    """A transformer over the patches of a picture.

    params_per_patch: parameters that work on each patch, the merger into tokens included.
    layers, width: of the transformer.
    full_layers: of these, the layers in which a patch attends to all others of its picture.
    window: patches that it attends to in the other layers; 0 where there are none.
    reach: patches of the largest picture, where larger ones are scaled down or cut up; 0: no bound.
    """

    params_per_patch: int
    layers: int
    width: int
    full_layers: int
    window: int
    reach: int


def vision_shape(config: Mapping[str, Any]) -> VisionShape | None:
    """The encoder of a parsed config.json; None where it has none, or one of unknown form."""
    outer = config.get("thinker_config", config)
    vision = outer.get("vision_config") if isinstance(outer, Mapping) else None
    if not isinstance(vision, Mapping):
        return None
    layers, width = _first(vision, _DEPTH), _first(vision, _WIDTH)
    patch = _side(vision.get("patch_size"))
    if not layers or not width or not patch:
        return None
    ffn = _first(vision, _FFN) or int(width * float(vision.get("mlp_ratio") or 4))
    gated = str(vision.get("model_type", "")).startswith(_GATED)
    channels = _first(vision, ("in_channels", "in_chans", "num_channels")) or 3
    frames = _first(vision, ("temporal_patch_size",)) or 1
    merge = _first(vision, ("spatial_merge_size",)) or 1
    merged = width * merge * merge if merge > 1 else 0
    out = _first(vision, ("out_hidden_size",)) or _first(vision, ("hidden_size",)) or width
    full = vision.get("fullatt_block_indexes")
    window = _first(vision, ("window_size",)) if full is not None else 0
    side = _side(vision.get("image_size"))
    return VisionShape(
        params_per_patch=channels * frames * patch * patch * width
        + layers * (4 * width * width + (3 if gated else 2) * width * ffn)
        + (merged * merged + merged * out) // (merge * merge),
        layers=layers,
        width=width,
        full_layers=len(full) if window and isinstance(full, list | tuple) else layers,
        window=(window // patch) ** 2,
        reach=(side // patch) ** 2,
    )


def _first(config: Mapping[str, Any], names: tuple[str, ...]) -> int:
    """The first of these keys that holds a positive whole number; 0 where none does."""
    found = (config.get(name) for name in names)
    return next((value for value in found if type(value) is int and value > 0), 0)


def _side(value: Any) -> int:
    """Of a square, given as its side or as (height, width)."""
    value = value[0] if isinstance(value, list | tuple) and value else value
    return value if type(value) is int and value > 0 else 0
