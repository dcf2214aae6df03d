"""What BlendServe adds to a step of SGLang's scheduler, with thousands of running requests.

The real scheduler runs with a model runner that answers at once, and the flags of `serve`.
A job of 100,000 requests (synthetic: short answers behind shared prompts, and long generations)
streams through its two queues as the front process would stream it. Then stock SGLang's scheduler,
in a process of its own, is given the same requests in the order in which ours started them, with as
many waiting. Measured of both: whole steps, without the model. Of ours also the time spent in our
overrides, less that of SGLang's own code that they call.

    python benchmark/runtime/step_cost.py [--running 4000] [--steps 2000] [--json FILE]
"""

from __future__ import annotations

import argparse
import gc
import json
import os
import platform
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

sys.path.insert(0, str(Path(__file__).parents[2] / "test" / "runtime"))

from bare_scheduler import BareScheduler

from blendserve.planner import Side
from blendserve.runtime.plan_tag import PlanTag

JOB_REQUESTS = 100_000
QUEUE_DEPTH = 256


class Stopwatch:
    """Exclusive time of our code per step: entering SGLang's code stops it, leaving starts it."""

    def __init__(self) -> None:
        self.ours = 0.0
        self._depth: list[tuple[bool, float]] = []

    def wrap(self, function: Callable[..., Any], ours: bool) -> Callable[..., Any]:
        def timed(*args: Any, **kwargs: Any) -> Any:
            now = time.perf_counter()
            if self._depth and self._depth[-1][0]:
                self.ours += now - self._depth[-1][1]
            self._depth.append((ours, now))
            try:
                return function(*args, **kwargs)
            finally:
                now = time.perf_counter()
                mine, since = self._depth.pop()
                if mine:
                    self.ours += now - since
                if self._depth:
                    self._depth[-1] = (self._depth[-1][0], now)

        return timed


# Called for each running request whenever SGLang builds a prefill batch. Timing each call would
# cost more than the call; ours does less than the one that it replaces (an attribute against two
# lookups, a minimum and a product), so leaving it in SGLang's time favours nobody but SGLang.
UNTIMED = "_get_running_request_total_token_offset"


def instrument(watch: Stopwatch) -> None:
    """Time every method that BlendServe overrides, on both sides."""
    from sglang.srt.managers.schedule_policy import PrefillAdder
    from sglang.srt.managers.scheduler import Scheduler as Live

    from blendserve.runtime.prefill_adder import BlendPrefillAdder

    stock = next(base for base in Live.__mro__ if not base.__module__.startswith("blendserve"))
    for ours, base in ((Live, stock), (BlendPrefillAdder, PrefillAdder)):
        for name in [name for name in vars(ours) if callable(vars(ours)[name])]:
            # What SGLang does not call is called by code of ours, and timed with it.
            if name.startswith("__") or name == UNTIMED or not hasattr(base, name):
                continue
            setattr(base, name, watch.wrap(getattr(base, name), ours=False))
            setattr(ours, name, watch.wrap(vars(ours)[name], ours=True))


class Job:
    """The front process's end: requests of both sides, sent as the queues empty.

    Left: 60-token questions behind one of many 200-token prefixes, 4 tokens of answer. Right:
    30-token prompts and long answers, such that some thousands run at a time.
    """

    def __init__(self, seed: int, long_tokens: int, planned: bool) -> None:
        rng = np.random.default_rng(seed)
        half = JOB_REQUESTS // 2
        self.prefixes = rng.integers(10, 1000, (half // 100, 200))
        self.left = rng.integers(10, 1000, (half, 60))
        self.right = rng.integers(10, 1000, (half, 30))
        self.lengths = rng.geometric(1.0 / long_tokens, half).clip(8, 4 * long_tokens)
        self.sent = {"left": 0, "right": 0}
        self.planned = planned

    def send(self, engine: BareScheduler, side: str, number: int | None = None) -> None:
        """Send the next request of a side, or the one of that number."""
        k = self.sent[side] if number is None else number
        self.sent[side] = k + 1
        if side == "left":
            prompt, output = np.concatenate((self.prefixes[k // 100], self.left[k])), 4
        else:
            prompt, output = self.right[k], int(self.lengths[k])
        tag = PlanTag(
            Side(side),
            k,
            density=50.0 if side == "left" else 0.1,
            output_tokens=float(output),
            likely_output_tokens=(0.75 * output, output, 1.25 * output),
            rest_compute_seconds=1000.0,
            rest_memory_seconds=1000.0,
        )
        rid = f"{side}-{k:08d}"
        engine.submit(rid, prompt.tolist(), output, tag=tag if self.planned else None)

    def feed(self, engine: BareScheduler) -> None:
        for side, queue in engine.live.blend.waiting.items():
            for _ in range(QUEUE_DEPTH - len(queue)):
                self.send(engine, side.value)


def run(options: argparse.Namespace) -> dict[str, Any]:
    """One scheduler's steps; with --order, stock SGLang's."""
    long_tokens = options.steps // 2
    planned = options.order is None
    order = [] if planned else json.loads(options.order.read_text())
    flags = ["--max-total-tokens", str(options.running * (long_tokens + 400))]
    flags += ["--max-running-requests", str(options.running), "--chunked-prefill-size", "8192"]
    flags += ["--schedule-policy", "fcfs"]
    if planned:
        flags += ["--radix-cache-backend", "blendserve"]
    engine = BareScheduler(*flags)
    scheduler = engine.live
    watch = Stopwatch()
    started: list[str] = []
    if planned:
        instrument(watch)
        record_starts(scheduler, started)
    # Long answers for as many steps as it takes to fill the engine and then some.
    job = Job(seed=0, long_tokens=long_tokens, planned=planned)
    ours, whole, running, prefills = [], [], [], 0
    fed = 0
    while len(whole) < options.steps:
        if planned:
            job.feed(engine)
        while not planned and fed < len(order) and len(scheduler.waiting_queue) < 2 * QUEUE_DEPTH:
            side, number = order[fed].split("-")
            job.send(engine, side, int(number))
            fed += 1
        watch.ours, begun = 0.0, time.perf_counter()
        batch = engine.step()
        elapsed = time.perf_counter() - begun
        alive = len(scheduler.running_batch.reqs)
        if alive >= 0.95 * options.running or whole:
            if not whole:
                # As SGLang's /freeze_gc does: a full collection takes half a second here.
                gc.collect()
                gc.freeze()
            ours.append(watch.ours * 1e3)
            whole.append(elapsed * 1e3)
            running.append(alive)
            prefills += batch.forward_mode.is_extend()
    measured = {
        "running_mean": float(np.mean(running)),
        "prefill_steps": prefills,
        "step_ms": summary(whole),
    }
    if planned:
        measured |= {"started": len(started), "own_ms": summary(ours)}
        options.starts.write_text(json.dumps(started))
    return measured


def record_starts(scheduler: Any, started: list[str]) -> None:
    """Note the ids of planned requests in the order in which they leave their queues."""
    start = scheduler.blend.start

    def recorded(candidate: Any) -> Any:
        request = start(candidate)
        started.append(request.req.rid)
        return request

    scheduler.blend.start = recorded


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--running", type=int, default=4000)
    parser.add_argument("--steps", type=int, default=2000)
    parser.add_argument("--json", type=Path)
    parser.add_argument("--starts", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--order", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.starts or options.order:
        options.json.write_text(json.dumps(run(options)))
        return
    command = [sys.executable, *sys.argv[:1], "--running", str(options.running)]
    command += ["--steps", str(options.steps)]
    with tempfile.TemporaryDirectory() as folder:
        starts, part = Path(folder) / "starts.json", Path(folder) / "part.json"
        results = {}
        for name, argument in (("blendserve", "--starts"), ("stock", "--order")):
            environment = {**os.environ, "BLENDSERVE_ENABLED": str(int(name == "blendserve"))}
            call = [*command, argument, str(starts), "--json", str(part)]
            subprocess.run(call, check=True, env=environment)
            results[name] = json.loads(part.read_text())
    result = {
        "command": "python benchmark/runtime/step_cost.py "
        f"--running {options.running} --steps {options.steps}",
        "machine": platform.platform(),
        "job_requests": JOB_REQUESTS,
        **results,
    }
    print(json.dumps(result, indent=1))
    if options.json:
        options.json.write_text(json.dumps(result, indent=1) + "\n")


def summary(samples: list[float]) -> dict[str, float]:
    return {
        "mean": float(np.mean(samples)),
        "p50": float(np.quantile(samples, 0.5)),
        "p99": float(np.quantile(samples, 0.99)),
        "max": float(np.max(samples)),
    }


if __name__ == "__main__":
    main()
