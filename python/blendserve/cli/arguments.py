"""Types of command-line arguments that several commands have."""

from __future__ import annotations

import argparse


def positive(text: str) -> int:
    """A whole number from 1. Raises ArgumentTypeError, which argparse prints, for anything else."""
    value = int(text) if text.isdecimal() else 0
    if value < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is not a whole number from 1")
    return value
