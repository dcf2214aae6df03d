"""Refuses to run on an SGLang whose seams are not the ones BlendServe extends.

SGLang logs a plugin that fails and then serves without it, so each process compares what it is
about to override with what BlendServe was written against, and ends with a message on a mismatch.
"""

from __future__ import annotations

import importlib
import importlib.metadata
import inspect
from collections.abc import Mapping
from typing import Any

from packaging.version import Version

OLDEST_SGLANG = "0.5.16"
NEWEST_SGLANG = "0.5.23"

_ATTENTION = ("self", "q", "k", "v", "layer", "forward_batch", "save_kv_cache", "...")
_PRODUCT = ("self", "layer", "x", "bias")

# Dotted path -> parameter names, as in every release of the supported range. A trailing "..."
# accepts further parameters, for what is only wrapped with *args and **kwargs. Of names with "|"
# between them, one must be there.
EXPECTED_SIGNATURES: Mapping[str, tuple[str, ...]] = {
    "sglang.srt.managers.scheduler.Scheduler.init_running_status": ("self",),
    "sglang.srt.managers.scheduler.Scheduler.init_chunked_prefill": ("self",),
    "sglang.srt.managers.scheduler.Scheduler.get_init_info": ("self",),
    "sglang.srt.managers.scheduler.Scheduler._add_request_to_queue": (
        "self",
        "req",
        "is_retracted",
    ),
    "sglang.srt.managers.scheduler.Scheduler.get_new_batch_prefill": ("self", "running_batch"),
    "sglang.srt.managers.scheduler.Scheduler.process_batch_result": ("self", "batch", "result"),
    "sglang.srt.managers.scheduler.Scheduler.abort_request": ("self", "recv_req"),
    "sglang.srt.managers.scheduler.Scheduler.is_fully_idle": ("self", "for_health_check", "..."),
    "sglang.srt.managers.scheduler.Scheduler.flush_cache": ("self", "..."),
    "sglang.srt.managers.scheduler.Scheduler.adjust_stream_groups": ("self", "running_batch"),
    "sglang.srt.managers.scheduler.Scheduler.get_num_allocatable_reqs": (
        "self",
        "running_bs",
        "...",
    ),
    "sglang.srt.managers.scheduler.Scheduler.run_batch": ("self", "batch", "..."),
    "sglang.srt.managers.utils.is_health_check_generate_req": ("recv_req",),
    "sglang.srt.managers.schedule_policy.PrefillAdder.__init__": (
        "self",
        "page_size",
        "tree_cache",
        "token_to_kv_pool_allocator",
        "running_batch",
        "...",
    ),
    "sglang.srt.managers.schedule_policy.PrefillAdder._get_running_request_total_token_offset": (
        "self",
        "req",
    ),
    "sglang.srt.managers.schedule_policy.PrefillAdder.add_one_req": ("self", "req", "..."),
    "sglang.srt.managers.schedule_policy.PrefillAdder.add_chunked_req": ("self", "req"),
    "sglang.srt.mem_cache.registry.register_radix_cache_backend": ("name", "factory"),
    "sglang.srt.mem_cache.radix_cache.RadixCache.reset": ("self",),
    "sglang.srt.mem_cache.radix_cache.RadixCache.insert": ("self", "params"),
    "sglang.srt.mem_cache.radix_cache.RadixCache.evict": ("self", "params"),
    # The latter from 0.5.22 on.
    "sglang.srt.mem_cache.radix_cache.RadixCache.cache_unfinished_req|checkpoint": (
        "self",
        "req",
        "...",
    ),
    # At the end of a request: up to 0.5.20, in 0.5.21, from 0.5.22 on.
    "sglang.srt.mem_cache.radix_cache.RadixCache.cache_finished_req|insert_req|checkpoint": (
        "self",
        "req",
        "...",
    ),
    # What tells who has ended: from 0.5.21 on, and before.
    "sglang.srt.mem_cache.radix_cache.RadixCache.on_release|cache_finished_req": (
        "self",
        "req",
        "...",
    ),
    "sglang.srt.mem_cache.radix_cache.RadixCache.update_eviction_metrics": (
        "self",
        "num_evicted",
        "start_time",
    ),
    "sglang.srt.mem_cache.radix_cache.RadixCache._split_node": (
        "self",
        "key",
        "child",
        "split_len",
    ),
    "sglang.srt.mem_cache.radix_cache.RadixCache._update_leaf_status": ("self", "node"),
    "sglang.srt.layers.attention.attention_registry.register_attention_backend": ("name",),
    "sglang.srt.layers.attention.base_attn_backend.AttentionBackend.forward_extend": _ATTENTION,
    "sglang.srt.layers.attention.base_attn_backend.AttentionBackend.forward_decode": _ATTENTION,
    "sglang.srt.layers.attention.base_attn_backend.AttentionBackend.init_forward_metadata": (
        "self",
        "forward_batch",
    ),
    "sglang.srt.mem_cache.memory_pool.MHATokenToKVPool.set_kv_buffer": (
        *("self", "layer", "loc_info", "cache_k", "cache_v", "..."),
    ),
    "sglang.srt.utils.common.support_triton": ("backend",),
    "sglang.srt.model_executor.model_runner.ModelRunner.load_model": ("self",),
    "sglang.srt.model_executor.model_runner_components.weight_updater._model_load_weights_direct": (
        "model",
        "named_tensors",
    ),
    "sglang.srt.layers.quantization.unquant.UnquantizedLinearMethod.apply": _PRODUCT,
    "sglang.srt.layers.quantization.unquant.UnquantizedEmbeddingMethod.apply": _PRODUCT,
    "sglang.srt.layers.activation.SiluAndMul.forward_native": ("self", "x"),
    "sglang.srt.layers.layernorm.RMSNorm.forward_native": ("self", "x", "residual", "..."),
    "sglang.srt.layers.rotary_embedding.base.RotaryEmbedding.forward_native": (
        "self",
        "positions",
        "query",
        "key",
        "...",
    ),
    "sglang.srt.layers.logits_processor.should_apply_lm_head_quant_method": (
        "lm_head",
        "quant_method",
    ),
}
HTTP_SIGNATURES: Mapping[str, tuple[str, ...]] = {
    "sglang.srt.entrypoints.http_server._setup_and_run_http_server": (
        "server_args",
        "tokenizer_manager",
        "template_manager",
        "port_args",
        "scheduler_infos",
        "...",
    ),
    "sglang.srt.server_args.ServerArgs.check_server_args": ("self",),
    "sglang.srt.entrypoints.openai.serving_base.OpenAIServingBase._validate_request": (
        "self",
        "...",
    ),
    "sglang.srt.managers.tokenizer_manager.TokenizerManager.generate_request": (
        "self",
        "obj",
        "...",
    ),
    "sglang.srt.managers.tokenizer_manager.TokenizerManager.score_request": ("self", "..."),
    "sglang.srt.managers.tokenizer_manager.TokenizerManager._create_tokenized_object": (
        "self",
        "obj",
        "input_text",
        "input_ids",
        "input_embeds",
        "mm_inputs",
        "...",
    ),
    "sglang.srt.entrypoints.openai.serving_base.OpenAIServingBase._convert_to_internal_request": (
        "self",
        "request",
        "raw_request",
    ),
}


class UnsupportedSGLang(RuntimeError):
    """The installed SGLang is not one that BlendServe can extend."""


def installed_sglang() -> str:
    """Version of the installed SGLang. Raises UnsupportedSGLang if there is none."""
    try:
        return importlib.metadata.version("sglang")
    except importlib.metadata.PackageNotFoundError as error:
        raise UnsupportedSGLang(
            f"SGLang is not installed. BlendServe extends SGLang {OLDEST_SGLANG} to "
            f"{NEWEST_SGLANG}; `make setup` (CPU) or `make setup-gpu` installs it."
        ) from error


def check_version(version: str) -> None:
    """Raise UnsupportedSGLang if the version is outside the supported range."""
    # The release alone: a build for another CUDA or a re-packaged release has the same code.
    parsed = Version(version)
    oldest, newest = Version(OLDEST_SGLANG).release, Version(NEWEST_SGLANG).release
    if parsed.is_prerelease or not oldest <= parsed.release <= newest:
        raise UnsupportedSGLang(
            f"SGLang {version} is installed; BlendServe supports {OLDEST_SGLANG} to "
            f"{NEWEST_SGLANG}. Install one of these, for example: "
            f"pip install sglang=={NEWEST_SGLANG}"
        )


def differences(expected: Mapping[str, tuple[str, ...]]) -> list[str]:
    """What of the expected functions is missing or takes other parameters, a sentence each."""
    found = []
    for path, parameters in expected.items():
        parent, _, names = path.rpartition(".")
        wrong = [_difference(f"{parent}.{name}", parameters) for name in names.split("|")]
        if all(wrong):
            found.append("; ".join(wrong))
    return found


def resolve(path: str) -> Any:
    """What a dotted path names.

    Raises:
        AttributeError: a module of the path, or what it should hold, is not there.
        UnsupportedSGLang: a module is there but cannot be imported, with its own error.
    """
    parts = path.split(".")
    found: Any = None
    imported = 0
    for count in range(1, len(parts) + 1):
        name = ".".join(parts[:count])
        try:
            found = importlib.import_module(name)
        except ModuleNotFoundError as error:
            if error.name != name:
                raise _broken(name, error) from error
            break
        except (ImportError, OSError) as error:
            raise _broken(name, error) from error
        imported = count
    if not imported:
        raise AttributeError(f"there is no module {parts[0]!r}")
    for part in parts[imported:]:
        found = getattr(found, part)
    return found


def _broken(module: str, error: Exception) -> UnsupportedSGLang:
    return UnsupportedSGLang(
        f"SGLang is installed but its module {module} cannot be imported here: "
        f"{type(error).__name__}: {error}. SGLang's CUDA build needs NVIDIA's driver "
        "(libcuda.so.1) and the packages that it names; `nvidia-smi` must list the GPU, and "
        "`blendserve doctor` says what is missing. Without one, use `make setup`."
    )


def _difference(path: str, parameters: tuple[str, ...]) -> str:
    """How a function differs from what is expected; empty if it does not."""
    try:
        function = inspect.unwrap(resolve(path))
    except AttributeError as error:
        return f"{path} is missing ({error})"
    actual = tuple(inspect.signature(function).parameters)
    prefix = parameters[:-1] if parameters[-1] == "..." else parameters
    fits = actual[: len(prefix)] == prefix if prefix is not parameters else actual == parameters
    return (
        "" if fits else (f"{path} takes ({', '.join(actual)}), expected ({', '.join(parameters)})")
    )


def check_sglang(expected: Mapping[str, tuple[str, ...]], version: str | None = None) -> None:
    """Check version and signatures.

    Raises:
        UnsupportedSGLang: with SGLang's version, the supported range and what differs; or with the
            error of a module that cannot be imported on this machine.
    """
    version = version or installed_sglang()
    check_version(version)
    differing = differences(expected)
    if differing:
        raise UnsupportedSGLang(
            f"SGLang {version} is in BlendServe's supported range ({OLDEST_SGLANG} to "
            f"{NEWEST_SGLANG}) but differs from it where BlendServe extends it: "
            + "; ".join(differing)
            + ". Reinstall SGLang unmodified, or switch BlendServe off with BLENDSERVE_ENABLED=0."
        )


def check_scheduler_live(scheduler_info: Mapping[str, Any]) -> None:
    """Check that the scheduler process runs BlendServe's scheduler.

    Args:
        scheduler_info: what the scheduler answered in its start-up handshake.

    Raises:
        UnsupportedSGLang: the handshake came from another scheduler class.
    """
    if scheduler_info.get("blendserve") is None:
        raise not_live()


def not_live() -> UnsupportedSGLang:
    """The error of a server whose scheduler is not BlendServe's."""
    return UnsupportedSGLang(
        f"SGLang {installed_sglang()} started without BlendServe's scheduler: the plugin did "
        "not load in the scheduler process (is SGLANG_PLUGINS set without 'blendserve', or "
        "--use-ray given?). Start without those, or switch BlendServe off with "
        "BLENDSERVE_ENABLED=0."
    )
