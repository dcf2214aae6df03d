"""A Llama that is small enough for tests: seeded random weights, the default model's tokenizer.

What it says is noise, but the same noise on every server, so it tells as well as a real model
whether two servers computed the same. END_TO_END_MODEL names a real one to use instead.
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import torch
from safetensors.torch import save_file

from blendserve.runtime.default_model import resolve_model_path

HIDDEN, LAYERS, HEADS, KV_HEADS, FFN = 64, 3, 4, 2, 128
TOKENIZER_FILES = ("tokenizer.json", "tokenizer_config.json", "generation_config.json")


def build(folder: Path, seed: int = 0) -> Path:
    """Write the model into a folder, in Hugging Face form, and return the folder."""
    source = Path(resolve_model_path("smollm2-135m"))
    config = json.loads((source / "config.json").read_text())
    config |= {
        "hidden_size": HIDDEN,
        "num_hidden_layers": LAYERS,
        "num_attention_heads": HEADS,
        "num_key_value_heads": KV_HEADS,
        "head_dim": HIDDEN // HEADS,
        "intermediate_size": FFN,
    }
    folder.mkdir(parents=True)
    (folder / "config.json").write_text(json.dumps(config))
    for name in TOKENIZER_FILES:
        if (source / name).exists():
            shutil.copy(source / name, folder / name)
    for template in source.glob("*.jinja"):
        shutil.copy(template, folder / template.name)
    save_file(_weights(config["vocab_size"], seed), folder / "model.safetensors", {"format": "pt"})
    return folder


def _weights(vocab_size: int, seed: int) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)

    def random(*shape: int) -> torch.Tensor:
        # Wide enough that attention looks at more than the last token.
        return torch.randn(*shape, generator=generator) * 3 / shape[-1] ** 0.5

    weights = {"model.embed_tokens.weight": random(vocab_size, HIDDEN)}
    weights["model.norm.weight"] = torch.ones(HIDDEN)
    kv = HIDDEN // HEADS * KV_HEADS
    for layer in range(LAYERS):
        prefix = f"model.layers.{layer}."
        weights |= {
            prefix + "input_layernorm.weight": torch.ones(HIDDEN),
            prefix + "post_attention_layernorm.weight": torch.ones(HIDDEN),
            prefix + "self_attn.q_proj.weight": random(HIDDEN, HIDDEN),
            prefix + "self_attn.k_proj.weight": random(kv, HIDDEN),
            prefix + "self_attn.v_proj.weight": random(kv, HIDDEN),
            prefix + "self_attn.o_proj.weight": random(HIDDEN, HIDDEN),
            prefix + "mlp.gate_proj.weight": random(FFN, HIDDEN),
            prefix + "mlp.up_proj.weight": random(FFN, HIDDEN),
            prefix + "mlp.down_proj.weight": random(HIDDEN, FFN),
        }
    return weights
