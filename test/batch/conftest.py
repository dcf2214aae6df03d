"""Fixtures of the batch tests: a running server on a fresh directory, its engine, its clock."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
from batch_fakes import FakeExecutor
from batch_server import BatchServer, Clock

from blendserve.batch import BatchLimits


@pytest.fixture
def executor() -> FakeExecutor:
    return FakeExecutor()


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture
def server(tmp_path: Path, executor: FakeExecutor, clock: Clock) -> Iterator[BatchServer]:
    limits = BatchLimits(max_lines=300, max_file_bytes=400_000, max_listed_faults=20)
    with BatchServer(tmp_path / "batches", executor, limits, clock) as running:
        yield running
