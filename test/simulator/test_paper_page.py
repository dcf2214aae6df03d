"""docs/paper.md is what the committed results give."""

import json
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
    for name in ("paper", "page", "sections_main", "sections_more", "sections_worlds"):
        sys.modules.pop(name, None)


def test_the_page_is_what_the_results_give(paper):
    assert paper.PAGE.read_text() == paper.page()


def test_the_table_of_kept_sharing_is_what_the_results_give(paper):
    assert paper.PLANNER_PAGE.read_text() == paper.planner_page()


def test_the_readme_quotes_the_range_over_seeds() -> None:
    path = ROOT / "benchmark" / "results" / "simulator" / "worlds.json"
    runs = [
        run
        for run in json.loads(path.read_text())["runs"]
        if (run["chip"], run["workload"], run["terms"]) == ("a100", "trace2", "nothing")
    ]
    readme = " ".join((ROOT / "README.md").read_text().split())
    for overlap in ("sequential", "interference"):
        seconds = {
            (run["policy"], run["seed"]): run["seconds"]
            for run in runs
            if run["overlap"] == overlap
        }
        gains = [seconds["dfs", seed] / seconds["blend", seed] for seed in range(5)]
        assert f"{min(gains):.2f} to {max(gains):.2f} times" in readme
