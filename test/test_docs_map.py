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
    packages = (ROOT / "python" / "blendserve", ROOT / "sgl_kernel_ext")
    found = (path for package in packages for path in package.rglob("*.py"))
    modules = [path for path in found if not path.name.startswith("__")]
    missing = [str(path.relative_to(ROOT)) for path in modules if path.name not in text]
    assert missing == []


def test_the_map_names_no_module_that_is_gone() -> None:
    text = (ROOT / "docs" / "structure.md").read_text()
    named = set(re.findall(r"(\w+\.py)", text))
    sources = (*ROOT.glob("python/**/*.py"), *ROOT.glob("sgl_kernel_ext/**/*.py"))
    present = {path.name for path in sources}
    assert named <= present


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_between_pages_lead_somewhere(page: Path) -> None:
    links = re.findall(r"\]\(([^)#]+)(?:#[^)]*)?\)", page.read_text())
    local = [link for link in links if "://" not in link]
    assert [link for link in local if not (page.parent / link).exists()] == []
