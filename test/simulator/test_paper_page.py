"""docs/paper.md is what the committed results give."""

import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


@pytest.fixture
def paper(monkeypatch):
    """The page's writer, without its plots."""
    monkeypatch.syspath_prepend(str(ROOT / "benchmark" / "simulator"))
    pytest.importorskip("matplotlib")
    import paper
    import sections_main
    import sections_more

    for module in (sections_main, sections_more):
        monkeypatch.setattr(module, "save", lambda _, name: f"![{name}](paper/{name}.png)\n")
    yield paper
    for name in ("paper", "page", "sections_main", "sections_more"):
        sys.modules.pop(name, None)


def test_the_page_is_what_the_results_give(paper):
    assert paper.PAGE.read_text() == paper.page()


def test_the_table_of_kept_sharing_is_what_the_results_give(paper):
    assert paper.PLANNER_PAGE.read_text() == paper.planner_page()
