"""What of SGLang's frontend language is extended, compared before it is."""

from __future__ import annotations

from collections.abc import Mapping

from blendserve.runtime.guard import UnsupportedSGLang, differences, installed_sglang

_INTERPRETER = "sglang.lang.interpreter"
_ENDPOINT = "sglang.lang.backend.runtime_endpoint.RuntimeEndpoint"

FRONTEND_SIGNATURES: Mapping[str, tuple[str, ...]] = {
    f"{_INTERPRETER}.run_program_batch": (
        *("program", "backend", "batch_arguments", "default_sampling_para"),
        *("num_threads", "progress_bar", "generator_style"),
    ),
    f"{_INTERPRETER}.run_program": (
        *("program", "backend", "func_args", "func_kwargs", "default_sampling_para"),
        *("stream", "sync", "..."),
    ),
    f"{_ENDPOINT}.__init__": ("self", "base_url", "api_key", "verify", "chat_template_name"),
    f"{_ENDPOINT}.generate": ("self", "s", "sampling_params"),
    f"{_ENDPOINT}.select": ("self", "s", "..."),
    f"{_ENDPOINT}.commit_lazy_operations": ("self", "s"),
    # Each request of a program goes through it, with its whole body, right before it is sent.
    f"{_ENDPOINT}._add_images": ("self", "s", "data"),
}


def check_frontend(expected: Mapping[str, tuple[str, ...]] = FRONTEND_SIGNATURES) -> None:
    """Raise UnsupportedSGLang if a function is missing or takes other parameters."""
    version = installed_sglang()
    differing = differences(expected)
    if differing:
        raise UnsupportedSGLang(
            f"The frontend language of SGLang {version} (sglang.lang) is not the one that "
            f"blendserve.frontend extends: {'; '.join(differing)}. Programs still run, as online "
            "requests, with sgl.RuntimeEndpoint where SGLang has it; or install sglang==0.5.21."
        )
