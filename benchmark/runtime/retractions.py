"""Requests that lose their memory, with lengths known and with lengths from a sample of 1 %.

The runtime's planner and SGLang's scheduler with our queues, in one process; the model answers at
once, so only steps are counted. The job is one half MMLU's questions (real where the data folder is
there; answers of 2 tokens) and one half a trace of public lengths, random token ids behind a system
prompt; limits say nothing. The KV pool holds some 100 chats. The job is planned again as the
service does it (`policy.Replanning`).

    python benchmark/runtime/retractions.py [--requests 6000] [--json FILE]
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import platform
import sys
from pathlib import Path
from typing import Any

import numpy as np

sys.path.insert(0, str(Path(__file__).parents[2] / "test" / "runtime"))
os.environ.setdefault("BLENDSERVE_ENABLED", "1")

from bare_scheduler import FIRST_TOKEN, VOCABULARY, BareScheduler

from blendserve.planner import HARDWARE, MODEL_SPECS, CostModel, PlannerConfig, Side
from blendserve.policy import Replanning
from blendserve.runtime.plan_tag import LengthUpdate, PlanTag, likely_tokens
from blendserve.runtime.plan_worker import JobPlan, News, PlanWorker, PromptBatch
from blendserve.simulator.exam import exam
from blendserve.simulator.traces import trace_lengths

TRACES = ("sharegpt", "lmsys", "burstgpt", "azure-conv")
COST_MODEL = CostModel(MODEL_SPECS["llama-3.1-8b"], HARDWARE["a100-80g-sxm"])
LIMIT, LONGEST_PROMPT, SYSTEM_PROMPT, QUEUED = 4096, 2000, 12, 64


def make_job(trace: str, n: int, seed: int) -> tuple[list[np.ndarray], np.ndarray]:
    """(prompts, true output lengths), in random order."""
    rng = np.random.default_rng(seed)
    questions = exam()
    picks = rng.permutation(len(questions.subject))[: n // 2]
    fold = VOCABULARY - FIRST_TOKEN  # The scheduler's own vocabulary; prefixes stay apart.
    prompts = []
    for k in picks:
        own = questions.questions[questions.offsets[k] : questions.offsets[k + 1]]
        prompts.append(np.concatenate((questions.prefixes[questions.subject[k]], own)) % fold)
    lengths = trace_lengths(trace, n - len(picks), seed)
    system = rng.integers(0, fold, SYSTEM_PROMPT)
    for tokens in np.minimum(lengths.prompt, LONGEST_PROMPT):
        prompts.append(np.concatenate((system, rng.integers(0, fold, tokens))))
    output = np.concatenate((np.full(len(picks), 2), np.minimum(lengths.output, LIMIT)))
    order = rng.permutation(n)
    return [prompts[k] + FIRST_TOKEN for k in order], output[order]


class Run:
    """One job through the scheduler."""

    def __init__(
        self,
        engine: BareScheduler,
        prompts: list[np.ndarray],
        output: np.ndarray,
        name: str,
        known: bool,
    ) -> None:
        self.engine, self.known, self.name = engine, known, name
        self.prompts, self.output = prompts, output
        requests = len(prompts)
        self.planner = PlanWorker(COST_MODEL, PlannerConfig())
        self.planner.append(
            self.name,
            PromptBatch(
                np.concatenate(self.prompts).astype(np.int32),
                np.array([len(prompt) for prompt in self.prompts]),
                self.output if known else np.full(requests, LIMIT),
                np.full(requests, known),
            ),
        )
        self.sent: dict[str, int] = {}
        self.started: list[int] = []
        self.seen: set[str] = set()
        self.sampled = 0

    def run(self) -> dict[str, Any]:
        live = self.engine.live
        live.flush_cache()
        self.engine.finished.clear()
        blend, report = live.blend_policy, live.blend_report
        before = (blend.retractions, report.steps, report.cached_tokens)
        used = []
        plan = self.plan_again()
        replanning = Replanning(0 if self.known else self.sampled)
        while len(self.engine.finished) < len(self.prompts):
            for side in Side:
                while len(live.blend.waiting[side]) < QUEUED and self.send(plan, side):
                    pass
            self.engine.step()
            free = (
                live.token_to_kv_pool_allocator.available_size() + live.tree_cache.evictable_size()
            )
            used.append(1 - free / live.max_total_num_tokens)
            answers = len(self.engine.finished)
            sample_in = self.sample_out and self.sample_out <= self.engine.finished.keys()
            if replanning.due(answers, sample_in) and not plan.scanner.exhausted:
                replanning.begins(answers, self.sampled)
                plan = self.plan_again()
        wrong = [r for r, k in self.sent.items() if self.engine.finished[r] != self.output[k]]
        assert not wrong, f"{len(wrong)} requests did not get their tokens"
        retractions = live.blend_policy.retractions - before[0]
        return {
            "retractions": retractions,
            "percent_of_requests": 100 * retractions / len(self.prompts),
            "steps": live.blend_report.steps - before[1],
            "memory_used_mean": float(np.mean(used)),
            "cached_part_of_best": (live.blend_report.cached_tokens - before[2])
            / (plan.prompt_tokens - plan.unique_tokens)
            if self.known
            else None,
        }

    def plan_again(self) -> JobPlan:
        new = [rid for rid in self.engine.finished if rid not in self.seen]
        self.seen.update(new)
        running = {
            self.sent[rid]: len(request.req.output_ids)
            for rid, request in self.engine.live.blend.running.items()
            if len(request.req.output_ids)
        }
        plan = self.planner.plan(
            self.name,
            News(
                started=np.array(self.started, dtype=np.int64),
                finished=np.array([self.sent[rid] for rid in new], dtype=np.int64),
                finished_tokens=np.array([self.engine.finished[rid] for rid in new], dtype=int),
                running=np.array(list(running), dtype=np.int64),
                running_tokens=np.array(list(running.values()), dtype=np.int64),
            ),
        )
        self.updates = tuple(
            LengthUpdate(
                rid,
                float(plan.output_tokens[k]),
                likely_tokens(plan.likely_output_tokens[k]),
                bool(plan.guessed[k]),
            )
            for rid, k in self.sent.items()
            if rid not in self.engine.finished and not self.known
        )
        self.started = []
        self.sample = {side: list(plan.sample[side][::-1]) for side in Side}
        self.sample_out = {f"{k}" for side in Side for k in plan.sample[side]}
        self.sampled += len(self.sample_out)
        return plan

    def send(self, plan: JobPlan, side: Side) -> bool:
        scanner = plan.scanner
        if self.sample[side]:
            k = int(self.sample[side].pop())
            scanner.remove(k)
        elif scanner.exhausted:
            return False
        else:
            k = scanner.take(side)
        tag = PlanTag(
            side,
            rank=len(self.sent),
            density=float(plan.density[k]),
            output_tokens=float(plan.output_tokens[k]),
            likely_output_tokens=likely_tokens(plan.likely_output_tokens[k]),
            guessed=bool(plan.guessed[k]),
            compute_seconds=float(plan.compute_seconds[k]),
            memory_seconds=float(plan.memory_seconds[k]),
            rest_compute_seconds=scanner.remaining_seconds[0],
            rest_memory_seconds=scanner.remaining_seconds[1],
            use=plan.use_tag(self.name, side, k),
            updates=self.updates,
        )
        self.updates = ()
        self.sent[f"{k}"] = k
        self.started.append(k)
        length = int(self.output[k])
        limit = None if self.known else LIMIT
        self.engine.submit(f"{k}", self.prompts[k].tolist(), length, limit, tag)
        return True


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--requests", type=int, default=6000)
    parser.add_argument("--kv-tokens", type=int, default=60_000)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    engine = BareScheduler(
        *("--max-total-tokens", str(options.kv_tokens), "--chunked-prefill-size", "2048"),
        *("--schedule-policy", "fcfs", "--radix-cache-backend", "blendserve"),
        *("--max-running-requests", "2048"),
    )
    results = {}
    for trace, known in itertools.product(TRACES, (True, False)):
        runs = [
            Run(
                engine, *make_job(trace, options.requests, seed), f"{trace}-{seed}-{known}", known
            ).run()
            for seed in range(options.seeds)
        ]
        results[f"{trace}+mmlu, {'known' if known else 'sampled'}"] = runs
        print(f"{trace:12} known={known} {runs}", flush=True)
    record = {
        "command": "python benchmark/runtime/retractions.py "
        f"--requests {options.requests} --kv-tokens {options.kv_tokens} --seeds {options.seeds}",
        "machine": platform.platform(),
        "results": results,
    }
    if options.json:
        options.json.write_text(json.dumps(record, indent=1) + "\n")


if __name__ == "__main__":
    main()
