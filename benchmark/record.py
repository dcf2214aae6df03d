"""Result files: what was measured, and of which commit, by which command, where and when."""

from __future__ import annotations

import json
import os
import platform
import subprocess
import sys
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

_ROOT = Path(__file__).parents[1]


def save(path: Path, result: dict[str, Any]) -> None:
    """Write a result as JSON, behind what one needs to know of it."""
    text = json.dumps(provenance() | result, indent=1)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text + "\n")


def provenance() -> dict[str, Any]:
    """load_average: of the last 1, 5 and 15 minutes, this benchmark's own work included."""
    script = Path(sys.argv[0]).resolve()
    name = script.relative_to(_ROOT) if script.is_relative_to(_ROOT) else Path(script.name)
    return {
        "command": " ".join(["python", str(name), *sys.argv[1:]]),
        "commit": commit(),
        "date": datetime.now(UTC).date().isoformat(),
        "machine": f"{_processor()}, {os.cpu_count()} cores, {platform.system()}",
        "load_average": [round(load, 2) for load in os.getloadavg()],
    }


def commit() -> str:
    """Of the code that runs, with a plus sign where files differ from it; empty outside a
    repository."""

    def git(*words: str) -> str:
        done = subprocess.run(["git", *words], cwd=_ROOT, capture_output=True, text=True)
        return done.stdout.strip()

    changed = git("status", "--porcelain", "--untracked-files=no", "--", "python", "sgl_kernel_ext")
    return git("rev-parse", "--short", "HEAD") + ("+" if changed else "")


def _processor() -> str:
    for line in Path("/proc/cpuinfo").read_text().splitlines():
        if line.startswith("model name"):
            return line.partition(":")[2].strip()
    return platform.machine()
