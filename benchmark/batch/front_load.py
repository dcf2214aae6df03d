"""run-batch over a fake engine: lines per second end to end, and memory of the front process.

    python benchmark/batch/front_load.py --json benchmark/results/batch-front.json

The fake engine answers at once and is a process of its own, as a real one is. The first job is
small and gives the memory to compare with; the second is large.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import psutil
from fake_load import FAKE_ENGINE, write_job

# run-batch as it is, but for the command that starts an engine.
_RUN = """
import sys
from blendserve.cli import main, offline_job
offline_job.ENGINE_COMMAND = (sys.executable, {engine!r}, "--parallel", "64")
sys.exit(main(["run-batch", *sys.argv[1:]]))
"""


def measure(folder: Path, lines: int, line_bytes: int) -> dict[str, Any]:
    """One job from start to end."""
    source, output = folder / f"in-{lines}.jsonl", folder / f"out-{lines}.jsonl"
    size = write_job(source, lines, line_bytes)
    began = time.monotonic()
    command = [sys.executable, "-c", _RUN.format(engine=str(FAKE_ENGINE))]
    command += ["-i", str(source), "-o", str(output), "--json", "--ordered"]
    command += ["--served-model-name", "fake-model"]
    process = subprocess.Popen(
        command,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        text=True,
    )
    watched = psutil.Process(process.pid)
    peak = 0
    cpu = {"front": 0.0, "engine": 0.0}
    states: dict[str, float] = {}
    assert process.stdout is not None
    os.set_blocking(process.stdout.fileno(), False)
    while process.poll() is None:
        try:
            peak = max(peak, watched.memory_info().rss)
            cpu["front"] = sum(watched.cpu_times()[:2])
            for child in watched.children():
                cpu["engine"] = max(cpu["engine"], sum(child.cpu_times()[:2]))
        except psutil.NoSuchProcess:
            continue
        for said in process.stdout.readlines():
            states.setdefault(json.loads(said)["state"], time.monotonic() - began)
        time.sleep(0.02)
    seconds = time.monotonic() - began
    assert process.returncode == 0
    with output.open("rb") as answers:
        answered = sum(1 for _ in answers)
    assert answered == lines
    up = min(at for state, at in states.items() if not state.startswith("engine"))
    return {
        "lines": lines,
        "input_bytes": size,
        "seconds": seconds,
        "seconds_before_engine_up": up,
        "lines_per_second": lines / seconds,
        "cpu_seconds": cpu,
        "peak_rss_bytes": peak,
        "states_seconds": states,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--small", type=int, default=5_000, help="lines of the first job")
    parser.add_argument("--large", type=int, default=200_000, help="lines of the second job")
    parser.add_argument("--line-bytes", type=int, default=3_200)
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        jobs = [
            measure(Path(name), lines, options.line_bytes)
            for lines in (options.small, options.large)
        ]
    growth = jobs[1]["peak_rss_bytes"] - jobs[0]["peak_rss_bytes"]
    result = {
        "cpus": os.cpu_count(),
        "load_average": os.getloadavg(),
        "jobs": jobs,
        "rss_growth_bytes": growth,
    }
    text = json.dumps(result, indent=2)
    print(text)
    if options.json:
        options.json.write_text(text + "\n")


if __name__ == "__main__":
    main()
