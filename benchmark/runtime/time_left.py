"""How true the time left and the share of the bound are, which a running job shows.

Three jobs on the real CPU engine, one server for all: the demo's (lengths not known, little KV
memory), made-up prompts with answers of very different forced lengths, and many prompts with short
answers beside a few long ones. A recorder asks for the status twice a second; what `run-batch`
would have shown at each moment is compared with what was left then.

    python benchmark/runtime/time_left.py [--hardware FILE.json] [--json OUT.json]

--hardware: as `blendserve calibrate` wrote it. Without one there is no bound to have a share of.
"""

from __future__ import annotations

import argparse
import json
import random
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx

sys.path.insert(0, str(Path(__file__).parents[1]))

from record import save

from blendserve.cli.figures import FigureKeeper
from blendserve.cli.follow import openai_client
from blendserve.cli.server_process import free_port, running_server

ROOT = Path(__file__).parents[2]
FLAGS = ("--max-total-tokens", "4096", "--enable-cache-report")
POLL_SECONDS = 0.5
ENDED = ("completed", "failed", "expired", "cancelled")


def spread(rng: random.Random) -> Iterator[dict[str, Any]]:
    """Answers of 4 to 400 tokens."""
    for _ in range(90):
        tokens = min(max(round(rng.lognormvariate(4.0, 1.0)), 4), 400)
        yield body(rng, rng.randrange(20, 120), tokens)


def stragglers(rng: random.Random) -> Iterator[dict[str, Any]]:
    """150 short answers to a common beginning, six long ones."""
    common = [rng.randrange(100, 20_000) for _ in range(150)]
    for _ in range(150):
        yield body(rng, rng.randrange(40, 80), rng.randrange(4, 12), common)
    for _ in range(6):
        yield body(rng, 60, 500)


def body(
    rng: random.Random, prompt: int, output: int, common: list[int] | None = None
) -> dict[str, Any]:
    ids = [*(common or ()), *(rng.randrange(100, 20_000) for _ in range(prompt))]
    return {"prompt": ids, "max_tokens": output, "ignore_eos": True, "temperature": 0}


def job_of(name: str) -> list[dict[str, Any]]:
    if name == "demo":
        text = (ROOT / "examples" / "demo_batch.jsonl").read_text()
        return [json.loads(line) for line in text.splitlines()]
    rng = random.Random(0)
    bodies = list({"spread": spread, "stragglers": stragglers}[name](rng))
    rng.shuffle(bodies)
    url = "/v1/completions"
    return [
        {"custom_id": f"{name}-{k}", "method": "POST", "url": url, "body": made}
        for k, made in enumerate(bodies)
    ]


def record(url: str, name: str, folder: Path) -> list[tuple[float, dict[str, Any], str]]:
    """(seconds, status) while the job ran, and its id."""
    source = folder / f"{name}.jsonl"
    lines = job_of(name)
    source.write_text("".join(json.dumps(line) + "\n" for line in lines))
    client = openai_client(url, {})
    upload = client.files.create(file=source, purpose="batch")
    batch = client.batches.create(
        input_file_id=upload.id, endpoint=lines[0]["url"], completion_window="24h"
    )
    looks = []
    with httpx.Client(trust_env=False) as http:
        while batch.status not in ENDED:
            status = http.get(f"{url}/blendserve/status").raise_for_status().json()
            looks.append((time.monotonic(), status, batch.id))
            time.sleep(POLL_SECONDS)
            batch = client.batches.retrieve(batch.id)
    if batch.status != "completed":
        raise SystemExit(f"{name} ended as {batch.status}")
    looks.append((time.monotonic(), {}, batch.id))
    return looks


def judge(looks: list[tuple[float, dict[str, Any], str]]) -> dict[str, Any]:
    """Errors of the time left from a third of the run on, and the largest share of the bound."""
    begun = next(at for at, status, _ in looks if running(status))
    ended = looks[-1][0]
    keeper = FigureKeeper()
    rows = []
    for at, status, batch_id in looks[:-1]:
        figures = keeper.update(status, batch_id, now=at)
        rows.append((at - begun, ended - at, figures.eta_seconds, figures.share_of_bound))
    whole = ended - begun
    late = [row for row in rows if row[0] >= whole / 3]
    # The last two seconds are a fifth of nothing much.
    told = [(left, eta) for _, left, eta, _ in late if eta is not None and left >= 2.0]
    errors = sorted(abs(eta - left) / left for left, eta in told)
    of_whole = sorted(abs(eta - left) / whole for left, eta in told)
    shares = [share for *_, share in rows if share is not None]
    return {
        "seconds": whole,
        "looks_from_a_third_on": len(late),
        "without_time_left": sum(eta is None for _, _, eta, _ in late),
        "part_within_20_percent": sum(error <= 0.2 for error in errors) / max(len(errors), 1),
        "median_error": errors[len(errors) // 2] if errors else None,
        "worst_error": errors[-1] if errors else None,
        "worst_error_of_whole_run": of_whole[-1] if of_whole else None,
        "largest_share_of_bound": max(shares, default=None),
        "last_share_of_bound": shares[-1] if shares else None,
        "told": [
            {"at": round(at, 2), "left": round(left, 2), "eta": eta and round(eta, 2)}
            for at, left, eta, _ in rows
        ],
    }


def running(status: dict[str, Any]) -> bool:
    return any(job["phase"] == "running" for job in status.get("jobs", []))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--hardware", type=Path)
    parser.add_argument("--json", type=Path)
    parser.add_argument("--keep", type=Path, help="the raw looks, to judge again")
    parser.add_argument("--job", choices=("demo", "spread", "stragglers"), action="append")
    options = parser.parse_args()
    found = {}
    with tempfile.TemporaryDirectory() as name:
        folder, port = Path(name), free_port()
        command = [sys.executable, "-m", "blendserve", "serve", "--port", str(port), *FLAGS]
        command += ["--batch-dir", str(folder / "batches")]
        if options.hardware is not None:
            command += ["--hardware", str(options.hardware)]
        with running_server(command, port, folder / "log") as url:
            for job in options.job or ("demo", "spread", "stragglers"):
                looks = record(url, job, folder)
                if options.keep is not None:
                    options.keep.mkdir(exist_ok=True)
                    (options.keep / f"{job}.json").write_text(json.dumps(looks))
                found[job] = judge(looks)
    for job, result in found.items():
        shown = {key: value for key, value in result.items() if key != "told"}
        print(job, json.dumps(shown, indent=1))
    if options.json is not None:
        save(options.json, {"calibrated": options.hardware is not None, "jobs": found})


if __name__ == "__main__":
    main()
