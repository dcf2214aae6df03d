"""The compiled kernels: found next to this file, loaded once, called through a C interface."""

from __future__ import annotations

import ctypes
import functools
import importlib.machinery
import os
from pathlib import Path
from typing import Any

# The best that the machine has is taken; this variable asks for an older one.
LIMIT = "SGL_KERNEL_EXT_ISA"
INSTRUCTION_SETS = ("amx", "avx512", "avx2", "baseline")


class AttentionArguments(ctypes.Structure):
    """``struct BlendAttention`` of csrc/attention.h, field by field."""

    _fields_ = (
        ("query", ctypes.c_void_p),
        ("key_pool", ctypes.c_void_p),
        ("value_pool", ctypes.c_void_p),
        ("output", ctypes.c_void_p),
        ("slots", ctypes.c_void_p),
        ("items", ctypes.c_void_p),
        ("beside", ctypes.c_void_p),
        ("rows", ctypes.c_void_p),
        ("merged_query", ctypes.c_void_p),
        ("merge_begin", ctypes.c_void_p),
        ("partials", ctypes.c_void_p),
        ("item_count", ctypes.c_int64),
        ("compute_bound", ctypes.c_int64),
        ("merge_count", ctypes.c_int64),
        ("partial_count", ctypes.c_int64),
        ("heads", ctypes.c_int64),
        ("kv_heads", ctypes.c_int64),
        ("head_dim", ctypes.c_int64),
        ("query_stride", ctypes.c_int64),
        ("slot_stride", ctypes.c_int64),
        ("window", ctypes.c_int64),
        ("bfloat16", ctypes.c_int64),
        ("scale", ctypes.c_float),
        ("soft_cap", ctypes.c_float),
    )


def _structure(name: str, pointers: str, integers: str, floats: str = "") -> type[ctypes.Structure]:
    """A struct of csrc/rows.h, field by field."""
    kinds: tuple[tuple[str, Any], ...] = (
        (pointers, ctypes.c_void_p),
        (integers, ctypes.c_int64),
        (floats, ctypes.c_float),
    )
    fields = [(field, kind) for names, kind in kinds for field in names.split()]
    return type(name, (ctypes.Structure,), {"_fields_": fields})


ActivationArguments = _structure(
    "ActivationArguments", "input output", "input_stride rows width bfloat16"
)
NormArguments = _structure(
    "NormArguments",
    "input residual weight sum output",
    "input_stride residual_stride rows width bfloat16",
    "epsilon",
)
RotationArguments = _structure(
    "RotationArguments",
    "query key cos_sin positions",
    "query_stride key_stride rows heads kv_heads head_dim rotary_dim cached_positions bfloat16",
)
StoreArguments = _structure(
    "StoreArguments",
    "key value key_pool value_pool slots",
    "key_stride_bytes value_stride_bytes rows row_bytes slot_count",
)
_ROW_FUNCTIONS = {
    "blend_silu_and_multiply": ActivationArguments,
    "blend_normalise": NormArguments,
    "blend_rotate": RotationArguments,
    "blend_store": StoreArguments,
}


def _path() -> Path | None:
    for suffix in importlib.machinery.EXTENSION_SUFFIXES:
        path = Path(__file__).with_name("_attention" + suffix)
        if path.exists():
            return path
    return None


@functools.cache
def unavailable_reason() -> str | None:
    """Why the kernels cannot be used here, or None if they can."""
    path = _path()
    if path is None:
        return (
            "the CPU kernels were not built when blendserve was installed; install a C++ compiler "
            "(g++) and run `make setup` or `pip install --editable .` again"
        )
    try:
        load()
    except (OSError, AttributeError) as error:
        return f"the CPU kernels in {path} do not load ({error}); install blendserve again"
    return None


@functools.cache
def load() -> ctypes.CDLL:
    """The library.

    Raises:
        OSError: it is missing, does not load or is not of these sources.
        AttributeError: it is older than that check.
        ValueError: ``LIMIT`` names no instruction set.
    """
    limit = os.environ.get(LIMIT)
    if limit is not None and limit not in INSTRUCTION_SETS:
        raise ValueError(f"{LIMIT} is {limit!r}, not one of {', '.join(INSTRUCTION_SETS)}")
    # torch brings the OpenMP runtime into the process: its thread pool serves these kernels too.
    import torch  # noqa: F401

    library = ctypes.CDLL(str(_path()))
    library.blend_attention_bytes.restype = ctypes.c_int64
    if library.blend_attention_bytes() != ctypes.sizeof(AttentionArguments):
        raise OSError("they were built from other sources than these")
    library.blend_rows_bytes.restype = ctypes.c_int64
    if library.blend_rows_bytes() != sum(map(ctypes.sizeof, _ROW_FUNCTIONS.values())):
        raise OSError("they were built from other sources than these")
    for name, arguments in _ROW_FUNCTIONS.items():
        function = getattr(library, name)
        function.argtypes = (ctypes.POINTER(arguments), ctypes.c_int)
        function.restype = ctypes.c_int if name in ("blend_rotate", "blend_store") else None
    library.blend_attention.argtypes = (ctypes.POINTER(AttentionArguments), ctypes.c_int)
    library.blend_attention.restype = None
    library.blend_instruction_set.restype = ctypes.c_char_p
    return library


def instruction_set() -> str:
    """Of the kernels that this machine gets: one of ``INSTRUCTION_SETS``."""
    name: bytes = load().blend_instruction_set()
    return name.decode()
