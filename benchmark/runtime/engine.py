"""The real CPU engine: MMLU questions and long generations, blended and through stock SGLang.

Real: the questions (5-shot prompts of 24 subjects, 4 questions each), the model (SmolLM2-135M), the
engine. Chosen: 24 open prompts with answers forced to 160 tokens. Input order is random; the KV
pool is a part of what the shared prefixes need. Stock SGLang is measured on the same lines with
each of its schedule policies, and on input that was sorted beforehand so that equal prefixes are
neighbours, each with the same flags otherwise; and with our kernels, so that the gain of the order
stands apart. One server at a time.

    python benchmark/runtime/engine.py --json benchmark/results/engine-quarter.json

Needs the data folder (BLENDSERVE_DATA, or shared/data beside the repository), and a quiet machine.
"""

from __future__ import annotations

import argparse
import asyncio
import csv
import io
import json
import os
import random
import sys
import tempfile
import time
import zipfile
from pathlib import Path
from typing import Any, NamedTuple

import httpx
import numpy as np
from tokenizers import Tokenizer

sys.path.insert(0, str(Path(__file__).parents[1]))

from record import save

from blendserve.cli.follow import openai_client
from blendserve.cli.server_process import free_port, running_server
from blendserve.planner import PrefixTree
from blendserve.runtime.default_model import MODEL_NAME, resolve_model_path

ROOT = Path(__file__).parents[2]
DATA = Path(os.environ.get("BLENDSERVE_DATA") or ROOT.parent / "shared" / "data")
SUBJECTS, QUESTIONS, OPEN_PROMPTS, OPEN_TOKENS, ANSWER_TOKENS = 24, 4, 24, 160, 2
COMMON = ("--device", "cpu", "--dtype", "float32", "--mem-fraction-static", "0.1")
COMMON += ("--chunked-prefill-size", "512", "--enable-cache-report", "--sleep-on-idle")
COMMON += ("--disable-overlap-schedule",)  # As `serve` sets it; on a CPU there is no overlap.


class Stock(NamedTuple):
    """One way to run SGLang's own server."""

    flags: tuple[str, ...]
    presorted: bool = False  # the input, so that equal prefixes are neighbours
    kernels: bool = False  # with our attention, packed weights and row kernels


FCFS, LPM = ("--schedule-policy", "fcfs"), ("--schedule-policy", "lpm")
STOCK = {
    "fcfs": Stock(FCFS),
    "lpm": Stock(LPM),
    "dfs-weight": Stock(("--schedule-policy", "dfs-weight")),
    "fcfs, sorted": Stock(FCFS, presorted=True),
    "fcfs, sorted, conservativeness 0.3": Stock(
        (*FCFS, "--schedule-conservativeness", "0.3"), presorted=True
    ),
    "lpm, sorted": Stock(LPM, presorted=True),
    "fcfs, our kernels": Stock(FCFS, kernels=True),
    "fcfs, sorted, our kernels": Stock(FCFS, presorted=True, kernels=True),
    "lpm, sorted, our kernels": Stock(LPM, presorted=True, kernels=True),
}


def make_lines(seed: int = 0) -> list[dict[str, Any]]:
    """The job in random order."""
    rng = random.Random(seed)
    prompts: list[tuple[str, int]] = []
    with zipfile.ZipFile(DATA / "mmlu" / "mmlu.zip") as archive:

        def rows(part: str, subject: str) -> list[list[str]]:
            text = archive.read(f"data/{part}/{subject}_{part}.csv").decode()
            return list(csv.reader(io.StringIO(text)))

        suffix = "_test.csv"
        subjects = sorted(
            name.removeprefix("data/test/").removesuffix(suffix)
            for name in archive.namelist()
            if name.startswith("data/test/") and name.endswith(suffix)
        )
        for subject in rng.sample(subjects, SUBJECTS):
            topic = subject.replace("_", " ")
            shots = f"The following are multiple choice questions (with answers) about {topic}.\n\n"
            shots += "".join(question(row, f" {row[5]}\n\n") for row in rows("dev", subject)[:5])
            chosen = rng.sample(rows("test", subject), QUESTIONS)
            prompts += [(shots + question(row), ANSWER_TOKENS) for row in chosen]
        for subject in rng.sample(subjects, OPEN_PROMPTS):
            topic = subject.replace("_", " ")
            prompts.append((f"Write a long introduction to {topic} for beginners.\n", OPEN_TOKENS))
    rng.shuffle(prompts)
    return [
        {
            "custom_id": f"{k}",
            "method": "POST",
            "url": "/v1/completions",
            "body": {
                "model": MODEL_NAME,
                "prompt": prompt,
                "max_tokens": tokens,
                "temperature": 0,
                "ignore_eos": tokens == OPEN_TOKENS,
            },
        }
        for k, (prompt, tokens) in enumerate(prompts)
    ]


def question(row: list[str], answer: str = "") -> str:
    choices = "".join(f"\n{k}. {text}" for k, text in zip("ABCD", row[1:5], strict=True))
    return f"{row[0]}{choices}\nAnswer:{answer}"


def prefix_tree(lines: list[dict[str, Any]], model: str) -> PrefixTree:
    tokenizer = Tokenizer.from_file(str(Path(model) / "tokenizer.json"))
    encoded = tokenizer.encode_batch([line["body"]["prompt"] for line in lines])
    return PrefixTree.build([np.array(one.ids, dtype=np.int32) for one in encoded])


def shared_prefix_tokens(tree: PrefixTree) -> int:
    """Tokens of the shared prefixes, each counted once: what a pool must hold to lose none."""
    private = tree.length - tree.depth[tree.leaf_parent]
    return int(tree.unique_tokens - private.sum())


def run_stock(
    lines: list[dict[str, Any]],
    model: str,
    flags: tuple[str, ...],
    folder: Path,
    enabled: bool = False,
) -> dict[str, Any]:
    """enabled: with our plugin loaded, which offers its attention and leaves requests without a
    plan to SGLang."""
    port = free_port()
    command = [sys.executable, "-m", "sglang.launch_server", "--model-path", model, *flags]
    command += ["--served-model-name", MODEL_NAME, "--port", str(port)]
    environment = {"BLENDSERVE_ENABLED": str(int(enabled))}
    with running_server(command, port, folder / "s.log", environment) as url:
        warm_up(url)
        started = time.monotonic()
        usages = asyncio.run(send_all(url, lines))
        seconds = time.monotonic() - started
    cached = sum((u.get("prompt_tokens_details") or {}).get("cached_tokens", 0) for u in usages)
    return outcome(seconds, usages, cached)


def warm_up(url: str) -> None:
    """The first chunk of a server's life takes over a second longer than those after it."""
    body = {"model": MODEL_NAME, "prompt": "warm up " * 600, "max_tokens": 2}
    httpx.post(f"{url}/v1/completions", json=body, timeout=600).raise_for_status()


async def send_all(url: str, lines: list[dict[str, Any]]) -> list[dict[str, Any]]:
    limits = httpx.Limits(max_connections=len(lines))
    async with httpx.AsyncClient(timeout=3600, limits=limits) as client:
        answers = await asyncio.gather(
            *(client.post(url + line["url"], json=line["body"]) for line in lines)
        )
    return [answer.raise_for_status().json()["usage"] for answer in answers]


def run_blended(
    lines: list[dict[str, Any]], flags: tuple[str, ...], folder: Path
) -> dict[str, Any]:
    port = free_port()
    command = [sys.executable, "-m", "blendserve", "serve", *flags]
    command += ["--port", str(port), "--batch-dir", str(folder / "batches")]
    source = folder / "job.jsonl"
    source.write_text("".join(json.dumps(line) + "\n" for line in lines))
    with running_server(command, port, folder / "b.log") as url:
        warm_up(url)
        client = openai_client(url, {})
        started = time.monotonic()
        upload = client.files.create(file=source.open("rb"), purpose="batch")
        batch = client.batches.create(
            input_file_id=upload.id, endpoint="/v1/completions", completion_window="24h"
        )
        while batch.status not in ("completed", "failed", "expired", "cancelled"):
            time.sleep(0.2)
            batch = client.batches.retrieve(batch.id)
        seconds = time.monotonic() - started
        if batch.status != "completed" or batch.output_file_id is None:
            raise SystemExit(f"the batch ended as {batch.status}: {batch.errors}")
        text = client.files.content(batch.output_file_id).text
        status = httpx.get(f"{url}/blendserve/status", timeout=60).json()
    usages = [json.loads(line)["response"]["body"]["usage"] for line in text.splitlines()]
    cached = sum((u.get("prompt_tokens_details") or {}).get("cached_tokens", 0) for u in usages)
    retractions = sum(scheduler["retractions"] for scheduler in status["schedulers"])
    return {**outcome(seconds, usages, cached), "retractions": retractions}


def outcome(seconds: float, usages: list[dict[str, Any]], cached: int) -> dict[str, Any]:
    return {
        "seconds": seconds,
        "requests": len(usages),
        "prompt_tokens": sum(usage["prompt_tokens"] for usage in usages),
        "output_tokens": sum(usage["completion_tokens"] for usage in usages),
        "cached_tokens": cached,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--pool-share", type=float, default=0.25, help="KV pool : shared prefixes")
    parser.add_argument("--stock", nargs="*", default=list(STOCK), choices=list(STOCK))
    parser.add_argument("--flags", default="", help="further SGLang flags, for all servers")
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    model = resolve_model_path(MODEL_NAME)
    lines = make_lines()
    tree = prefix_tree(lines, model)
    pool = int(options.pool_share * shared_prefix_tokens(tree))
    best = tree.prompt_tokens - tree.unique_tokens
    flags = (*COMMON, "--max-total-tokens", str(pool), *options.flags.split())
    print(f"{len(lines)} requests, KV pool {pool} tokens, best hits {best}", flush=True)
    results: dict[str, dict[str, Any]] = {}
    with tempfile.TemporaryDirectory() as name:
        results["blendserve"] = run_blended(lines, flags, Path(name))
        report("blendserve", results["blendserve"], best, results)
        for policy in options.stock:
            stock = STOCK[policy]
            given = lines
            if stock.presorted:
                given = sorted(lines, key=lambda line: line["body"]["prompt"])
            its_flags = (*flags, *stock.flags)
            if stock.kernels:
                its_flags += ("--attention-backend", "blend")
            results[policy] = run_stock(given, model, its_flags, Path(name), stock.kernels)
            report(policy, results[policy], best, results)
    if options.json:
        record = {
            "pool_tokens": pool,
            "shared_prefix_tokens": shared_prefix_tokens(tree),
            "best_cached_tokens": best,
            "results": results,
        }
        save(options.json, record)


def report(name: str, result: dict[str, Any], best: int, results: dict[str, Any]) -> None:
    ratio = result["seconds"] / results["blendserve"]["seconds"]
    hits = result["cached_tokens"] / best
    print(
        f"{name:36} {result['seconds']:7.1f} s  {ratio:5.2f}x  hits {hits:.1%} of best", flush=True
    )


if __name__ == "__main__":
    main()
