"""What one accelerator can do: dense FLOP/s, memory bandwidth, memory size.

Every row names where its figures come from. A user with measured ceilings makes a `Hardware` of
their own or replaces fields of a row with `dataclasses.replace`.
"""

from __future__ import annotations

import difflib
import math
from dataclasses import dataclass, replace


@dataclass(frozen=True)
class Hardware:
    """One device, or several that act as one (see `scaled`).

    compute_flops: dense matrix rate in the serving dtype, FLOP/s.
    bandwidth_bytes: main-memory bandwidth, bytes/s.
    memory_bytes: capacity of that memory, bytes.
    source: where the figures are from.
    """

    name: str
    compute_flops: float
    bandwidth_bytes: float
    memory_bytes: float
    source: str

    def __post_init__(self) -> None:
        for field in ("compute_flops", "bandwidth_bytes", "memory_bytes"):
            value = getattr(self, field)
            if not (value > 0 and math.isfinite(value)):
                raise ValueError(
                    f"hardware {self.name!r}: {field} must be positive and finite, not {value!r}"
                )

    def scaled(self, ranks: int) -> Hardware:
        """The same device `ranks` times (tensor, sequence or context parallel): all figures
        multiplied, communication not counted. Raises ValueError for ranks < 1."""
        if ranks < 1:
            raise ValueError(f"ranks must be at least 1, not {ranks}")
        if ranks == 1:
            return self
        return replace(
            self,
            name=f"{ranks}x {self.name}",
            compute_flops=self.compute_flops * ranks,
            bandwidth_bytes=self.bandwidth_bytes * ranks,
            memory_bytes=self.memory_bytes * ranks,
        )


class UnknownHardwareError(ValueError):
    """A name that is not in `HARDWARE`."""


HARDWARE: dict[str, Hardware] = {
    row.name: row
    for row in (
        Hardware(
            name="a100-80g-sxm",
            compute_flops=312e12,
            bandwidth_bytes=2.039e12,
            memory_bytes=80e9,
            source="NVIDIA A100 datasheet, 80GB SXM: BF16 dense 312 TFLOP/s, 2,039 GB/s",
        ),
        Hardware(
            name="h100-80g-sxm",
            compute_flops=989e12,
            bandwidth_bytes=3.35e12,
            memory_bytes=80e9,
            source="NVIDIA H100 datasheet, SXM: BF16 1,979 TFLOP/s with sparsity (half dense), "
            "3.35 TB/s",
        ),
        Hardware(
            name="h200-141g-sxm",
            compute_flops=989e12,
            bandwidth_bytes=4.8e12,
            memory_bytes=141e9,
            source="NVIDIA H200 datasheet, SXM: BF16 1,979 TFLOP/s with sparsity (half dense), "
            "4.8 TB/s",
        ),
        Hardware(
            name="l40s",
            compute_flops=362e12,
            bandwidth_bytes=864e9,
            memory_bytes=48e9,
            source="NVIDIA L40S datasheet: BF16 dense 362.05 TFLOP/s, 864 GB/s",
        ),
        Hardware(
            name="cpu",
            compute_flops=100e9,
            bandwidth_bytes=20e9,
            memory_bytes=16e9,
            source="stand-in for a 2-core AVX-512 server in float32: two cores at 2.5 GHz with one "
            "16-lane FMA unit each peak at 160 GFLOP/s, of which about 60 % is assumed; one DDR4 "
            "channel's 20 GB/s. Not a measurement",
        ),
    )
}


def hardware(name: str) -> Hardware:
    """The row of `HARDWARE` with this name (case does not matter).

    Raises UnknownHardwareError with the valid names and the nearest one.
    """
    row = HARDWARE.get(name.lower())
    if row is not None:
        return row
    near = difflib.get_close_matches(name.lower(), HARDWARE, n=1, cutoff=0.3)
    hint = f"; did you mean {near[0]!r}?" if near else ""
    raise UnknownHardwareError(
        f"unknown hardware {name!r}: valid names are {', '.join(sorted(HARDWARE))}{hint}"
    )
