"""The docs tell the truth about the tree: the map names every module, and links lead somewhere."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PAGES = sorted(
    [ROOT / "README.md", *(ROOT / "docs").glob("*.md"), *(ROOT / "examples").glob("*.md")]
)


def test_the_map_names_every_module() -> None:
    text = (ROOT / "docs" / "structure.md").read_text()
    package = ROOT / "python" / "blendserve"
    modules = [path for path in package.rglob("*.py") if not path.name.startswith("__")]
    missing = [str(path.relative_to(ROOT)) for path in modules if path.name not in text]
    assert missing == []


def test_the_map_names_no_module_that_is_gone() -> None:
    text = (ROOT / "docs" / "structure.md").read_text()
    named = set(re.findall(r"(\w+\.py)", text))
    present = {path.name for path in ROOT.glob("python/**/*.py")}
    assert named <= present


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_between_pages_lead_somewhere(page: Path) -> None:
    links = re.findall(r"\]\(([^)#]+)(?:#[^)]*)?\)", page.read_text())
    local = [link for link in links if "://" not in link]
    assert [link for link in local if not (page.parent / link).exists()] == []
