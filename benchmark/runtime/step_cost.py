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
from array import array
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

JOB_REQUESTS = 100_000
QUEUE_DEPTH = 256
CONFIG = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "hidden_size": 32,
    "intermediate_size": 32,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "head_dim": 16,
    "vocab_size": 1000,
    "max_position_embeddings": 8192,
    "rms_norm_eps": 1e-5,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "torch_dtype": "float32",
}


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

    stock = Live.__mro__[1]
    for ours, base in ((Live, stock), (BlendPrefillAdder, PrefillAdder)):
        for name in [name for name in vars(ours) if callable(vars(ours)[name])]:
            # What SGLang does not call is called by code of ours, and timed with it.
            if name.startswith("__") or name == UNTIMED or not hasattr(base, name):
                continue
            setattr(base, name, watch.wrap(getattr(base, name), ours=False))
            setattr(ours, name, watch.wrap(vars(ours)[name], ours=True))


def make_scheduler(folder: str, running: int, long_tokens: int, planned: bool) -> Any:
    """SGLang's scheduler, ours in its place if planned, without a process of its own."""
    from sglang.srt.plugins import load_plugins
    from sglang.srt.server_args import PortArgs, prepare_server_args

    (Path(folder) / "config.json").write_text(json.dumps(CONFIG))
    flags = "--load-format dummy --skip-tokenizer-init --device cpu --dtype float32"
    flags += f" --mem-fraction-static 0.1 --max-total-tokens {running * (long_tokens + 400)}"
    flags += f" --max-running-requests {running} --chunked-prefill-size 8192"
    flags += " --disable-overlap-schedule --schedule-policy fcfs"
    if planned:
        flags += " --radix-cache-backend blendserve"
    server_args = prepare_server_args(["--model-path", folder, *flags.split()])
    ports = PortArgs.init_new(server_args)
    load_plugins()
    from sglang.srt.managers import scheduler as module

    ranks = module.SpawnRanks(world_rank=0, dp_rank=None, gpu_id=0)
    module.publish(server_args, role="scheduler", ranks=ranks)
    module.configure_scheduler_process(server_args, 0)
    return module.Scheduler(server_args, ports)


def fake_model(scheduler: Any) -> None:
    """Every request gets the same token, at once, and nobody is told."""
    import torch
    from sglang.srt.managers.utils import GenerationBatchResult

    def forward(batch: Any, *args: Any, **kwargs: Any) -> Any:
        return GenerationBatchResult(
            next_token_ids=torch.full((len(batch.reqs),), 5, dtype=torch.int64),
            can_run_cuda_graph=False,
        )

    scheduler.tp_worker.forward_batch_generation = forward
    scheduler.ipc_channels.send_to_detokenizer.send_output = lambda *args, **kwargs: None
    scheduler.ipc_channels.send_to_tokenizer.send_output = lambda *args, **kwargs: None


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

    def next(self, side: str, number: int | None = None) -> Any:
        """The next request of a side, or the one of that number."""
        from sglang.srt.managers.io_struct import TokenizedGenerateReqInput
        from sglang.srt.sampling.sampling_params import SamplingParams

        from blendserve.planner import Side
        from blendserve.runtime.plan_tag import PlanTag

        k = self.sent[side] if number is None else number
        self.sent[side] = k + 1
        if side == "left":
            ids, output = np.concatenate((self.prefixes[k // 100], self.left[k])), 4
        else:
            ids, output = self.right[k], int(self.lengths[k])
        tag = PlanTag(
            Side(side),
            k,
            density=50.0 if side == "left" else 0.1,
            target_density=1.0,
            output_tokens=float(output),
            output_deviation=output / 4,
        )
        params = SamplingParams(
            max_new_tokens=output,
            ignore_eos=True,
            temperature=0.0,
            custom_params=tag.to_params() if self.planned else None,
        )
        params.normalize(None)
        return TokenizedGenerateReqInput(
            rid=f"{side}-{k:08d}",
            input_text=None,
            input_ids=array("q", ids.tolist()),
            input_embeds=None,
            mm_inputs=None,
            token_type_ids=None,
            sampling_params=params,
            return_logprob=False,
            logprob_start_len=-1,
            top_logprobs_num=0,
            token_ids_logprob=None,
            stream=False,
        )

    def feed(self, scheduler: Any) -> None:
        for side, queue in scheduler.blend.waiting.items():
            for _ in range(QUEUE_DEPTH - len(queue)):
                scheduler.handle_generate_request(self.next(side.value))


def run(options: argparse.Namespace) -> dict[str, Any]:
    """One scheduler's steps; with --order, stock SGLang's."""
    long_tokens = options.steps // 2
    planned = options.order is None
    order = [] if planned else json.loads(options.order.read_text())
    with tempfile.TemporaryDirectory() as folder:
        scheduler = make_scheduler(folder, options.running, long_tokens, planned)
    watch = Stopwatch()
    started: list[str] = []
    if planned:
        instrument(watch)
        record_starts(scheduler, started)
    fake_model(scheduler)
    # Long answers for as many steps as it takes to fill the engine and then some.
    job = Job(seed=0, long_tokens=long_tokens, planned=planned)
    ours, whole, running, prefills = [], [], [], 0
    fed = 0
    while len(whole) < options.steps:
        if planned:
            job.feed(scheduler)
        while not planned and fed < len(order) and len(scheduler.waiting_queue) < 2 * QUEUE_DEPTH:
            side, number = order[fed].split("-")
            scheduler.handle_generate_request(job.next(side, int(number)))
            fed += 1
        watch.ours, begun = 0.0, time.perf_counter()
        plan = scheduler.get_next_batch_to_run(
            running_batch=scheduler.running_batch, last_batch=scheduler.last_batch
        )
        scheduler.running_batch, batch = plan.running_batch, plan.batch_to_run
        result = scheduler.run_batch(batch)
        scheduler.process_batch_result(batch, result)
        scheduler.last_batch = batch
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
