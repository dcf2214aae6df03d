"""What a dense layer does to each token's row between its products, a call each.

The same results as SGLang's plain torch, which takes several passes and temporary tensors for
each, but that everything is computed in float32 and rounded once. Element types are those of
``DTYPES``; the elements of a row are next to each other, rows may be apart.
"""

from __future__ import annotations

import ctypes

import torch

from sgl_kernel_ext.cpu import library


def silu_and_multiply(x: torch.Tensor) -> torch.Tensor:
    """silu(gate) * up of x [tokens, 2 * width], which is gate, then up: [tokens, width]."""
    rows, width = x.shape[0], x.shape[1] // 2
    output = x.new_empty((rows, width))
    arguments = library.ActivationArguments(
        x.data_ptr(), output.data_ptr(), x.stride(0), rows, width, x.dtype == torch.bfloat16
    )
    library.load().blend_silu_and_multiply(ctypes.byref(arguments), torch.get_num_threads())
    return output


def normalise(
    x: torch.Tensor, residual: torch.Tensor | None, weight: torch.Tensor, epsilon: float
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """RMS norm of x + residual, and that sum; all of x's type.

    Args:
        x, residual: [tokens, width].
        weight: [width].
    """
    rows, width = x.shape
    output = x.new_empty((rows, width))
    total = None if residual is None else x.new_empty((rows, width))
    arguments = library.NormArguments(
        x.data_ptr(),
        0 if residual is None else residual.data_ptr(),
        weight.data_ptr(),
        0 if total is None else total.data_ptr(),
        output.data_ptr(),
        x.stride(0),
        0 if residual is None else residual.stride(0),
        rows,
        width,
        x.dtype == torch.bfloat16,
        epsilon,
    )
    library.load().blend_normalise(ctypes.byref(arguments), torch.get_num_threads())
    return output, total


def rotate(
    query: torch.Tensor,
    key: torch.Tensor,
    cos_sin: torch.Tensor,
    positions: torch.Tensor,
    head_dim: int,
) -> None:
    """Rotary embedding in place: halves of each head's first ``rotary_dim`` elements.

    Args:
        query, key: [tokens, heads * head_dim].
        cos_sin: [positions, rotary_dim], of their type: cosines, then sines.
        positions: [tokens], int64.

    Raises:
        IndexError: a position is not in ``cos_sin``; nothing was rotated.
    """
    arguments = library.RotationArguments(
        query.data_ptr(),
        key.data_ptr(),
        cos_sin.data_ptr(),
        positions.data_ptr(),
        query.stride(0),
        key.stride(0),
        query.shape[0],
        query.shape[1] // head_dim,
        key.shape[1] // head_dim,
        head_dim,
        cos_sin.shape[1],
        cos_sin.shape[0],
        query.dtype == torch.bfloat16,
    )
    if not library.load().blend_rotate(ctypes.byref(arguments), torch.get_num_threads()):
        raise IndexError(f"a position lies outside of the {cos_sin.shape[0]} that are cached")


def store(
    key: torch.Tensor,
    value: torch.Tensor,
    key_pool: torch.Tensor,
    value_pool: torch.Tensor,
    slots: torch.Tensor,
) -> None:
    """Write each token's key and value to its slot of the pools.

    Args:
        key, value: [tokens, width].
        key_pool, value_pool: [slots, kv_heads, head_dim] of that width, contiguous.
        slots: [tokens], int64.

    Raises:
        IndexError: a slot is not in the pools; nothing was written.
    """
    size = key.element_size()
    arguments = library.StoreArguments(
        key.data_ptr(),
        value.data_ptr(),
        key_pool.data_ptr(),
        value_pool.data_ptr(),
        slots.data_ptr(),
        key.stride(0) * size,
        value.stride(0) * size,
        key.shape[0],
        key.shape[1] * size,
        key_pool.shape[0],
    )
    if not library.load().blend_store(ctypes.byref(arguments), torch.get_num_threads()):
        raise IndexError(f"a slot lies outside of the pools' {key_pool.shape[0]}")
