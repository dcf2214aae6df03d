"""Flags of `blendserve serve` as keyword arguments."""

from __future__ import annotations

from typing import Any


def as_flags(given: dict[str, Any]) -> list[str]:
    """`{"tp_size": 2, "enable_metrics": True}` as `--tp-size 2 --enable-metrics`.

    None is left out. Raises ValueError for False: a switch is left out instead.
    """
    flags: list[str] = []
    for name, value in given.items():
        flag = "--" + name.replace("_", "-")
        if value is None:
            continue
        if value is False:
            raise ValueError(f"{name}=False: leave {name} out; {flag} is a switch.")
        flags.append(flag)
        if value is not True:
            flags += [str(one) for one in value] if isinstance(value, list) else [str(value)]
    return flags
