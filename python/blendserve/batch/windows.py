"""Completion windows: OpenAI's "24h", and real ones such as "30m", "2h" or "7d"."""

from __future__ import annotations

import re

_WINDOW = re.compile(r"([1-9][0-9]{0,5})([mhd])\Z")
_UNIT_SECONDS = {"m": 60, "h": 3_600, "d": 86_400}
_MAX_WINDOW_SECONDS = 365 * 86_400


def window_seconds(window: str) -> int:
    """Length of a completion window in seconds; ValueError if it is not a window."""
    match = _WINDOW.match(window)
    if match is None:
        raise ValueError(
            "completion_window must be a whole number followed by m, h or d, "
            'for example "30m", "24h" or "7d"'
        )
    seconds = int(match[1]) * _UNIT_SECONDS[match[2]]
    if seconds > _MAX_WINDOW_SECONDS:
        raise ValueError("completion_window must not exceed 365d")
    return seconds
