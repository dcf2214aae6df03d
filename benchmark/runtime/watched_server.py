"""`blendserve serve` with stall monitors in both of its processes, and a job sent through it.

    python benchmark/runtime/watched_server.py serve [flags of serve]

is the server: GET /stalls/front and /stalls/engine tell what the monitors saw.
"""

from __future__ import annotations

import asyncio
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from stall_monitor import StallMonitor

# -- the two processes of the server


def serve(argv: list[str]) -> int:
    """The front process; the engine that it starts is watched, too."""
    from blendserve.cli import front, serve

    front.ENGINE_COMMAND = (sys.executable, __file__, "engine")
    build, life = front.Front._build_app, front.Front._life
    monitor = StallMonitor()

    def build_watched(self: Any) -> Any:
        app = build(self)
        # Before the proxy, which takes every path.
        app.router.routes.insert(0, _route("/stalls/front", monitor))
        return app

    def phase(self: Any) -> str:
        live = self.service._worker.live.values()
        if any(progress.phase == "running" for progress in live):
            return "running"
        return "no job" if self.engine.view.state == "up" else "loading"

    def live_watched(self: Any, app: Any) -> Any:
        self.watching = _watch(monitor, lambda: phase(self))
        return life(self, app)

    front.Front._build_app = build_watched  # type: ignore[method-assign]
    front.Front._life = live_watched  # type: ignore[method-assign,assignment]
    return serve.main(argv)


def engine(argv: list[str]) -> int:
    """The engine process."""
    from blendserve.cli import serve
    from blendserve.runtime.executor import BlendExecutor

    start = BlendExecutor.start
    monitor = StallMonitor()

    def phase(self: BlendExecutor) -> str:
        runner = next(iter(self._runners.values()), None)
        if runner is None:
            return "no job"
        return "re-planning" if runner._replanning is not None else runner.view.phase

    def start_watched(self: BlendExecutor) -> None:
        start(self)
        self._app.state.watching = _watch(monitor, lambda: phase(self))
        self._app.router.routes.insert(0, _route("/stalls/engine", monitor))

    BlendExecutor.start = start_watched  # type: ignore[method-assign]
    return serve.run_engine(argv)


def _route(path: str, monitor: StallMonitor) -> Any:
    from fastapi.routing import APIRoute

    async def stalls() -> dict[str, Any]:
        return monitor.report()

    return APIRoute(path, stalls)


def _watch(monitor: StallMonitor, phase: Callable[[], str]) -> list[asyncio.Task[None]]:
    async def follow() -> None:
        while True:
            monitor.enter(phase())
            await asyncio.sleep(0.005)

    return [asyncio.create_task(monitor.run()), asyncio.create_task(follow())]


# -- the job, and an online client beside it


class OnlineProbe:
    """Asks the server for its models over and over, which only its event loops have to answer."""

    def __init__(self, url: str) -> None:
        self._url = url
        self._phase: str | None = "idle"
        self._latencies: dict[str, list[float]] = {}
        self._thread = threading.Thread(target=self._run)
        self._thread.start()

    def enter(self, phase: str) -> None:
        self._phase = phase

    def stop(self) -> dict[str, dict[str, float]]:
        self._phase = None
        self._thread.join()
        return {
            phase: {
                "requests": len(latencies),
                **{
                    f"p{percent}_ms": round(float(np.percentile(latencies, percent)) * 1e3, 1)
                    for percent in (50, 95, 99, 100)
                },
            }
            for phase, latencies in self._latencies.items()
        }

    def _run(self) -> None:
        import httpx

        with httpx.Client(base_url=self._url, timeout=60) as client:
            while (phase := self._phase) is not None:
                before = time.perf_counter()
                client.get("/v1/models").raise_for_status()
                self._latencies.setdefault(phase, []).append(time.perf_counter() - before)
                time.sleep(0.02)


def run_server(path: Path, folder: Path, model_name: str, running_seconds: float) -> dict[str, Any]:
    """The file at `path` on the tiny model; cancelled after it has run for `running_seconds`."""
    import httpx
    from openai import OpenAI

    sys.path.insert(0, str(Path(__file__).parents[2] / "test" / "end_to_end"))
    import tiny_model

    from blendserve.cli.server_process import free_port, running_server

    model = tiny_model.build(folder / "tiny")
    port = free_port()
    command = [sys.executable, __file__, "serve", "--batch-dir", str(folder / "batches")]
    command += ["--model-path", str(model), "--served-model-name", model_name, "--port", str(port)]
    command += ["--max-batch-lines", "1000000", "--max-file-bytes", str(1 << 30)]
    with running_server(command, port, folder / "server.log") as url:
        client = OpenAI(base_url=f"{url}/v1", api_key="unused", timeout=600, max_retries=0)
        with path.open("rb") as file:
            upload = client.files.create(file=file, purpose="batch")
        online = OnlineProbe(url)
        time.sleep(10)
        online.enter("preparing")
        started = time.perf_counter()
        batch = client.batches.create(
            input_file_id=upload.id, endpoint="/v1/chat/completions", completion_window="24h"
        )
        running_since: float | None = None
        while batch.status not in ("completed", "failed"):
            time.sleep(1)
            batch = client.batches.retrieve(batch.id)
            jobs = httpx.get(f"{url}/blendserve/status", timeout=60).json()["jobs"]
            if jobs and jobs[0]["phase"] == "running":
                running_since = running_since or time.perf_counter()
                online.enter("running")
                if time.perf_counter() - running_since > running_seconds:
                    break
        stalls = {
            end: httpx.get(f"{url}/stalls/{end}", timeout=60).raise_for_status().json()
            for end in ("front", "engine")
        }
        probed = online.stop()
        status = httpx.get(f"{url}/blendserve/status", timeout=60).json()["jobs"]
        if batch.status == "in_progress":
            client.batches.cancel(batch.id)
            while client.batches.retrieve(batch.id).status == "cancelling":
                time.sleep(0.5)
        return {
            "processes": stalls,
            "online": probed,
            "plans": status[0]["plans"] if status else None,
            "seconds": time.perf_counter() - started,
        }


if __name__ == "__main__":
    sys.exit({"serve": serve, "engine": engine}[sys.argv[1]](sys.argv[2:]))
