"""Flags that say how the input of ``run-batch`` and ``merge`` is read."""

from __future__ import annotations

import argparse

from blendserve.cli.row_mapping import add_mapping_flags
from blendserve.cli.sources import FORMATS


def add_input_flags(parser: argparse.ArgumentParser) -> None:
    """Add `--format`, those of a row mapping, and `--carry`."""
    parser.add_argument(
        "--format", choices=FORMATS, help="what the input is (default: as its name says, or jsonl)"
    )
    add_mapping_flags(parser)
    parser.add_argument(
        "--carry", metavar="A,B", help="columns of the input that each result gets as `input`"
    )
