"""SGLang's real scheduler on modelled steps: what pacing gains where compute and memory overlap.

The runtime's planner and SGLang's scheduler, mixed steps, in one process; the model answers at
once, and what each step would take is computed by the simulator's cost model (Llama-3.1-8B on an
A100, its whole KV pool) under the three overlap models. So this is the runtime's own admission,
chunking, cache and memory test on the paper's hardware, where the simulator has models of them too.

The job is synthetic in part: MMLU's questions (real where the data folder is there; answers of 2
tokens), BurstGPT's lengths behind a system prompt, and long generations, output uniform in 1,500 to
4,000 tokens. Policies, each in a process of its own:

- blend: as served, lengths known. sampled: lengths from a sample of 1 %. partition: lengths known,
  without pacing, as the runtime does where steps are not mixed.
- dfs: stock SGLang, requests sorted by their prompts, FCFS. lpm, fcfs: stock, in random order.

The model has no GEMM tiles, so that steps are not rounded to a multiple of 128 tokens here.

    python benchmark/runtime/modelled_steps.py [--scale 1.0] [--json FILE]
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np

POLICIES = ("blend", "sampled", "partition", "dfs", "lpm", "fcfs")
STOCK = ("dfs", "lpm", "fcfs")
CHUNK = 2_048


def run_policy(policy: str, scale: float) -> dict[str, Any]:
    """One policy through one scheduler, in this process."""
    os.environ["BLENDSERVE_ENABLED"] = "0" if policy in STOCK else "1"
    import retractions
    from bare_scheduler import BareScheduler

    from blendserve.planner import kv_capacity_tokens

    cost_model = retractions.COST_MODEL
    flags = ["--max-total-tokens", str(kv_capacity_tokens(cost_model)), "--enable-mixed-chunk"]
    flags += ["--chunked-prefill-size", str(CHUNK), "--max-running-requests", "4096"]
    flags += ["--schedule-policy", "lpm" if policy == "lpm" else "fcfs"]
    if policy not in STOCK:
        flags += ["--radix-cache-backend", "blendserve"]
    engine = BareScheduler(*flags)
    prompts, output = make_job(scale)
    clock = Clock(engine, cost_model)
    started = time.perf_counter()
    if policy in STOCK:
        found = run_stock(engine, policy, prompts, output)
    else:
        pace(engine, policy != "partition", cost_model)
        found = retractions.Run(engine, prompts, output, policy, policy != "sampled").run()
    bounds = clock.bounds(prompts, output)
    return {
        "policy": policy,
        "requests": len(prompts),
        **{key: found[key] for key in ("retractions", "cached_part_of_best") if key in found},
        **clock.totals(),
        "share_of_bound": {name: bounds[name] / clock.seconds[name] for name in bounds},
        "wall_seconds": round(time.perf_counter() - started, 1),
    }


def make_job(scale: float) -> tuple[list[Any], Any]:
    """(prompts, true output lengths), in random order."""
    import retractions

    rng = np.random.default_rng(0)
    prompts, output = retractions.make_job("burstgpt", int(8_000 * scale), 0)
    for tokens in rng.integers(24, 100, int(600 * scale)):
        prompts.append(rng.integers(retractions.FIRST_TOKEN, retractions.VOCABULARY, tokens))
    output = np.concatenate((output, rng.integers(1_500, 4_000, int(600 * scale))))
    order = rng.permutation(len(prompts))
    return [prompts[k] for k in order], output[order]


def predict(scale: float) -> dict[str, Any]:
    """What the simulator says of the same job, with models of scheduler and cache."""
    import retractions

    from blendserve.planner import FlatTokens
    from blendserve.simulator.simulate import Policy, Setting, Simulation
    from blendserve.simulator.step_time import Overlap
    from blendserve.simulator.workloads import Workload

    prompts, output = make_job(scale)
    simulation = Simulation(
        Workload(
            name="modelled-steps",
            prompts=FlatTokens.of(prompts),
            output_tokens=np.asarray(output, dtype=np.int64),
            max_output_tokens=np.full(len(prompts), retractions.LIMIT),
            source=np.zeros(len(prompts), dtype=np.int64),
            sources=("all",),
        )
    )
    found = {}
    for name, policy, sampling in (
        ("blend", Policy.BLEND, 1.0),
        ("sampled", Policy.BLEND, 0.01),
        ("dfs", Policy.DFS, 1.0),
    ):
        setting = Setting(
            retractions.COST_MODEL, policy, overlaps=tuple(Overlap), sampling=sampling
        )
        results = simulation.run(setting)
        found[name] = {
            "steps": results[0].steps,
            "seconds": {result.overlap: round(result.seconds, 2) for result in results},
            "share_of_bound": {result.overlap: result.share_of_bound for result in results},
        }
    return found


def pace(engine: Any, paced: bool, cost_model: Any) -> None:
    """The steps' costs are those of the modelled device, not of the one that this runs on."""
    from blendserve.planner import StepPace
    from blendserve.policy import Steps

    pace = StepPace.of(cost_model.step_costs, CHUNK)
    engine.live.blend_policy.steps_are(Steps.MIXED if paced else Steps.FILLED, pace)


def run_stock(engine: Any, policy: str, prompts: list[Any], output: Any) -> dict[str, Any]:
    order = list(range(len(prompts)))
    if policy == "dfs":
        order.sort(key=lambda k: prompts[k].tolist())
    for k in order:
        engine.submit(f"{k}", prompts[k].tolist(), int(output[k]))
    while len(engine.finished) < len(prompts):
        engine.step()
    wrong = [k for k in order if engine.finished[f"{k}"] != output[k]]
    assert not wrong, f"{len(wrong)} requests did not get their tokens"
    return {}


class Clock:
    """Counts what every step of a scheduler would take."""

    def __init__(self, engine: Any, cost_model: Any) -> None:
        from blendserve.simulator.step_time import Overlap, OverlapModel

        self._costs = cost_model.step_costs
        self._models = {overlap.value: OverlapModel.of(overlap) for overlap in Overlap}
        self.seconds = dict.fromkeys(self._models, 0.0)
        self._steps = self._prefill = self._decode = 0
        self._compute = self._memory = 0.0
        process = engine.live.process_batch_result

        def counted(batch: Any, result: Any) -> None:
            self._count(batch)
            process(batch, result)

        engine.live.process_batch_result = counted

    def _count(self, batch: Any) -> None:
        costs = self._costs
        pairs = prefill = chunks = prefix = 0
        if batch.forward_mode.is_decode():
            decodes, context = len(batch.reqs), int(batch.seq_lens_cpu.sum())
        else:
            decodes = len(batch.decoding_reqs or ())
            split = len(batch.reqs) - decodes
            for start, tokens in zip(
                batch.prefix_lens[:split], batch.extend_lens[:split], strict=True
            ):
                prefill += tokens
                chunks += 1
                prefix += start
                pairs += (start + tokens) ** 2 - start**2
            context = sum(batch.prefix_lens[split:]) + decodes
        tokens = prefill + decodes
        compute = costs.token_seconds(tokens) + costs.sampled_seconds(decodes + chunks)
        compute += costs.prefill_seconds(chunks, pairs, prefill, prefix)
        memory = costs.decode_seconds(decodes, context)
        traffic = costs.traffic_seconds(tokens, decodes, context, prefix)
        for name, model in self._models.items():
            self.seconds[name] += model.seconds(compute, memory, traffic) + costs.step
        self._steps += 1
        self._prefill += prefill
        self._decode += decodes
        self._compute += compute
        self._memory += memory

    def totals(self) -> dict[str, Any]:
        return {
            "steps": self._steps,
            "prefill_tokens": self._prefill,
            "decode_tokens": self._decode,
            "compute_seconds": round(self._compute, 2),
            "memory_seconds": round(self._memory, 2),
            "seconds": {name: round(value, 2) for name, value in self.seconds.items()},
        }

    def bounds(self, prompts: list[Any], output: Any) -> dict[str, float]:
        from blendserve.planner import FlatTokens, PrefixTree
        from blendserve.simulator.bounds import lower_bound

        tree = PrefixTree.build(FlatTokens.of(prompts))
        return {
            name: lower_bound(tree, np.asarray(output), self._costs, model).seconds
            for name, model in self._models.items()
        }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--scale", type=float, default=1.0, help="of the number of requests")
    parser.add_argument("--policies", nargs="+", choices=POLICIES, default=POLICIES)
    parser.add_argument("--json", type=Path)
    parser.add_argument("--one", choices=POLICIES, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.one:
        print(json.dumps(run_policy(options.one, options.scale)))
        return
    runs = []
    for policy in options.policies:
        command = [sys.executable, __file__, "--one", policy, "--scale", f"{options.scale:g}"]
        out = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout
        runs.append(json.loads(out.splitlines()[-1]))
        print(json.dumps(runs[-1]), flush=True)
    if options.json:
        record = {
            "command": f"python benchmark/runtime/modelled_steps.py --scale {options.scale:g}",
            "hardware": "modelled: Llama-3.1-8B on A100-80GB",
            "simulator": predict(options.scale),
            "runs": runs,
        }
        options.json.write_text(json.dumps(record, indent=1) + "\n")


if __name__ == "__main__":
    main()
