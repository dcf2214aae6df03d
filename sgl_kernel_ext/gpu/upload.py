"""Small integer arrays to the device, in one copy that the host does not wait for."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from numpy.typing import NDArray

# Kernels are compiled for pointers that 16 divides: so many integers of 4 bytes.
_ALIGNED = 4


def host_tensor(array: NDArray[np.generic], device: torch.device) -> torch.Tensor:
    """The array as int32 in memory from which a GPU copies without the host's help."""
    tensor = torch.from_numpy(np.ascontiguousarray(array, dtype=np.int32))
    # A copy from pageable memory would wait for all that was launched before it: the step before.
    return tensor.pin_memory() if device.type == "cuda" else tensor


def upload(arrays: Sequence[NDArray[np.generic]], device: torch.device) -> list[torch.Tensor]:
    """The arrays as int32 tensors of their shapes on the device, each at an aligned address."""
    sizes = [array.size for array in arrays]
    padded = [-(-size // _ALIGNED) * _ALIGNED for size in sizes]
    packed = np.zeros(sum(padded), dtype=np.int32)
    for array, size, begin in zip(arrays, sizes, np.cumsum([0, *padded]).tolist(), strict=False):
        packed[begin : begin + size] = array.reshape(-1)
    parts = torch.split(host_tensor(packed, device).to(device, non_blocking=True), padded)
    return [
        part[:size].view(array.shape)
        for part, size, array in zip(parts, sizes, arrays, strict=True)
    ]
