"""What a line costs a coordinator, over two engines without a model; beside it, in one process.

    python benchmark/cluster/coordinator.py [--lines 20000]

The engines are processes of their own (test/runtime/cluster_fakes.py), whose end of the link is the
real one. Lines per second of processor time are what one core of an idle machine would do; those of
the clock are this machine's, with the engines on it. In process: the same job runner and
dispatcher, and a server that answers at once (test/runtime/job_server.py).
"""

from __future__ import annotations

import argparse
import asyncio
import json
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[2]
sys.path += [str(ROOT / "benchmark"), str(ROOT / "test" / "runtime")]

from cluster_fakes import KEY, FakeEngine  # noqa: E402
from job_server import COST_MODEL, FakeLines, Run  # noqa: E402
from record import save  # noqa: E402

from blendserve.batch import EngineAddress  # noqa: E402
from blendserve.cli.server_process import die_with_parent, free_port  # noqa: E402
from blendserve.config import Settings  # noqa: E402
from blendserve.planner import PlannerConfig  # noqa: E402
from blendserve.runtime.cluster_executor import ClusterExecutor  # noqa: E402
from blendserve.runtime.credits import Credits  # noqa: E402
from blendserve.runtime.plan_worker import PlanWorker  # noqa: E402

FAMILIES = 200
MOST_SECONDS = 900.0


def bodies(lines: int) -> list[dict[str, Any]]:
    return [
        {"prompt": [n % FAMILIES, *range(500, 560), 1_000 + n], "max_tokens": 2}
        for n in range(lines)
    ]


class QuickAnswer:
    """What of an HTTP answer the link reads."""

    def __init__(self, response: Any) -> None:
        self.status_code, self.content = response.status_code, response.body


def serve_engine(port: int) -> None:
    import uvicorn

    engine = FakeEngine(slots=1_000, tick_seconds=0.005)

    async def call(url: str, salt: str, content: bytes) -> QuickAnswer:
        return QuickAnswer(await engine.complete(json.loads(content)))

    engine.link.call = call  # type: ignore[method-assign, assignment]

    async def serve() -> None:
        steps = asyncio.create_task(engine.run())
        config = uvicorn.Config(engine.app, port=port, log_level="critical", access_log=False)
        await uvicorn.Server(config).serve()
        steps.cancel()

    asyncio.run(serve())


class Clocks:
    """Processor time and time since."""

    def __init__(self) -> None:
        self.cpu, self.wall = time.process_time(), time.monotonic()

    def figures(self, lines: int) -> dict[str, float]:
        cpu, wall = time.process_time() - self.cpu, time.monotonic() - self.wall
        return {
            "lines_per_cpu_second": round(lines / cpu),
            "lines_per_second": round(lines / wall),
            "cpu_seconds": round(cpu, 2),
        }


async def through_coordinator(lines: int, ports: list[int]) -> dict[str, Any]:
    executor = ClusterExecutor(Settings(), len(ports))
    for port in ports:
        executor.cluster.add(EngineAddress(f"http://127.0.0.1:{port}", KEY))
    await executor.until_ready(len(ports))
    clocks, sending = Clocks(), None
    answered = 0
    async with asyncio.timeout(MOST_SECONDS):
        async for _ in executor.run("job", FakeLines(bodies(lines)), range(lines), lambda _: None):
            if sending is None:
                reading = clocks.figures(lines)
                sending = Clocks()
            answered += 1
    assert sending is not None
    assert answered == lines
    result = {"reading_and_planning": reading, "running": sending.figures(lines)}
    await executor.stop()
    return result


def in_process(lines: int) -> dict[str, Any]:
    planner = PlanWorker(COST_MODEL, PlannerConfig())
    run = Run(bodies(lines), credits=Credits(), planner=planner, per_step=64)
    # Its planner plans in this process: read and planned before the clocks start.
    clocks: list[Clocks] = []

    async def scenario() -> None:
        async with asyncio.timeout(MOST_SECONDS):
            async for _ in run.runner.run():
                if not clocks:
                    clocks.append(Clocks())

    asyncio.run(scenario())
    return clocks[0].figures(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--lines", type=int, default=20_000)
    parser.add_argument("--engine-port", type=int)
    parser.add_argument("--out", type=Path, default=ROOT / "benchmark/results/coordinator.json")
    options = parser.parse_args()
    if options.engine_port is not None:
        serve_engine(options.engine_port)
        return
    ports = [free_port() for _ in range(2)]
    engines = [
        subprocess.Popen(
            [sys.executable, __file__, "--engine-port", str(port)], preexec_fn=die_with_parent
        )
        for port in ports
    ]
    try:
        through = asyncio.run(through_coordinator(options.lines, ports))
    finally:
        for engine in engines:
            engine.kill()
            engine.wait()
    result = {"lines": options.lines, "engines": 2, "coordinator": through}
    result["in_process"] = in_process(min(options.lines, 10_000))
    save(options.out, result)
    print(json.dumps(result, indent=1))


if __name__ == "__main__":
    main()
