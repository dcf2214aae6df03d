"""``--attention-backend blend``: ``sgl_kernel_ext`` as an SGLang attention backend."""

from __future__ import annotations

import importlib.util
import logging
from collections.abc import Callable
from typing import Any

from blendserve.runtime.cpu_platform import needs_cpu_engine
from blendserve.runtime.guard import UnsupportedSGLang

BACKEND_NAME = "blend"

logger = logging.getLogger(__name__)

# Where SGLang decides by a backend's name whether Triton may run; the module has moved once.
_LAST_SLOT_FUNCTIONS = (
    "sglang.srt.mem_cache.allocation",
    "sglang.srt.mem_cache.common",
)


def register() -> None:
    """Add the backend to SGLang's registry and to the choices of its flag."""
    from sglang.srt.layers.attention.attention_registry import register_attention_backend
    from sglang.srt.server_args import ATTENTION_BACKEND_CHOICES, add_attention_backend_choices

    if BACKEND_NAME not in ATTENTION_BACKEND_CHOICES:
        add_attention_backend_choices([BACKEND_NAME])
    register_attention_backend(BACKEND_NAME)(_create)
    if needs_cpu_engine():
        _keep_triton_off()
    else:
        from blendserve.runtime.attention_gpu import leave_graphs

        leave_graphs()


def _create(runner: Any) -> Any:
    if runner.device == "cpu":
        from blendserve.runtime.attention_cpu import BlendCpuAttention

        return BlendCpuAttention(runner)
    if str(runner.device).startswith("cuda"):
        from blendserve.runtime.attention_gpu import make_backend

        return make_backend(runner)
    raise ValueError(
        f"--attention-backend {BACKEND_NAME} has no kernels for device {runner.device!r}; leave "
        "the flag away to use SGLang's own choice"
    )


def _keep_triton_off() -> None:
    # SGLang prepares batches with Triton kernels unless the backend has one of the names that it
    # knows to run without; on a CPU there is no Triton to run them.
    from sglang.srt.plugins.hook_registry import HookRegistry, HookType

    HookRegistry.register(
        "sglang.srt.utils.common.support_triton", _supports_triton, HookType.AROUND
    )
    for module in _LAST_SLOT_FUNCTIONS:
        if importlib.util.find_spec(module) is not None:
            HookRegistry.register(f"{module}.get_last_loc", _last_slots, HookType.REPLACE)
            return
    raise UnsupportedSGLang(
        f"neither of {', '.join(_LAST_SLOT_FUNCTIONS)} is in this SGLang: its get_last_loc would "
        "call Triton on a CPU. Install a supported release."
    )


def _supports_triton(original: Callable[[str], bool], backend: str) -> bool:
    return backend != BACKEND_NAME and bool(original(backend))


def _last_slots(req_to_token: Any, req_pool_indices: Any, prefix_lens: Any) -> Any:
    """KV slot of each request's last cached token, -1 where nothing is cached."""
    last = req_to_token[req_pool_indices, (prefix_lens - 1).clamp(min=0)]
    return last.where(prefix_lens > 0, -1)
