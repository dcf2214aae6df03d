"""What a GPU installation consists of: the lock, the extra and the image, which no CPU installs."""

from __future__ import annotations

import importlib.metadata
import re
import tomllib
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name
from packaging.version import Version

from blendserve.runtime import guard

ROOT = Path(__file__).parents[2]
# SGLang 0.5.21 names it and does not import it; the public index has only a placeholder of it.
LEFT_OUT = {"cuda-tile"}


def pins(name: str) -> dict[str, str]:
    """Package -> version, of a lock file whose every line must be exact."""
    found = {}
    for line in (ROOT / "requirements" / name).read_text().splitlines():
        text = line.partition("#")[0].strip()
        if text:
            exact = re.fullmatch(r"([A-Za-z0-9._-]+)===?([^=*,;\s]+)", text)
            assert exact, f"{name}: {line!r} is no exact pin"
            found[canonicalize_name(exact[1])] = exact[2]
    return found


def needed_by(distribution: str) -> list[Requirement]:
    """What an installed distribution asks for on this platform, without its extras."""
    asked = map(Requirement, importlib.metadata.requires(distribution) or [])
    return [one for one in asked if not one.marker or one.marker.evaluate({"extra": ""})]


def test_cpu_and_gpu_have_the_same_sglang() -> None:
    assert pins("gpu.txt")["sglang"] == pins("cpu.txt")["sglang"]
    guard.check_version(pins("gpu.txt")["sglang"])


@pytest.mark.parametrize("distribution", ["sglang", "blendserve"])
def test_the_lock_has_what_is_asked_for_and_in_a_version_that_will_do(distribution: str) -> None:
    locked = pins("gpu.txt")
    if distribution == "sglang":
        assert importlib.metadata.version("sglang") == locked["sglang"]
    for asked in needed_by(distribution):
        name = canonicalize_name(asked.name)
        if name not in LEFT_OUT:
            assert name in locked, f"{distribution} needs {asked}"
            assert asked.specifier.contains(locked[name], prereleases=True), asked


def test_what_is_compiled_at_run_time_is_compiled_with_a_tool_of_the_lock() -> None:
    """FlashInfer's builds; and ours, because the lock is installed without isolated builds."""
    assert {"ninja", "setuptools", "flashinfer-python"} <= set(pins("gpu.txt"))


def test_the_extra_takes_the_releases_that_the_guard_takes() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    (sglang,) = map(Requirement, project["optional-dependencies"]["gpu"])
    assert sglang.name == "sglang"
    bounds = {spec.operator: spec.version for spec in sglang.specifier}
    assert bounds == {">=": guard.OLDEST_SGLANG, "<=": guard.NEWEST_SGLANG}


def test_the_image_has_the_toolkit_of_the_locks_cuda() -> None:
    """With nvcc, which the smaller images lack."""
    base = re.search(r"^FROM nvidia/cuda:(\S+?)-devel-", (ROOT / "Dockerfile").read_text(), re.M)
    assert base is not None
    image, locked = Version(base[1]), Version(pins("gpu.txt")["cuda-toolkit"])
    assert (image.major, image.minor) == (locked.major, locked.minor)
    assert "make setup-gpu" in (ROOT / "Dockerfile").read_text()
