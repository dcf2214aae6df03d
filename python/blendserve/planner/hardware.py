"""What one accelerator can do: dense FLOP/s, memory bandwidth, memory size.

Every row names where its figures come from. They are what a datasheet promises; ceilings that were
measured on a device stand in a JSON file, whose path `hardware` takes in place of a name.
"""

from __future__ import annotations

import difflib
import json
import math
import re
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from .chips import CHIPS
from .kernel_tables import UNREADABLE, KernelTables
from .measured_steps import MeasuredSteps, UnusableSteps

_FIGURES = ("compute_flops", "bandwidth_bytes", "memory_bytes")
_TEXTS = ("base", "name", "source", "kernels")
_STEPS = "steps"
_FILE_KEYS = (*_FIGURES, *_TEXTS, _STEPS)


@dataclass(frozen=True)
class Hardware:
    """One device, or several that act as one (see `scaled`).

    compute_flops: dense matrix rate in the serving dtype, FLOP/s.
    bandwidth_bytes: main-memory bandwidth, bytes/s.
    memory_bytes: capacity of that memory, bytes.
    source: where the figures are from.
    fp8_flops: dense 8-bit matrix rate, FLOP/s; 0 where there is none.
    link_bytes: what one direction of its links to other devices carries, bytes/s; 0 if unknown.
    kernels: name or file of its measured kernels (`kernel_tables`); empty without.
    attained: the figures are what kernels attain, not what a datasheet promises.
    steps: of an engine that was measured on it, by model.
    guess: nobody has measured or promised them: they do to weigh requests against each other, not
        to say how long a job takes at least.
    """

    name: str
    compute_flops: float
    bandwidth_bytes: float
    memory_bytes: float
    source: str
    fp8_flops: float = 0.0
    link_bytes: float = 0.0
    kernels: str = ""
    attained: bool = False
    guess: bool = False
    steps: tuple[MeasuredSteps, ...] = ()

    def __post_init__(self) -> None:
        for field in _FIGURES:
            value = getattr(self, field)
            if not (value > 0 and math.isfinite(value)):
                raise ValueError(
                    f"hardware {self.name!r}: {field} must be positive and finite, not {value!r}"
                )

    @classmethod
    def from_dict(cls, given: dict[str, Any]) -> Hardware:
        """What `dataclasses.asdict` made, perhaps in another process."""
        steps = tuple(MeasuredSteps(**entry) for entry in given.get(_STEPS, ()))
        return cls(**{**given, _STEPS: steps})

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
            fp8_flops=self.fp8_flops * ranks,
        )


class HardwareError(ValueError):
    """A file of measured ceilings that cannot be used: names it, the key and the remedy."""


class UnknownHardwareError(HardwareError):
    """A name that is not in `HARDWARE`."""


HARDWARE: dict[str, Hardware] = {
    chip.name: Hardware(
        name=chip.name,
        compute_flops=chip.tera_flops * 1e12,
        bandwidth_bytes=chip.bandwidth * 1e9,
        memory_bytes=chip.memory * 1e9,
        source=chip.source,
        fp8_flops=chip.fp8_tera_flops * 1e12,
        link_bytes=chip.links * 1e9,
        kernels=chip.kernels,
    )
    for chip in CHIPS
} | {
    "cpu": Hardware(
        name="cpu",
        compute_flops=100e9,
        bandwidth_bytes=20e9,
        memory_bytes=16e9,
        source="stand-in for a 2-core AVX-512 server in float32: two cores at 2.5 GHz with one "
        "16-lane FMA unit each peak at 160 GFLOP/s, of which about 60 % is assumed; one DDR4 "
        "channel's 20 GB/s. Not a measurement",
        attained=True,
        guess=True,
    )
}
_ALIASES = {alias: chip.name for chip in CHIPS for alias in chip.aliases}


def known_device(device: str) -> Hardware | None:
    """The row of the device that a driver reports by this name; None if there is none."""
    for chip in CHIPS:
        if re.search(chip.device, device, re.IGNORECASE):
            return HARDWARE[chip.name]
    return None


def nearest_device(memory_bytes: float) -> Hardware:
    """The GPU of the table whose memory is nearest: the best guess for one that it lacks."""
    rows = [HARDWARE[chip.name] for chip in CHIPS]
    return min(rows, key=lambda row: abs(math.log(row.memory_bytes / memory_bytes)))


def hardware(name: str) -> Hardware:
    """The row of `HARDWARE` with this name, or one that people use for it ("h100"; case does not
    matter), or the device that a file describes, if the name ends in .json.

    The file holds an object with any of compute_flops, bandwidth_bytes and memory_bytes (units as
    in `Hardware`), `base`, the row that the missing ones are taken from, `name` and `source`; or
    that object under the key "hardware" of a larger one, such as a benchmark's results.
    Raises UnknownHardwareError with the valid names and the nearest one; HardwareError for a file
    that cannot be used.
    """
    if name.lower().endswith(".json"):
        return _measured(Path(name))
    plain = re.sub(r"[\s_]+", "-", name.strip().lower())
    row = HARDWARE.get(_ALIASES.get(plain, plain))
    if row is not None:
        return row
    near = difflib.get_close_matches(plain, [*HARDWARE, *_ALIASES], n=1, cutoff=0.3)
    hint = f"; did you mean {near[0]!r}?" if near else ""
    raise UnknownHardwareError(
        f"unknown hardware {name!r}: valid names are {', '.join(sorted(HARDWARE))}, or a .json "
        f"file of measured figures{hint}"
    )


def _measured(path: Path) -> Hardware:
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise HardwareError(f"{path}: {error.strerror}; give a file of figures") from error
    except ValueError as error:
        raise HardwareError(f"{path}: not valid JSON ({error}); write one object") from error
    if isinstance(found, dict) and isinstance(found.get("hardware"), dict):
        found = found["hardware"]
    if not isinstance(found, dict):
        raise HardwareError(f"{path}: must hold an object with {', '.join(_FILE_KEYS)}")
    for key in found:
        if key not in _FILE_KEYS:
            near = difflib.get_close_matches(key, _FILE_KEYS, n=1)
            hint = f"did you mean {near[0]!r}?" if near else f"use {', '.join(_FILE_KEYS)}"
            raise HardwareError(f"{path}: unknown key {key!r}; {hint}")
    for key in _TEXTS:
        if not isinstance(found.get(key, ""), str):
            raise HardwareError(f"{path}: {key} is {found[key]!r}; it must be a text")
    given = found.get("base", "").lower()
    base = HARDWARE.get(_ALIASES.get(given, given))
    if base is None and "base" in found:
        raise HardwareError(
            f"{path}: base {found['base']!r} is unknown; use one of {', '.join(sorted(HARDWARE))}"
        )
    flops, bandwidth, memory = (_figure(path, found, key, base) for key in _FIGURES)
    source = found.get("source", "measured")
    taken = [key for key in _FIGURES if key not in found]
    if base is not None and taken:
        source += f"; {', '.join(taken)}: {base.source}"
    default = f"{base.name}, measured" if base else path.stem
    return Hardware(
        name=found.get("name", default),
        compute_flops=flops,
        bandwidth_bytes=bandwidth,
        memory_bytes=memory,
        source=f"{source} ({path})",
        kernels=_kernels(path, found["kernels"]) if found.get("kernels") else "",
        attained=True,
        steps=_steps(path, found.get(_STEPS, [])),
    )


def _steps(path: Path, given: Any) -> tuple[MeasuredSteps, ...]:
    if not isinstance(given, list):
        raise HardwareError(f"{path}: {_STEPS} is {given!r}; it must be a list")
    try:
        return tuple(MeasuredSteps.read(entry) for entry in given)
    except UnusableSteps as error:
        remedy = "`blendserve calibrate` writes them, or leave the key away"
        raise HardwareError(f"{path}: {_STEPS}: {error}; {remedy}") from error


def _kernels(path: Path, name: str) -> str:
    """The file of kernel times that a file of figures names, seen to be one."""
    file = path.parent / name
    try:
        KernelTables.load(file)
    except UNREADABLE as error:
        raise HardwareError(
            f"{path}: kernels: {file} is no file of kernel times ({error}); name the kernels.npz "
            "that benchmark/gpu/campaign.py wrote beside it, or leave the key away"
        ) from error
    return str(file)


def _figure(path: Path, found: dict[str, Any], key: str, base: Hardware | None) -> float:
    if key not in found:
        if base is None:
            raise HardwareError(
                f"{path}: {key} is missing; add it, or name the row to take it from with base"
            )
        return float(getattr(base, key))
    value = found[key]
    if type(value) not in (int, float) or not (value > 0 and math.isfinite(value)):
        raise HardwareError(f"{path}: {key} is {value!r}; it must be a positive number")
    return float(value)
