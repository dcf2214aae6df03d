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
    padded = [-(-array.size // _ALIGNED) * _ALIGNED for array in arrays]
    begins = np.cumsum([0, *padded]).tolist()
    packed = np.zeros(begins[-1], dtype=np.int32)
    for array, begin in zip(arrays, begins, strict=False):
        packed[begin : begin + array.size] = array.reshape(-1)
    there = host_tensor(packed, device).to(device, non_blocking=True)
    return [
        there[begin : begin + array.size].view(array.shape)
        for array, begin in zip(arrays, begins, strict=False)
    ]
