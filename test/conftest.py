"""How the tests share the workers of pytest-xdist."""

from __future__ import annotations

from pathlib import Path

import pytest

ENGINES = Path(__file__).parent / "end_to_end"


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Real engines run one after the other, on one worker, and first: they take the longest. All
    else stays together by file, because of what a file's fixtures set up."""
    items.sort(key=lambda item: ENGINES not in item.path.parents)
    for item in items:
        group = "engines" if ENGINES in item.path.parents else str(item.path)
        item.add_marker(pytest.mark.xdist_group(group))
