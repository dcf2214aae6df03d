"""`blendserve serve --ray` on a Ray cluster of three nodes, all on this machine; `make test-ray`.

A head without CPUs and two nodes. Then a node dies with lines in its engine, another one joins, and
at last the front is killed without warning, which must leave no process behind; started again, it
goes on. Ends with a traceback, and not 0, at the first thing that is not as it should be.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

os.environ["RAY_USAGE_STATS_ENABLED"] = "0"

import httpx
import psutil
import ray
from ray.cluster_utils import Cluster

from blendserve.cli.server_process import die_with_parent, free_port

sys.path.append(str(Path(__file__).parents[1] / "end_to_end"))

import tiny_model

OBJECT_STORE_BYTES = 80 * 2**20
START_SECONDS, JOB_SECONDS = 400.0, 400.0
BEGIN = time.monotonic()
# Inherited by all that begins here: Ray's processes, hosts, engines.
MARK = "RAY_NODES_TEST"


SAID: list[str] = []


def log(*what: Any) -> None:
    SAID.append(" ".join([f"[{time.monotonic() - BEGIN:5.0f} s]", *map(str, what)]))
    print(SAID[-1], flush=True)


def until(condition: Callable[[], Any], seconds: float, what: str) -> Any:
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        with contextlib.suppress(httpx.HTTPError):
            if found := condition():
                return found
        time.sleep(0.3)
    raise AssertionError(f"{what}: not within {seconds:.0f} s")


def write_job(path: Path, lines: int, tokens: int) -> None:
    with path.open("w") as file:
        for n in range(lines):
            body = {
                "model": "tiny",
                "prompt": f"{'once upon a time ' * 20}{n % 20} of {n}",
                "max_tokens": tokens,
                "ignore_eos": True,
                "temperature": 0,
            }
            line = {"custom_id": f"line-{n}", "method": "POST", "url": "/v1/completions"}
            file.write(json.dumps({**line, "body": body}) + "\n")


class Front:
    """`blendserve serve --ray` as a process of its own."""

    def __init__(self, folder: Path, model: Path, address: str) -> None:
        self.port = free_port()
        command = [sys.executable, "-m", "blendserve", "serve", "--ray", "--engines", "2"]
        command += ["--port", str(self.port), "--batch-dir", str(folder / "batches")]
        command += ["--model-path", str(model), "--served-model-name", "tiny"]
        command += ["--device", "cpu", "--dtype", "float32", "--max-total-tokens", "4096"]
        with (folder / "front.log").open("ab") as output:
            self.process = subprocess.Popen(
                command,
                stdout=output,
                stderr=subprocess.STDOUT,
                env={**os.environ, "RAY_ADDRESS": address},
                preexec_fn=die_with_parent,
            )
        self.http = httpx.Client(
            base_url=f"http://127.0.0.1:{self.port}", timeout=30, trust_env=False
        )

    def status(self) -> dict[str, Any]:
        assert self.process.poll() is None, "the front has ended; see front.log"
        return self.http.get("/blendserve/status").json()

    def up(self) -> list[str]:
        return [each["url"] for each in self.status().get("engines", ()) if each["state"] == "up"]

    def submit(self, job: Path) -> str:
        with job.open("rb") as file:
            uploaded = self.http.post(
                "/v1/files", files={"file": file}, data={"purpose": "batch"}
            ).json()
        request = {"input_file_id": uploaded["id"], "endpoint": "/v1/completions"}
        answer = self.http.post("/v1/batches", json={**request, "completion_window": "24h"})
        return answer.json()["id"]

    def batch(self, name: str) -> dict[str, Any]:
        return self.http.get(f"/v1/batches/{name}").json()

    def completed(self, name: str, lines: int) -> None:
        """The batch ends, with each line answered once."""
        batch = until(
            lambda: (found := self.batch(name))["status"] == "completed" and found,
            JOB_SECONDS,
            "the job",
        )
        text = self.http.get(f"/v1/files/{batch['output_file_id']}/content").text
        ids = Counter(json.loads(line)["custom_id"] for line in text.splitlines())
        assert ids == Counter(f"line-{n}" for n in range(lines)), "lines are lost or doubled"

    def done(self, name: str) -> int:
        return int(self.batch(name)["request_counts"]["completed"])


def engines_alive() -> list[int]:
    """Processes of engines on this machine that this script has begun."""
    mine = psutil.Process().pid
    found = []
    for process in psutil.process_iter(["pid", "cmdline", "status"]):
        words = process.info["cmdline"] or []
        if "blendserve.cli.serve" in words and process.info["status"] != psutil.STATUS_ZOMBIE:
            with contextlib.suppress(psutil.Error):
                if process.environ().get(MARK) == str(mine):
                    found.append(process.pid)
    return found


@contextlib.contextmanager
def cluster_of_nodes() -> Iterator[tuple[Cluster, list[Any]]]:
    store = {"object_store_memory": OBJECT_STORE_BYTES}
    head = {"num_cpus": 0, "include_dashboard": False, **store}
    cluster = Cluster(initialize_head=True, head_node_args=head)
    try:
        nodes = [cluster.add_node(num_cpus=1, **store) for _ in range(2)]
        yield cluster, nodes
    finally:
        cluster.shutdown()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--log", type=Path, help="file for what is printed, once all went well")
    options = parser.parse_args()
    os.environ[MARK] = str(os.getpid())
    os.environ["OMP_NUM_THREADS"] = "1"
    os.environ["OMP_WAIT_POLICY"] = "passive"
    folder = Path(tempfile.mkdtemp(prefix="ray-nodes-"))
    model = tiny_model.build(folder / "tiny")
    write_job(folder / "short.jsonl", 200, 8)
    write_job(folder / "long.jsonl", 400, 150)
    with cluster_of_nodes() as (cluster, nodes):
        print(f"logs in {folder}", flush=True)
        log(f"Ray {ray.__version__}: a head without CPUs and two nodes")
        front = Front(folder, model, cluster.address)
        until(lambda: len(front.up()) == 2, START_SECONDS, "two engines")
        log("two engines are up, one on each node")
        front.completed(front.submit(folder / "short.jsonl"), 200)
        answered = [engine["answered"] for engine in front.status()["engines"]]
        assert all(answered), answered
        log("200 lines, each answered once; by engine:", answered)

        name = front.submit(folder / "long.jsonl")
        until(lambda: front.done(name) >= 40, JOB_SECONDS, "40 answers")
        cluster.remove_node(nodes[0], allow_graceful=False)
        killed = time.monotonic()
        until(lambda: len(front.up()) == 1, 60, "the dead node's engine is dropped")
        log(f"a node was killed; its engine was dropped {time.monotonic() - killed:.1f} s later")
        until(lambda: len(engines_alive()) == 1, 60, "the dead node's engine ends")
        cluster.add_node(num_cpus=1, object_store_memory=OBJECT_STORE_BYTES)
        log("a node joins")
        front.completed(name, 400)
        log("400 lines, each answered once")
        until(lambda: len(front.up()) == 2, START_SECONDS, "an engine on the new node")
        log("the new node's engine is up")

        name = front.submit(folder / "long.jsonl")
        until(lambda: front.done(name) >= 20, JOB_SECONDS, "20 answers")
        front.process.send_signal(signal.SIGKILL)
        front.process.wait(30)
        until(lambda: not engines_alive(), 120, "no engine stays behind")
        log("the front was killed: no engine stayed behind")
        front = Front(folder, model, cluster.address)
        until(lambda: front.up(), START_SECONDS, "an engine after the restart")
        front.completed(name, 400)
        log("started again: 400 lines, each answered once")
        front.process.send_signal(signal.SIGTERM)
        front.process.wait(60)
        until(lambda: not engines_alive(), 60, "no engine stays behind")
        log("stopped: no engine stayed behind")
    if options.log is not None:
        options.log.write_text("\n".join(SAID) + "\n")


if __name__ == "__main__":
    main()
