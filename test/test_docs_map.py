"""The docs tell the truth about the tree: the map names every module, and links lead somewhere."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PAGES = sorted(
    [ROOT / "README.md", *(ROOT / "docs").glob("*.md"), *(ROOT / "examples").glob("*.md")]
)


def files_of_the_map() -> set[str]:
    """The files that the map's table names. A name without a folder lies where the one before it
    lies, and a folder is below python/blendserve, or the tree's own."""
    text = (ROOT / "docs" / "structure.md").read_text().partition("## Files")[2]
    found = set()
    for row in re.findall(r"^\| (`[^|]*) \|", text, re.MULTILINE):
        folder = ""
        for name in re.findall(r"`([^`]+)`", row):
            if "/" in name:
                folder = name.rpartition("/")[0].removeprefix("python/blendserve/")
            if name.endswith(".py"):
                path = f"{folder}/{name.rpartition('/')[2]}"
                found.add(path if (ROOT / path).exists() else f"python/blendserve/{path}")
    return found


def test_the_map_names_every_module_and_none_that_is_gone() -> None:
    packages = (ROOT / "python" / "blendserve", ROOT / "sgl_kernel_ext")
    found = (path for package in packages for path in package.rglob("*.py"))
    modules = {str(path.relative_to(ROOT)) for path in found if not path.name.startswith("__")}
    named = files_of_the_map() | {"python/blendserve/config.py"}
    assert named == modules


# What somebody looks for, and where it is.
WHERE = {
    "how a batch file is checked": "batch/validation.py",
    "which headers and fields a line may not have": "batch/bodies.py",
    "what a wrong field of a request is answered": "runtime/request_checks.py",
    "how answers become durable": "batch/journal.py",
    "the batch directory's schema": "batch/tables.py",
    "whose batch is next": "batch/backlog.py",
    "how an engine that hangs is found": "cli/engine_process.py",
    "what a tenant may see": "batch/keys.py",
    "how prompts become a tree": "planner/prefix_tree.py",
    "what a request costs": "planner/cost_model.py",
    "what a step costs": "planner/step_costs.py",
    "how unknown lengths are estimated": "planner/length_model.py",
    "where the tree is split and sorted": "planner/transform.py",
    "which of the two heads starts": "policy/admission.py",
    "whether memory lasts": "policy/memory_forecast.py",
    "who may pass a head that finds no memory": "policy/overtaking.py",
    "how much prefill a step carries": "policy/pacing.py",
    "what is evicted": "runtime/eviction_order.py",
    "how many lines are sent ahead": "runtime/credits.py",
    "what is expected of SGLang": "runtime/guard.py",
    "which kernels compute attention on a CPU": "runtime/attention_cpu.py",
    "what no policy can beat": "simulator/bounds.py",
}


def test_where_things_are() -> None:
    named = files_of_the_map()
    assert [path for path in WHERE.values() if f"python/blendserve/{path}" not in named] == []


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_between_pages_lead_somewhere(page: Path) -> None:
    links = re.findall(r"\]\(([^)#]+)(?:#[^)]*)?\)", page.read_text())
    local = [link for link in links if "://" not in link]
    assert [link for link in local if not (page.parent / link).exists()] == []
