"""BlendServe: throughput-aware offline batch inference on the SGLang runtime."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from blendserve.frontend.lists import chat, generate

__version__ = "0.1.0"
__all__ = ["__version__", "chat", "generate"]


def __getattr__(name: str) -> Any:
    # Late: the engine's processes and the planner need neither.
    if name in ("chat", "generate"):
        from blendserve.frontend import lists

        return getattr(lists, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
