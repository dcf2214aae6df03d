"""How the tests share the workers of pytest-xdist."""

from __future__ import annotations

from typing import Any

import pytest
from xdist.scheduler import LoadScopeScheduling

ENGINES = "test/end_to_end/"


class ByFile(LoadScopeScheduling):
    """A file stays together, because of what its fixtures set up. Real engines run one after the
    other, on one worker."""

    def _split_scope(self, nodeid: str) -> str:
        return ENGINES if nodeid.startswith(ENGINES) else nodeid.split("::")[0]


def pytest_xdist_make_scheduler(config: pytest.Config, log: Any) -> ByFile:
    return ByFile(config, log)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Those that take longest begin."""
    items.sort(key=lambda item: not item.nodeid.startswith(ENGINES))
