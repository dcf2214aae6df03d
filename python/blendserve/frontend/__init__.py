"""SGLang's frontend language on a BlendServe server: the programs of a `run_batch` are one job.

    import sglang as sgl
    from blendserve.frontend import Endpoint

    sgl.set_default_backend(Endpoint("http://127.0.0.1:30000"))

Importing it raises `UnsupportedSGLang` where SGLang's frontend is not the one that it extends.
"""

from blendserve.frontend.seams import check_frontend

# Before the rest, which takes SGLang's classes as they should be.
check_frontend()

from blendserve.frontend.endpoint import Endpoint  # noqa: E402

__all__ = ["Endpoint"]
