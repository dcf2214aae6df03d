"""Vision-language models that are small enough for tests: seeded random weights, a real tokenizer.

    python test/end_to_end/tiny_vlm.py qwen2-vl FOLDER

Two layers, hidden size 64, the default model's tokenizer with the special tokens added, a chat
template of our own. What transformers writes lacks some of what published checkpoints have, and
SGLang reads: see the comments.
"""

from __future__ import annotations

import json
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file

from blendserve.runtime import cpu_platform

# Before anything imports torchvision.
cpu_platform.activate()

from transformers import AutoTokenizer  # noqa: E402

from blendserve.runtime.default_model import resolve_model_path  # noqa: E402

QWEN_TOKENS = (
    *("<|vision_start|>", "<|vision_end|>", "<|vision_pad|>"),
    *("<|image_pad|>", "<|video_pad|>"),
)
GEMMA_TOKENS = (
    *("<start_of_image>", "<end_of_image>", "<image_soft_token>"),
    *("<start_of_turn>", "<end_of_turn>"),
)
MISTRAL_TOKENS = ("[IMG]", "[IMG_BREAK]", "[IMG_END]")
_TEXT = {
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 8_192,
}
_HALF = {"image_mean": [0.5] * 3, "image_std": [0.5] * 3}


def chat_template(image: str, video: str = "") -> str:
    """Turns as `role: parts`, one line each; a part that is an image or a video becomes a text."""
    part = (
        "{% if part['type'] == 'text' %}{{ part['text'] }}"
        f"{{% elif 'image' in part['type'] %}}{image}"
        f"{{% elif 'video' in part['type'] %}}{video}{{% endif %}}"
    )
    content = (
        "{% if turn['content'] is string %}{{ turn['content'] }}{% else %}"
        f"{{% for part in turn['content'] %}}{part}{{% endfor %}}{{% endif %}}"
    )
    end = "{% if add_generation_prompt %}assistant: {% endif %}"
    return f"{{% for turn in messages %}}{{{{ turn['role'] }}}}: {content}\n{{% endfor %}}{end}"


def tokenizer_with(tokens: tuple[str, ...]) -> tuple[Any, dict[str, int]]:
    tokenizer = AutoTokenizer.from_pretrained(resolve_model_path("smollm2-135m"))
    tokenizer.add_special_tokens({"additional_special_tokens": list(tokens)})
    return tokenizer, {token: tokenizer.convert_tokens_to_ids(token) for token in tokens}


def vocabulary(tokenizer: Any) -> dict[str, Any]:
    return {
        "vocab_size": (len(tokenizer) + 63) // 64 * 64,
        "bos_token_id": tokenizer.bos_token_id,
        "eos_token_id": tokenizer.eos_token_id,
        "pad_token_id": tokenizer.pad_token_id,
    }


def write(
    folder: Path,
    model: tuple[Any, Any],
    tokenizer: Any,
    template: str,
    weights: bool,
    **files: dict[str, Any],
) -> None:
    """model: its class and its config."""
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    model_class, config = model
    if weights:
        model_class(config).float().save_pretrained(folder)
    else:
        config.architectures = [model_class.__name__]
        config.save_pretrained(folder)
    tokenizer.chat_template = template
    tokenizer.save_pretrained(folder)
    (folder / "chat_template.jinja").write_text(template)
    for name, content in files.items():
        (folder / f"{name}.json").write_text(json.dumps(content))


def rename(folder: Path, start: str, published: str) -> None:
    """Tensors as published checkpoints call them, which is how SGLang looks for them."""
    path = folder / "model.safetensors"
    tensors = {
        name.replace(start, published, 1) if published not in name else name: tensor
        for name, tensor in load_file(path).items()
    }
    save_file(tensors, path, {"format": "pt"})


def qwen2_vl(folder: Path, weights: bool) -> None:
    from transformers import Qwen2VLConfig, Qwen2VLForConditionalGeneration

    vision = {"embed_dim": 32, "hidden_size": 64, "mlp_ratio": 2}
    _qwen2(folder, weights, Qwen2VLConfig, Qwen2VLForConditionalGeneration, vision)


def qwen2_5_vl(folder: Path, weights: bool) -> None:
    from transformers import Qwen2_5_VLConfig, Qwen2_5_VLForConditionalGeneration

    vision = {
        "hidden_size": 32,
        "intermediate_size": 64,
        "out_hidden_size": 64,
        "window_size": 56,
        "fullatt_block_indexes": [1],
    }
    _qwen2(folder, weights, Qwen2_5_VLConfig, Qwen2_5_VLForConditionalGeneration, vision)


def _qwen2(
    folder: Path, weights: bool, config_class: Any, model_class: Any, encoder: dict[str, Any]
) -> None:
    tokenizer, ids = tokenizer_with(QWEN_TOKENS)
    rope = {"rope_type": "default", "mrope_section": [2, 3, 3], "rope_theta": 10_000.0}
    vision = {
        "depth": 2,
        "num_heads": 2,
        "patch_size": 14,
        "spatial_merge_size": 2,
        "temporal_patch_size": 2,
        "in_channels": 3,
        "in_chans": 3,  # SGLang reads this one; transformers 5 does not write it of itself.
        **encoder,
    }
    config = config_class(
        text_config={**_TEXT, **vocabulary(tokenizer), "rope_parameters": rope},
        vision_config=vision,
        image_token_id=ids["<|image_pad|>"],
        video_token_id=ids["<|video_pad|>"],
        vision_start_token_id=ids["<|vision_start|>"],
        vision_end_token_id=ids["<|vision_end|>"],
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
    )
    images = {
        "image_processor_type": "Qwen2VLImageProcessor",
        "processor_class": "Qwen2VLProcessor",
        "min_pixels": 3_136,
        "max_pixels": 1_003_520,
        "patch_size": 14,
        "temporal_patch_size": 2,
        "merge_size": 2,
        **_HALF,
    }
    model = model_class, config
    write(folder, model, tokenizer, qwen_template(), weights, preprocessor_config=images)


def qwen3_vl(folder: Path, weights: bool) -> None:
    from transformers import Qwen3VLConfig, Qwen3VLForConditionalGeneration

    tokenizer, ids = tokenizer_with(QWEN_TOKENS)
    rope = {
        "rope_type": "default",
        "mrope_section": [2, 3, 3],
        "mrope_interleaved": True,
        "rope_theta": 10_000.0,
    }
    vision = {
        "depth": 2,
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_heads": 2,
        "out_hidden_size": 64,
        "patch_size": 16,
        "spatial_merge_size": 2,
        "temporal_patch_size": 2,
        "in_channels": 3,
        "num_position_embeddings": 256,
        "deepstack_visual_indexes": [0, 1],
    }
    text = {**_TEXT, **vocabulary(tokenizer), "head_dim": 16, "rope_parameters": rope}
    config = Qwen3VLConfig(
        text_config=text,
        vision_config=vision,
        image_token_id=ids["<|image_pad|>"],
        video_token_id=ids["<|video_pad|>"],
        vision_start_token_id=ids["<|vision_start|>"],
        vision_end_token_id=ids["<|vision_end|>"],
    )
    patches = {"patch_size": 16, "temporal_patch_size": 2, "merge_size": 2, **_HALF}
    images = {
        "image_processor_type": "Qwen2VLImageProcessor",
        "processor_class": "Qwen3VLProcessor",
        "size": {"shortest_edge": 65_536, "longest_edge": 16_777_216},
        **patches,
    }
    videos = {
        "video_processor_type": "Qwen3VLVideoProcessor",
        "processor_class": "Qwen3VLProcessor",
        "size": {"shortest_edge": 4_096, "longest_edge": 25_165_824},
        **patches,
    }
    model = Qwen3VLForConditionalGeneration, config
    files = {"preprocessor_config": images, "video_preprocessor_config": videos}
    write(folder, model, tokenizer, qwen_template(), weights, **files)


def qwen_template() -> str:
    return chat_template(
        "<|vision_start|><|image_pad|><|vision_end|>", "<|vision_start|><|video_pad|><|vision_end|>"
    )


def gemma3(folder: Path, weights: bool) -> None:
    from transformers import Gemma3Config, Gemma3ForConditionalGeneration

    tokenizer, ids = tokenizer_with(GEMMA_TOKENS)
    vision = {
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "image_size": 112,
        "patch_size": 14,
        "num_channels": 3,
        "vision_use_head": False,
    }
    text = {"head_dim": 16, "sliding_window": 512, "query_pre_attn_scalar": 16}
    config = Gemma3Config(
        text_config={**_TEXT, **vocabulary(tokenizer), **text},
        vision_config=vision,
        mm_tokens_per_image=16,
        boi_token_index=ids["<start_of_image>"],
        eoi_token_index=ids["<end_of_image>"],
        image_token_index=ids["<image_soft_token>"],
        image_token_id=ids["<image_soft_token>"],
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
    )
    names = {
        "boi_token": "<start_of_image>",
        "eoi_token": "<end_of_image>",
        "image_token": "<image_soft_token>",
    }
    tokenizer.init_kwargs.update(names)
    for name, token in names.items():
        setattr(tokenizer, name, token)
    images = {
        "image_processor_type": "Gemma3ImageProcessor",
        "processor_class": "Gemma3Processor",
        "do_resize": True,
        "size": {"height": 112, "width": 112},
        "do_pan_and_scan": False,
        "image_seq_length": 16,
        **_HALF,
    }
    processor = {"processor_class": "Gemma3Processor", "image_seq_length": 16}
    model = Gemma3ForConditionalGeneration, config
    template = chat_template("<start_of_image>")
    files = {"preprocessor_config": images, "processor_config": processor}
    write(folder, model, tokenizer, template, weights, **files)
    if weights:
        rename(folder, "vision_tower.", "vision_tower.vision_model.")
    settings = folder / "tokenizer_config.json"
    settings.write_text(json.dumps(json.loads(settings.read_text()) | names))


def mistral3(folder: Path, weights: bool) -> None:
    """Pixtral's encoder and Mistral Small's merger: rows of tokens with marks between them."""
    from transformers import Mistral3Config, Mistral3ForConditionalGeneration

    tokenizer, ids = tokenizer_with(MISTRAL_TOKENS)
    vision = {
        "model_type": "pixtral",
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "head_dim": 16,
        "image_size": 224,
        "patch_size": 14,
    }
    config = Mistral3Config(
        text_config={"model_type": "mistral", **_TEXT, **vocabulary(tokenizer), "head_dim": 16},
        vision_config=vision,
        image_token_index=ids["[IMG]"],
        spatial_merge_size=2,
    )
    images = {
        "image_processor_type": "PixtralImageProcessor",
        "processor_class": "PixtralProcessor",
        "patch_size": {"height": 28, "width": 28},
        "size": {"longest_edge": 224},
        "do_convert_rgb": True,
        **_HALF,
    }
    names = {
        "image_token": "[IMG]",
        "image_break_token": "[IMG_BREAK]",
        "image_end_token": "[IMG_END]",
    }
    processor = {
        "processor_class": "PixtralProcessor",
        "patch_size": 14,
        "spatial_merge_size": 2,
        **names,
    }
    files = {"preprocessor_config": images, "processor_config": processor}
    model = Mistral3ForConditionalGeneration, config
    write(folder, model, tokenizer, chat_template("[IMG]"), weights, **files)


FAMILIES: dict[str, Callable[[Path, bool], None]] = {
    "qwen2-vl": qwen2_vl,
    "qwen2.5-vl": qwen2_5_vl,
    "qwen3-vl": qwen3_vl,
    "gemma3": gemma3,
    "mistral3": mistral3,
}


def build(family: str, folder: Path, *, weights: bool = True) -> Path:
    """Write a model of a family of `FAMILIES` into a folder, and return the folder. Without weights
    its processor can be used all the same."""
    torch.manual_seed(0)
    FAMILIES[family](folder, weights)
    return folder


if __name__ == "__main__":
    if len(sys.argv) != 3 or sys.argv[1] not in FAMILIES:
        sys.exit(f"usage: tiny_vlm.py {'|'.join(FAMILIES)} FOLDER")
    build(sys.argv[1], Path(sys.argv[2]))
