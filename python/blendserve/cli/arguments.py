"""Types of command-line arguments that several commands have."""

from __future__ import annotations

import argparse
import math


def positive(text: str) -> int:
    """A whole number from 1. Raises ArgumentTypeError, which argparse prints, for anything else."""
    value = int(text) if text.isdecimal() else 0
    if value < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is not a whole number from 1")
    return value


def price(text: str) -> float:
    """A number that is not negative. Raises ArgumentTypeError for anything else."""
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if not 0 <= value < math.inf:
        raise argparse.ArgumentTypeError(f"{text!r} is no price; write a number, as 2.5")
    return value
