"""Many frontend programs as one job: the client's memory, and what a killed client leaves behind.

    python benchmark/runtime/frontend_many.py --output benchmark/results/frontend-many.json

A client process runs one program over all inputs on a server of a tiny model, and tells its largest
memory. A second one is killed (SIGKILL) when a part of its programs has ended; then the server is
asked until nothing of that job is left on it.
"""

from __future__ import annotations

import argparse
import json
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import httpx

sys.path.insert(0, str(Path(__file__).parents[1]))
sys.path.insert(0, str(Path(__file__).parents[2] / "test" / "end_to_end"))
import tiny_model
from record import save

from blendserve.cli.server_process import free_port, running_server

_CLEAN_SECONDS = 30.0


def client(url: str, count: int, threads: int) -> None:
    """The child process."""
    import sglang as sgl

    from blendserve.frontend import Endpoint

    @sgl.function
    def short(s: Any, number: int) -> None:
        s += f"Subject {number % 100} has a few words that are the same for a hundred others. "
        s += f"Number {number}:" + sgl.gen("x", max_tokens=2, ignore_eos=True)

    inputs = [{"number": number} for number in range(count)]
    begin = time.monotonic()
    states = short.run_batch(
        inputs, temperature=0, num_threads=threads, backend=Endpoint(url), progress_bar=True
    )
    seconds = time.monotonic() - begin
    failed = sum(state.error() is not None for state in states)
    print(json.dumps({"seconds": round(seconds, 1), "failed": failed, "peak_mib": peak_mib()}))


def peak_mib() -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    line = next(line for line in lines if line.startswith("VmHWM"))
    return int(line.split()[1]) // 1024


def killed(url: str, command: list[str], after: int) -> dict[str, Any]:
    """What is left of a client that is killed when so many programs have ended."""
    ended = 0
    last: dict[str, int] = {}
    with subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL) as child:
        while ended < after:
            if child.poll() is not None:
                raise SystemExit("the client ended before it was killed")
            status = httpx.get(f"{url}/blendserve/status", timeout=60).json()
            for job in status["jobs"]:
                last[job["job_id"]] = job.get("ended", 0)
            ended = sum(last.values())
            time.sleep(0.2)
        child.send_signal(signal.SIGKILL)
        begin = time.monotonic()
    while time.monotonic() - begin < _CLEAN_SECONDS:
        status = httpx.get(f"{url}/blendserve/status", timeout=60).json()
        running = sum(sum(one["running"].values()) for one in status["schedulers"])
        queued = sum(sum(one["queued"].values()) for one in status["schedulers"])
        if not status["jobs"] and not running and not queued:
            break
        time.sleep(0.1)
    one = status["schedulers"][0]
    return {
        "ended_before": ended,
        "clean_after_seconds": round(time.monotonic() - begin, 1),
        "jobs_left": len(status["jobs"]),
        "planned_requests_left": running + queued,
        "kv_tokens_held": one["kv_total_tokens"] - one["kv_free_tokens"],
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--inputs", type=int, default=10_000)
    parser.add_argument("--threads", type=int, default=64)
    parser.add_argument("--output", type=Path)
    parser.add_argument("--client", help="internal: the server's address")
    options = parser.parse_args()
    if options.client:
        client(options.client, options.inputs, options.threads)
        return
    with tempfile.TemporaryDirectory() as folder:
        model = tiny_model.build(Path(folder) / "tiny")
        port = free_port()
        serve = [sys.executable, "-m", "blendserve", "serve", "--port", str(port)]
        serve += ["--model-path", str(model), "--batch-dir", f"{folder}/batches"]
        serve += ["--log-level", "warning"]
        with running_server(serve, port, Path(folder) / "server.log") as url:
            command = [sys.executable, __file__, "--client", url]
            command += ["--inputs", str(options.inputs), "--threads", str(options.threads)]
            done = subprocess.run(command, stdout=subprocess.PIPE, check=True, text=True)
            whole = json.loads(done.stdout.splitlines()[-1])
            print("whole:", whole, flush=True)
            after = killed(url, command, options.inputs // 10)
            print("killed:", after, flush=True)
    if options.output is not None:
        settings = {"inputs": options.inputs, "threads": options.threads}
        save(options.output, {**settings, "whole": whole, "killed": after})


if __name__ == "__main__":
    main()
