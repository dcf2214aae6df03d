"""A Llama model in GGUF form, as Hugging Face files: weights, tokenizer and configurations.

`meta` is the content of the GGUF's metadata fields by name, everywhere here.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
from gguf.quants import dequantize
from numpy.typing import NDArray
from safetensors.numpy import save_file

# GGUF's numbers for kinds of tokens; every other kind is an ordinary word of the vocabulary.
_TOKEN_TYPE_CONTROL = 3
_TOKEN_TYPE_USER_DEFINED = 4

_TOP_NAMES = {
    "token_embd.weight": "model.embed_tokens.weight",
    "output_norm.weight": "model.norm.weight",
    "output.weight": "lm_head.weight",
}
_LAYER_NAMES = {
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "ffn_norm": "post_attention_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}


def write_weights(reader: Any, meta: dict[str, Any], path: Path) -> None:
    """Write the tensors to `path` as float32 safetensors, under Hugging Face's names.

    Raises:
        ValueError: a tensor whose purpose is not known.
    """

    heads = {
        "attn_q": meta["llama.attention.head_count"],
        "attn_k": meta["llama.attention.head_count_kv"],
    }
    tensors: dict[str, NDArray[np.float32]] = {}
    for tensor in reader.tensors:
        values = dequantize(tensor.data, tensor.tensor_type).astype(np.float32, copy=False)
        kind = tensor.name.split(".")[-2]
        if kind in heads:
            values = _rotate_half_order(values, heads[kind])
        tensors[_hugging_face_name(tensor.name)] = np.ascontiguousarray(values)
    save_file(tensors, path, metadata={"format": "pt"})


def _rotate_half_order(weight: NDArray[np.float32], heads: int) -> NDArray[np.float32]:
    """Reorder the rows of a q or k projection from GGUF's layout to Hugging Face's.

    GGUF rotates neighbouring pairs (2i, 2i+1) of a head, Hugging Face the pair (i, i + d/2), so
    within each head the even rows come first, then the odd ones.
    """
    rows, columns = weight.shape
    paired = weight.reshape(heads, rows // heads // 2, 2, columns)  # [head, pair, part, in]
    return paired.swapaxes(1, 2).reshape(rows, columns)  # [head, part, pair, in]


def _hugging_face_name(gguf_name: str) -> str:
    if gguf_name in _TOP_NAMES:
        return _TOP_NAMES[gguf_name]
    block, layer, kind, suffix = gguf_name.split(".")
    if block != "blk" or kind not in _LAYER_NAMES:
        raise ValueError(f"the GGUF file holds a tensor of unknown purpose: {gguf_name}")
    return f"model.layers.{layer}.{_LAYER_NAMES[kind]}.{suffix}"


def tokenizer(meta: dict[str, Any]) -> dict[str, Any]:
    """Return the content of tokenizer.json, in the format of the tokenizers library."""
    words: list[str] = meta["tokenizer.ggml.tokens"]
    kinds: list[int] = meta["tokenizer.ggml.token_type"]
    byte_level = {
        "type": "ByteLevel",
        "add_prefix_space": bool(meta["tokenizer.ggml.add_space_prefix"]),
        "trim_offsets": True,
        "use_regex": True,
    }
    # "smollm" in GGUF means one token per digit, then GPT-2's split. A converter that knows only
    # the second half gives every number longer than a digit other tokens than in training.
    splitters = [{"type": "Digits", "individual_digits": True}, byte_level]
    return {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": [
            {
                "id": token_id,
                "content": word,
                "single_word": False,
                "lstrip": False,
                "rstrip": False,
                "normalized": False,
                "special": kind == _TOKEN_TYPE_CONTROL,
            }
            for token_id, (word, kind) in enumerate(zip(words, kinds, strict=True))
            if kind in (_TOKEN_TYPE_CONTROL, _TOKEN_TYPE_USER_DEFINED)
        ],
        "normalizer": None,
        "pre_tokenizer": {"type": "Sequence", "pretokenizers": splitters},
        "post_processor": None,
        "decoder": byte_level,
        "model": {
            "type": "BPE",
            "dropout": None,
            "unk_token": None,
            "continuing_subword_prefix": None,
            "end_of_word_suffix": None,
            "fuse_unk": False,
            "byte_fallback": False,
            "ignore_merges": False,
            "vocab": {word: token_id for token_id, word in enumerate(words)},
            "merges": [merge.split(" ", 1) for merge in meta["tokenizer.ggml.merges"]],
        },
    }


def tokenizer_config(meta: dict[str, Any]) -> dict[str, Any]:
    words: list[str] = meta["tokenizer.ggml.tokens"]
    return {
        # The generic class takes tokenizer.json as it is; Llama's would put in its own splitter.
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": words[meta["tokenizer.ggml.bos_token_id"]],
        "eos_token": words[meta["tokenizer.ggml.eos_token_id"]],
        "pad_token": words[meta["tokenizer.ggml.padding_token_id"]],
        "unk_token": words[meta["tokenizer.ggml.unknown_token_id"]],
        "add_bos_token": bool(meta["tokenizer.ggml.add_bos_token"]),
        "add_prefix_space": bool(meta["tokenizer.ggml.add_space_prefix"]),
        "clean_up_tokenization_spaces": False,
        "model_max_length": meta["llama.context_length"],
        "chat_template": meta["tokenizer.chat_template"],
    }


def model_config(meta: dict[str, Any]) -> dict[str, Any]:
    heads = meta["llama.attention.head_count"]
    rope_theta = float(meta["llama.rope.freq_base"])
    # The GGUF keeps float32; seven digits give back the decimal number that was meant (1e-05).
    rms_norm_eps = float(f"{meta['llama.attention.layer_norm_rms_epsilon']:.7g}")
    return {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "hidden_size": meta["llama.embedding_length"],
        "intermediate_size": meta["llama.feed_forward_length"],
        "num_hidden_layers": meta["llama.block_count"],
        "num_attention_heads": heads,
        "num_key_value_heads": meta["llama.attention.head_count_kv"],
        "head_dim": meta["llama.embedding_length"] // heads,
        "vocab_size": meta["llama.vocab_size"],
        "max_position_embeddings": meta["llama.context_length"],
        "rms_norm_eps": rms_norm_eps,
        # Readers before transformers 5 know only the first of the two.
        "rope_theta": rope_theta,
        "rope_parameters": {"rope_type": "default", "rope_theta": rope_theta},
        "hidden_act": "silu",
        "attention_bias": False,
        "mlp_bias": False,
        "tie_word_embeddings": True,
        "torch_dtype": "float32",
        "dtype": "float32",
        **_special_ids(meta),
    }


def generation_config(meta: dict[str, Any]) -> dict[str, Any]:
    return {"_from_model_config": True, **_special_ids(meta)}


def _special_ids(meta: dict[str, Any]) -> dict[str, int]:
    return {
        "bos_token_id": meta["tokenizer.ggml.bos_token_id"],
        "eos_token_id": meta["tokenizer.ggml.eos_token_id"],
        "pad_token_id": meta["tokenizer.ggml.padding_token_id"],
    }
