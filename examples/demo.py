"""The demo: one batch file, blended and through stock SGLang, on this machine, in one run.

    make demo

It starts a BlendServe server, submits examples/demo_batch.jsonl with the unmodified `openai`
client, and shows its progress. Then it sends the same lines all at once to SGLang's own server,
with the same model, element type, KV memory and batch limits, in two ways: unmodified, in the
file's order; and at its best, with its longest-prefix-match policy, lines that were sorted
beforehand, and our kernels and packed weights. What BlendServe gains over the latter is its order.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import subprocess
import sys
import tempfile
import time
from dataclasses import asdict, dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
from openai import AsyncOpenAI
from rich.console import Console
from rich.table import Table

from blendserve.cli.follow import follow, openai_client
from blendserve.cli.server_process import free_port, running_server
from blendserve.planner import PrefixTree
from blendserve.runtime.cpu_platform import best_dtype, needs_cpu_engine
from blendserve.runtime.default_model import MODEL_NAME, resolve_model_path

EXAMPLES = Path(__file__).parent
SHOWN_ANSWERS = ("sentiment-03", "routing-11", "open-05", "mixed-07")


@dataclass
class Outcome:
    """One way of running the file. Seconds are wall time from the first byte sent."""

    requests: int
    prompt_tokens: int
    output_tokens: int
    cached_tokens: int
    best_cached_tokens: int
    seconds: float

    @property
    def hit_rate(self) -> float:
        return self.cached_tokens / self.prompt_tokens

    @property
    def share_of_best(self) -> float:
        return self.cached_tokens / self.best_cached_tokens

    @property
    def throughput(self) -> float:
        return (self.prompt_tokens + self.output_tokens) / self.seconds


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument(
        "--kv-tokens",
        type=int,
        default=4096,
        help="KV memory of all servers, in tokens; scarce, as on a GPU under a real job",
    )
    parser.add_argument(
        "--dtype",
        default=best_dtype(),
        choices=("float32", "bfloat16"),
        help="element type for all servers (default: what this processor is fastest in)",
    )
    parser.add_argument("--json", type=Path, help="also write the measured figures to this file")
    options = parser.parse_args()
    console = Console(width=100)
    lines = [json.loads(line) for line in (EXAMPLES / "demo_batch.jsonl").open()]
    console.print(f"Model: {MODEL_NAME}, {options.dtype} (converted once into the user's cache)")
    model = resolve_model_path(MODEL_NAME)
    flags = ["--max-total-tokens", str(options.kv_tokens), "--chunked-prefill-size", "2048"]
    flags += ["--dtype", options.dtype]
    if needs_cpu_engine():
        # As `serve` has it there, because it is faster: so for stock SGLang, too.
        flags += ["--device", "cpu", "--disable-overlap-schedule"]
    prompts = tokenized_prompts(lines, model)
    best = best_cached_tokens(prompts)
    by_prompt = sorted(range(len(lines)), key=lambda k: prompts[k])
    with tempfile.TemporaryDirectory(prefix="blendserve-demo-") as folder:
        console.rule("BlendServe: Batch API, dual scan")
        blended, answers = run_blended(Path(folder), flags, best, console)
        console.rule("Stock SGLang: the same lines, all sent at once, first come first served")
        fcfs = Stock("fcfs", ours=False)
        stock, stock_answers = run_stock(Path(folder), model, flags, fcfs, lines, best, console)
        console.rule("Stock SGLang at its best: sorted lines, prefix policy, our kernels")
        lpm = Stock("lpm", ours=needs_cpu_engine())
        ordered = [lines[k] for k in by_prompt]
        tuned, _ = run_stock(Path(folder), model, flags, lpm, ordered, best, console)
    console.rule("Result")
    outcomes = {"BlendServe": blended, "stock, FCFS": stock, "stock, best": tuned}
    console.print(result_table(outcomes))
    console.print(
        f"BlendServe is {stock.seconds / blended.seconds:.2f} times as fast as stock SGLang: "
        f"{stock.seconds / tuned.seconds:.2f} times by what stock can have too (sorted lines, a "
        f"policy flag, our kernels), times {tuned.seconds / blended.seconds:.2f} by the order."
    )
    texts = {key: text_of(answer) for key, answer in answers.items()}
    equal = sum(texts[key] == text for key, text in stock_answers.items())
    console.print(
        f"Greedy answers equal to unmodified SGLang's: {equal} of {len(answers)} ({options.dtype}; "
        "sums are rounded in another order)."
    )
    show_answers(lines, texts, console)
    if options.json:
        figures = {
            "machine": machine(),
            "commit": commit(),
            "kv_tokens": options.kv_tokens,
            "dtype": options.dtype,
            "blendserve": asdict(blended),
            "stock_fcfs": asdict(stock),
            "stock_best": asdict(tuned),
            "equal_answers": equal,
        }
        options.json.write_text(json.dumps(figures, indent=2) + "\n")
    return 0


def commit() -> str:
    """Of the code that ran; empty outside a repository."""
    asked = ["git", "-C", str(Path(__file__).parent), "rev-parse", "--short", "HEAD"]
    return subprocess.run(asked, capture_output=True, text=True).stdout.strip()


def machine() -> dict[str, Any]:
    """Where the figures come from."""
    cpu_lines = Path("/proc/cpuinfo").read_text().splitlines()
    cpu = next(line for line in cpu_lines if line.startswith("model name"))
    return {
        "device": cpu.partition(":")[2].strip(),
        "cores": os.cpu_count(),
        "versions": {name: version(name) for name in ("blendserve", "sglang", "torch")},
        "command": "python " + " ".join(sys.argv),
    }


def run_blended(
    folder: Path, flags: list[str], best: int, console: Console
) -> tuple[Outcome, dict[str, dict[str, Any]]]:
    """The file through the Batch API; also its answers by custom_id."""
    port = free_port()
    command = [sys.executable, "-m", "blendserve", "serve", *flags]
    command += ["--port", str(port), "--batch-dir", str(folder / "batches")]
    with running_server(command, port, folder / "blendserve.log") as url:
        client = openai_client(url, {})
        started = time.monotonic()
        upload = client.files.create(
            file=(EXAMPLES / "demo_batch.jsonl").open("rb"), purpose="batch"
        )
        batch = client.batches.create(
            input_file_id=upload.id, endpoint="/v1/chat/completions", completion_window="24h"
        )
        batch = follow(url, batch.id, console, {})
        seconds = time.monotonic() - started
        if batch.status != "completed" or batch.output_file_id is None or batch.usage is None:
            raise SystemExit(f"the batch ended as {batch.status}: {batch.errors}")
        output = client.files.content(batch.output_file_id).text
    answers = {
        line["custom_id"]: line["response"]["body"] for line in map(json.loads, output.splitlines())
    }
    usage = batch.usage
    outcome = Outcome(
        requests=len(answers),
        prompt_tokens=usage.input_tokens,
        output_tokens=usage.output_tokens,
        cached_tokens=usage.input_tokens_details.cached_tokens,
        best_cached_tokens=best,
        seconds=seconds,
    )
    return outcome, answers


@dataclass
class Stock:
    """How SGLang's own server is started."""

    policy: str
    ours: bool  # with our attention, packed weights and row kernels; the order is SGLang's


def run_stock(
    folder: Path,
    model: str,
    flags: list[str],
    stock: Stock,
    lines: list[dict[str, Any]],
    best: int,
    console: Console,
) -> tuple[Outcome, dict[str, str]]:
    """The same bodies through SGLang's own server, as fast as it takes them; texts by custom_id."""
    port = free_port()
    command = [sys.executable, "-m", "sglang.launch_server", "--model-path", model]
    command += ["--served-model-name", MODEL_NAME, "--port", str(port), *flags]
    command += ["--mem-fraction-static", "0.1", "--sleep-on-idle"]
    command += ["--enable-cache-report", "--schedule-policy", stock.policy]
    if stock.ours:
        command += ["--attention-backend", "blend"]
    environment = {"BLENDSERVE_ENABLED": str(int(stock.ours))}
    log = folder / f"stock-{stock.policy}.log"
    with running_server(command, port, log, environment) as url, console.status("running"):
        started = time.monotonic()
        answers = asyncio.run(send_all(url, lines))
        seconds = time.monotonic() - started
    usages = [answer.usage for answer in answers]
    outcome = Outcome(
        requests=len(usages),
        prompt_tokens=sum(usage.prompt_tokens for usage in usages),
        output_tokens=sum(usage.completion_tokens for usage in usages),
        # SGLang leaves the details out where nothing was cached.
        cached_tokens=sum(
            usage.prompt_tokens_details.cached_tokens
            for usage in usages
            if usage.prompt_tokens_details is not None
        ),
        best_cached_tokens=best,
        seconds=seconds,
    )
    texts = {
        line["custom_id"]: answer.choices[0].message.content
        for line, answer in zip(lines, answers, strict=True)
    }
    return outcome, texts


async def send_all(url: str, lines: list[dict[str, Any]]) -> list[Any]:
    client = AsyncOpenAI(base_url=f"{url}/v1", api_key="unused", timeout=1800, max_retries=0)
    return await asyncio.gather(*(client.chat.completions.create(**line["body"]) for line in lines))


def tokenized_prompts(lines: list[dict[str, Any]], model: str) -> list[list[int]]:
    """The prompts as the servers will see them."""
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(model)
    return [
        tokenizer.apply_chat_template(
            line["body"]["messages"], add_generation_prompt=True, return_dict=False
        )
        for line in lines
    ]


def best_cached_tokens(prompts: list[list[int]]) -> int:
    """Prompt tokens that an endless cache would find, whatever the order: all but the unique."""
    tree = PrefixTree.build([np.array(prompt, dtype=np.int32) for prompt in prompts])
    return tree.prompt_tokens - tree.unique_tokens


def result_table(outcomes: dict[str, Outcome]) -> Table:
    table = Table("", *outcomes)
    rows = (
        ("requests", "requests", "d"),
        ("prompt tokens", "prompt_tokens", ",d"),
        ("output tokens", "output_tokens", ",d"),
        ("prefix hit rate", "hit_rate", ".1%"),
        ("  share of the best possible", "share_of_best", ".1%"),
        ("wall time, seconds", "seconds", ".1f"),
        ("tokens per second, in + out", "throughput", ".0f"),
    )
    for title, name, style in rows:
        table.add_row(title, *(format(getattr(way, name), style) for way in outcomes.values()))
    return table


def text_of(answer: dict[str, Any]) -> str:
    return str(answer["choices"][0]["message"]["content"])


def show_answers(lines: list[dict[str, Any]], texts: dict[str, str], console: Console) -> None:
    console.rule("A few answers")
    prompts = {line["custom_id"]: line["body"]["messages"][-1]["content"] for line in lines}
    for custom_id in SHOWN_ANSWERS:
        console.print(f"{custom_id}: {shorten(prompts[custom_id])}", style="dim", markup=False)
        console.print(f"  {shorten(texts[custom_id])}", markup=False)


def shorten(text: str, width: int = 150) -> str:
    text = " ".join(text.split())
    return text if len(text) <= width else text[: width - 3] + "..."


if __name__ == "__main__":
    sys.exit(main())
