"""Entry point of the ``sglang.srt.plugins`` group: what BlendServe changes in SGLang, and when.

SGLang calls ``activate`` in every process that it starts. Nothing is changed unless BlendServe is
switched on (``BLENDSERVE_ENABLED=1``, a config file, or ``blendserve serve``).
"""

from __future__ import annotations

import multiprocessing
import os
import uuid
from typing import Any

from blendserve.config import ConfigError, load_settings
from blendserve.runtime import guard


def activate() -> None:
    """Register BlendServe's scheduler and, in the engine process, its HTTP routes.

    Raises:
        SystemExit: SGLang is not one that BlendServe can extend, or a setting is wrong. SGLang
            would only log an ordinary exception, and then serve without the plugin.
    """
    try:
        settings = load_settings()
        if not settings.enabled:
            return
        in_engine_process = multiprocessing.parent_process() is None
        guard.check_sglang(guard.EXPECTED_SIGNATURES)
        if in_engine_process:
            guard.check_sglang(guard.HTTP_SIGNATURES)
        if not settings.feedback_address:
            # Set once by the engine process; the processes that it spawns inherit the environment.
            # The abstract namespace leaves no socket file behind.
            os.environ["BLENDSERVE_FEEDBACK_ADDRESS"] = f"ipc://@blendserve-{uuid.uuid4().hex}"
        _register(in_engine_process)
    except (guard.UnsupportedSGLang, ConfigError) as error:
        raise SystemExit(f"blendserve: {error}") from error


def _register(in_engine_process: bool) -> None:
    from sglang.srt.plugins.hook_registry import HookRegistry, HookType

    from blendserve.runtime import arguments, attention, radix_cache
    from blendserve.runtime.cpu_platform import needs_cpu_engine
    from blendserve.runtime.prefill_adder import BlendPrefillAdder
    from blendserve.runtime.scheduler import BlendScheduler

    radix_cache.register()

    attention.register()
    if needs_cpu_engine():
        from blendserve.runtime import packed_weights, row_kernels

        packed_weights.register()
        row_kernels.register()
    HookRegistry.register(
        "sglang.srt.managers.scheduler.Scheduler", BlendScheduler, HookType.REPLACE
    )
    # The name by which SGLang's scheduler makes its adders, not the one where it is defined.
    HookRegistry.register(
        "sglang.srt.managers.scheduler.PrefillAdder", BlendPrefillAdder, HookType.REPLACE
    )
    if in_engine_process:
        HookRegistry.register(
            "sglang.srt.server_args.ServerArgs.check_server_args", arguments.check, HookType.AFTER
        )
        HookRegistry.register(
            "sglang.srt.entrypoints.http_server._setup_and_run_http_server",
            _mount_routes,
            HookType.BEFORE,
        )


def _mount_routes(*args: Any, **kwargs: Any) -> None:
    # Imported when a server starts: an embedded engine has no routes.
    from blendserve.runtime.http import mount

    mount(*args, **kwargs)
