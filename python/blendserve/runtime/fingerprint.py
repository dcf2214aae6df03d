"""Which engine this is, by what its answers depend on and by nothing else.

Read from the model's files, so that a copied folder, a new version of a library or a restart are
the same engine, and weights trained further at the same path are another one. Of weights a sample
is read: sizes, headers, and some bytes of each tensor.
"""

from __future__ import annotations

import hashlib
import json
import struct
from collections.abc import Iterator
from pathlib import Path
from typing import Any, BinaryIO

_WEIGHTS = (".safetensors", ".bin", ".pt", ".pth", ".gguf")
# What turns a request into tokens, tokens into text, and says how to sample.
_TEXTS = (
    *("tokenizer*", "vocab*", "merges.txt", "*.model", "*.tiktoken", "added_tokens.json"),
    *("special_tokens_map.json", "chat_template*", "*.jinja", "generation_config.json"),
    *("preprocessor_config.json", "processor_config.json", "adapter_config.json", "*.py"),
)
_ARGUMENTS = (
    *("revision", "quantization", "kv_cache_dtype", "context_length", "json_model_override_args"),
    *("chat_template", "completion_template", "hf_chat_template_name", "tokenizer_mode"),
    *("default_chat_template_kwargs", "tool_call_parser", "reasoning_parser"),
    *("sampling_defaults", "preferred_sampling_params", "model_impl"),
)
# Of config.json, what says who has written it and where.
_NOT_OF_THE_MODEL = frozenset({"transformers_version", "_name_or_path"})
_SAMPLES = 256
_SAMPLE_BYTES = 256
_MAX_HEADER_BYTES = 100 * 1024 * 1024


def fingerprint(server_args: Any, model_path: str, served_name: str, dtype: str) -> str:
    """`served_name@digest`: equal ones promise answers that may stand in one file.

    Args:
        server_args: SGLang's settings.
        model_path: a folder, a file, or a name of the hub that is in its cache.
        dtype: the number format that the model runs in.
    """
    identity: dict[str, Any] = {
        "name": served_name,
        "dtype": dtype,
        "model": _model(model_path, server_args.revision),
        "adapters": sorted(_adapters(server_args)),
        **{name: _plain(getattr(server_args, name, None)) for name in _ARGUMENTS},
    }
    tokenizer = server_args.tokenizer_path
    if tokenizer and tokenizer != server_args.model_path:
        identity["tokenizer"] = _model(tokenizer, None)
    digest = hashlib.sha256(json.dumps(identity, sort_keys=True, default=str).encode())
    return f"{served_name}@{digest.hexdigest()[:16]}"


def _plain(value: Any) -> Any:
    """A setting, or what is in the file that it names."""
    if isinstance(value, str) and value and Path(value).is_file():
        return hashlib.sha256(Path(value).read_bytes()).hexdigest()
    return value


def _adapters(server_args: Any) -> Iterator[tuple[str, Any]]:
    for adapter in getattr(server_args, "lora_paths", None) or ():
        path = getattr(adapter, "lora_path", adapter)
        yield str(getattr(adapter, "lora_name", adapter)), _model(str(path), None)


def _model(name: str, revision: str | None) -> Any:
    """What the files of a model say, by name; the name itself if they are nowhere on this disk."""
    place = _place(name, revision)
    if place is None:
        return name
    if place.is_file():
        return _digest_of_weights(place)
    found: dict[str, Any] = {}
    for path in place.iterdir():
        if path.suffix in _WEIGHTS and path.is_file():
            found[path.name] = _digest_of_weights(path)
    for path in {path for pattern in _TEXTS for path in place.glob(pattern)} - {place}:
        if path.is_file():
            found[path.name] = hashlib.sha256(path.read_bytes()).hexdigest()
    config = place / "config.json"
    if config.is_file():
        found[config.name] = _without_origin(json.loads(config.read_bytes()))
    return found


def _place(name: str, revision: str | None) -> Path | None:
    path = Path(name)
    if path.exists():
        return path
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HFValidationError, LocalEntryNotFoundError

    try:
        return Path(snapshot_download(name, revision=revision, local_files_only=True))
    except (HFValidationError, LocalEntryNotFoundError):
        return None


def _without_origin(value: Any) -> Any:
    if isinstance(value, dict):
        return {k: _without_origin(v) for k, v in value.items() if k not in _NOT_OF_THE_MODEL}
    return [_without_origin(item) for item in value] if isinstance(value, list) else value


def _digest_of_weights(path: Path) -> str:
    size = path.stat().st_size
    digest = hashlib.sha256(str(size).encode())
    with path.open("rb") as file:
        for place in _places(file, size, digest):
            file.seek(place)
            digest.update(file.read(_SAMPLE_BYTES))
    return digest.hexdigest()


def _places(file: BinaryIO, size: int, digest: Any) -> list[int]:
    """Where to look: in the middle of tensors, if the file says where they are."""
    header = _safetensors_header(file)
    if header is None:
        step = max(1, size // _SAMPLES)
        return list(range(0, size, step))
    digest.update(header)
    try:
        tensors = json.loads(header)
        begin = 8 + len(header)
        middles = sorted(
            begin + sum(tensor["data_offsets"]) // 2
            for name, tensor in tensors.items()
            if name != "__metadata__"
        )
    except (ValueError, TypeError, KeyError, AttributeError):
        return list(range(0, size, max(1, size // _SAMPLES)))
    return middles[:: max(1, -(-len(middles) // _SAMPLES))]


def _safetensors_header(file: BinaryIO) -> bytes | None:
    if not file.name.endswith(".safetensors"):
        return None
    length = file.read(8)
    if len(length) < 8:
        return None
    (count,) = struct.unpack("<Q", length)
    return file.read(count) if count <= _MAX_HEADER_BYTES else None
