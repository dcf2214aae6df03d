"""SGLang's frontend language on a BlendServe server: the programs of a `run_batch` are one job.

    import sglang as sgl
    from blendserve.frontend import Endpoint

    sgl.set_default_backend(Endpoint("http://127.0.0.1:30000"))

`Endpoint` and `Runtime` raise `UnsupportedSGLang` at their import where SGLang's frontend is not
the one that they extend.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from blendserve.frontend.endpoint import Endpoint
    from blendserve.frontend.runtime import Runtime

__all__ = ["Endpoint", "Runtime"]


def __getattr__(name: str) -> Any:
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from blendserve.frontend.seams import check_frontend

    # Before the rest, which takes SGLang's classes as they should be.
    check_frontend()
    from blendserve.frontend import endpoint, runtime

    return {"Endpoint": endpoint.Endpoint, "Runtime": runtime.Runtime}[name]
