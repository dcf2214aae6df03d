"""Ours beside vLLM, llama.cpp and stock SGLang on this machine's CPU, one engine after the other.

    python benchmark/peers/install.py && python benchmark/peers/run.py      # or: make peers

The same model (SmolLM2-135M), lines, KV memory and numbers of output tokens for all. Seconds are
those of the job, after two lines that warm each engine up; those of the engine's start stand apart.
Each row is a process of its own with a time limit, and is written to the result file as soon as it
is measured; a row that fails is written with its error. Rows that the file holds already are
replaced, so a part can be run alone:

    python benchmark/peers/run.py --engines vllm blendserve --jobs mmlu --dtypes bfloat16

With --continue only those that it lacks of this commit are run. Without a selection: what the table
in docs/peers.md shows. The machine should do nothing else.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from itertools import product
from pathlib import Path
from typing import Any, NamedTuple

import psutil

sys.path.insert(0, str(Path(__file__).parents[1]))

from engines import ENGINES
from jobs import JOBS, DataMissing
from record import commit, save

ROOT = Path(__file__).parents[2]
RESULTS = ROOT / "benchmark" / "results" / "peers.json"
KV_TOKENS = {"scarce": 4096, "ample": 32768}
DTYPES, ORDERS = ("float32", "bfloat16"), ("random", "sorted")
NAMED = ("engine", "job", "dtype", "kv", "order", "round")


class Row(NamedTuple):
    engine: str
    job: str
    dtype: str
    kv: str
    order: str
    round: int


class Part(NamedTuple):
    """Rows that are run without a selection.

    Attributes:
        rounds: at most so many of those asked for, unless with --every-round; all of them fit
            into 35 minutes of two cores.
    """

    engines: tuple[str, ...]
    job: str
    kv: str
    order: str
    dtypes: tuple[str, ...] = DTYPES
    rounds: int = 99


DEFAULT = (
    Part(("blendserve", "vllm"), "demo", "scarce", "random"),
    Part(("stock-best", "stock", "llama.cpp"), "demo", "scarce", "random", ("bfloat16",), 1),
    Part(("blendserve", "vllm"), "mmlu", "scarce", "random", ("bfloat16",)),
    Part(("blendserve", "vllm"), "mmlu", "scarce", "sorted", ("bfloat16",)),
    Part(("stock-best",), "mmlu", "scarce", "sorted", ("bfloat16",), 2),
    Part(("blendserve", "vllm"), "mmlu", "ample", "random", ("bfloat16",), 2),
    Part(("blendserve", "vllm"), "mmlu", "scarce", "random", ("float32",), 0),
    Part(("blendserve", "stock-best", "vllm"), "mmlu", "scarce", "sorted", ("float32",), 0),
    Part(("stock-best", "stock", "llama.cpp"), "demo", "scarce", "random", ("float32",), 0),
)


def main() -> int:
    options = arguments()
    stored = json.loads(options.json.read_text()) if options.json.is_file() else {"rows": []}
    results: dict[Row, dict[str, Any]] = {
        Row(*(row[name] for name in NAMED)): row for row in stored["rows"]
    }
    missing = missing_data(options.jobs or list(JOBS))
    began, code, failed = time.monotonic(), commit(), 0
    for row in selected(options):
        old = results.get(row)
        if options.resume and old and old["commit"] == code and "error" not in old:
            continue
        if row.job in missing:
            continue
        if options.minutes and time.monotonic() - began > 60 * options.minutes:
            print(f"{options.minutes} minutes are over; --continue runs the rest")
            break
        load = round(os.getloadavg()[0], 2)
        result = measure(row, options.lines, options.row_limit)
        results[row] = {**row._asdict(), **result, "commit": code, "load_before": load}
        failed += "error" in result
        report(row, result)
        write(options.json, results)
    print_medians(list(results.values()))
    for job, reason in missing.items():
        print(f"not run: {job}: {reason}", file=sys.stderr)
    return 1 if failed or missing else 0


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--engines", nargs="*", choices=list(ENGINES))
    parser.add_argument("--jobs", nargs="*", choices=list(JOBS))
    parser.add_argument("--dtypes", nargs="*", choices=DTYPES)
    parser.add_argument("--kv", nargs="*", choices=list(KV_TOKENS), help="KV memory")
    parser.add_argument("--orders", nargs="*", choices=ORDERS, help="of the input lines")
    parser.add_argument(
        "--all", action="store_true", help="every combination, not only those of the table"
    )
    parser.add_argument(
        "--every-round", action="store_true", help="no row in fewer rounds: 75 minutes for three"
    )
    parser.add_argument("--continue", dest="resume", action="store_true")
    parser.add_argument("--minutes", type=float, help="start no further row after so long")
    parser.add_argument("--row-limit", type=float, default=600, help="seconds (default: 600)")
    parser.add_argument("--lines", type=int, default=0, help="only the first so many of each job")
    parser.add_argument("--json", type=Path, default=RESULTS)
    parser.add_argument("--list", action="store_true", help="say what would be run, and end")
    options = parser.parse_args()
    if options.list:
        for row in selected(options):
            print(*row)
        raise SystemExit(0)
    return options


def selected(options: argparse.Namespace) -> Iterator[Row]:
    """Round by round, so that what changes on a machine over time meets all engines."""
    every = [
        Part((engine,), job, kv, order)
        for job, kv, order, engine in product(JOBS, KV_TOKENS, ORDERS, ENGINES)
    ]
    for number, part in product(range(1, options.rounds + 1), every if options.all else DEFAULT):
        wanted = (
            (part.job, options.jobs),
            (part.kv, options.kv),
            (part.order, options.orders),
        )
        few = number > part.rounds and not options.every_round
        if few or any(asked and one not in asked for one, asked in wanted):
            continue
        for dtype, engine in product(part.dtypes, part.engines):
            if engine in (options.engines or ENGINES) and dtype in (options.dtypes or DTYPES):
                yield Row(engine, part.job, dtype, part.kv, part.order, number)


def missing_data(jobs: list[str]) -> dict[str, str]:
    missing = {}
    for job in jobs:
        try:
            JOBS[job]()
        except DataMissing as error:
            missing[job] = str(error)
    return missing


def measure(row: Row, lines: int, limit: float) -> dict[str, Any]:
    """What row.py measured, or `error`: why it did not."""
    with tempfile.TemporaryDirectory() as folder:
        to, log = Path(folder) / "result.json", Path(folder) / "log"
        command = [sys.executable, str(Path(__file__).with_name("row.py"))]
        command += [row.engine, row.job, row.dtype, str(KV_TOKENS[row.kv]), row.order]
        command += [str(lines), str(to)]
        with log.open("wb") as output:
            process = subprocess.Popen(
                command,
                stdout=output,
                stderr=output,
                start_new_session=True,
                # What a row that is ended leaves behind goes with this folder.
                env={**os.environ, "TMPDIR": folder},
            )
            try:
                process.wait(limit)
            except subprocess.TimeoutExpired:
                return {"error": f"not done after {limit:.0f} s"}
            finally:
                end(process)
        if not to.is_file():
            text = log.read_text(errors="replace").strip()
            return {"error": text[-1500:] or f"status {process.returncode}"}
        found: dict[str, Any] = json.loads(to.read_text())
        return found | ({"lines": lines} if lines else {})


def end(process: subprocess.Popen[bytes]) -> None:
    """With all processes below it: the next row has the machine for itself."""
    below: list[psutil.Process] = []
    with contextlib.suppress(psutil.NoSuchProcess):
        below = psutil.Process(process.pid).children(recursive=True)
    process.kill()
    for child in below:
        with contextlib.suppress(psutil.NoSuchProcess):
            child.kill()
    process.wait()
    psutil.wait_procs(below, timeout=30)


def write(path: Path, results: dict[Row, dict[str, Any]]) -> None:
    rows = [results[row] for row in sorted(results)]
    save(path, {"kv_tokens": KV_TOKENS, "medians": medians(rows), "rows": rows})


def medians(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Of each combination, over its rounds."""
    groups: dict[tuple[str, ...], list[dict[str, Any]]] = {}
    for row in rows:
        if "error" not in row:
            groups.setdefault(tuple(row[name] for name in NAMED[:-1]), []).append(row)
    found = []
    for key, group in groups.items():

        def median(name: str, group: list[dict[str, Any]] = group) -> float:
            return statistics.median(row[name] for row in group)

        found.append(
            {
                **dict(zip(NAMED[:-1], key, strict=True)),
                "rounds": len(group),
                "seconds": round(median("seconds"), 2),
                "start_seconds": round(median("start_seconds"), 1),
                "hit_rate": round(median("cached_tokens") / median("prompt_tokens"), 4),
                "output_tokens": int(median("output_tokens")),
                "peak_bytes": int(median("peak_bytes")),
            }
        )
    return found


def report(row: Row, result: dict[str, Any]) -> None:
    said = result.get("error")
    if said is None:
        hits = result["cached_tokens"] / result["prompt_tokens"]
        said = (
            f"{result['seconds']:7.1f} s, start {result['start_seconds']:5.1f} s, hits {hits:5.1%},"
            f" {result['output_tokens']} output tokens, {result['peak_bytes'] / 2**30:.1f} GiB"
        )
    print(f"{row.round} {' '.join(row[:-1]):45} {said}", flush=True)


def print_medians(rows: list[dict[str, Any]]) -> None:
    """As the table of a document; the last column is how many times as long as ours."""
    found = medians(rows)
    ours = {
        tuple(one[name] for name in NAMED[1:-1]): one["seconds"]
        for one in found
        if one["engine"] == "blendserve"
    }
    print("\n| job, KV, input | dtype | engine | seconds | beside ours | hits | start | memory |")
    print("|---|---|---|---|---|---|---|---|")
    for one in sorted(found, key=lambda one: [one[name] for name in NAMED[1:-1]]):
        own = ours.get(tuple(one[name] for name in NAMED[1:-1]))
        ratio = f"{one['seconds'] / own:.2f}" if own else ""
        print(
            f"| {one['job']}, {one['kv']}, {one['order']} | {one['dtype']} | {one['engine']} "
            f"| {one['seconds']:.1f} | {ratio} | {one['hit_rate']:.0%} "
            f"| {one['start_seconds']:.0f} s | {one['peak_bytes'] / 2**30:.1f} GiB |"
        )


if __name__ == "__main__":
    sys.exit(main())
