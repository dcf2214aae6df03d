"""The demo: one batch file, blended and through stock SGLang, on this machine, in one run.

    make demo

It starts a BlendServe server, submits examples/demo_batch.jsonl with the unmodified `openai`
client, and shows its progress; then it sends the same lines, in the same order, all at once, to an
unmodified SGLang server with the same model, the same KV memory and the same batch limits.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import sys
import tempfile
import time
from dataclasses import asdict, dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import httpx
import numpy as np
from openai import AsyncOpenAI
from rich.console import Console
from rich.table import Table

from blendserve.cli.follow import follow, openai_client
from blendserve.cli.server_process import free_port, running_server
from blendserve.planner import PrefixTree
from blendserve.runtime.cpu_platform import needs_cpu_engine
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
        help="KV memory of both servers, in tokens; scarce, as on a GPU under a real job",
    )
    parser.add_argument("--json", type=Path, help="also write the measured figures to this file")
    options = parser.parse_args()
    console = Console(width=100)
    lines = [json.loads(line) for line in (EXAMPLES / "demo_batch.jsonl").open()]
    console.print(f"Model: {MODEL_NAME} (converted once into the user's cache)")
    model = resolve_model_path(MODEL_NAME)
    flags = ["--max-total-tokens", str(options.kv_tokens), "--chunked-prefill-size", "2048"]
    if needs_cpu_engine():
        # As `serve` has it there, because it is faster: so for stock SGLang, too.
        flags += ["--disable-overlap-schedule"]
    best = best_cached_tokens(lines, model)
    with tempfile.TemporaryDirectory(prefix="blendserve-demo-") as folder:
        console.rule("BlendServe: Batch API, dual scan")
        blended, answers, job = run_blended(Path(folder), flags, best, console)
        console.rule("Stock SGLang: the same lines, all sent at once, first come first served")
        stock = run_stock(Path(folder), model, flags, lines, best, console)
    console.rule("Result")
    console.print(result_table(blended, stock))
    console.print(density_line(job))
    console.print(f"Throughput ratio, BlendServe : stock = {stock.seconds / blended.seconds:.2f}")
    show_answers(lines, answers, console)
    if options.json:
        figures = {
            "machine": machine(),
            "kv_tokens": options.kv_tokens,
            "blendserve": asdict(blended),
            "stock_fcfs": asdict(stock),
            "job": job,
        }
        options.json.write_text(json.dumps(figures, indent=2) + "\n")
    return 0


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
) -> tuple[Outcome, dict[str, dict[str, Any]], dict[str, Any]]:
    """The file through the Batch API; also its answers by custom_id, and what the planner saw."""
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
        job = job_view(url, batch.id)
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
    return outcome, answers, job


def run_stock(
    folder: Path,
    model: str,
    flags: list[str],
    lines: list[dict[str, Any]],
    best: int,
    console: Console,
) -> Outcome:
    """The same bodies through an SGLang server without BlendServe, as fast as it takes them."""
    port = free_port()
    command = [sys.executable, "-m", "sglang.launch_server", "--model-path", model]
    command += ["--served-model-name", MODEL_NAME, "--port", str(port), *flags]
    command += ["--device", "cpu", "--dtype", "float32", "--mem-fraction-static", "0.1"]
    command += ["--enable-cache-report", "--schedule-policy", "fcfs", "--sleep-on-idle"]
    environment = {"BLENDSERVE_ENABLED": "0"}
    with (
        running_server(command, port, folder / "stock.log", environment) as url,
        console.status("running"),
    ):
        started = time.monotonic()
        usages = asyncio.run(send_all(url, lines))
        seconds = time.monotonic() - started
    return Outcome(
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


async def send_all(url: str, lines: list[dict[str, Any]]) -> list[Any]:
    client = AsyncOpenAI(base_url=f"{url}/v1", api_key="unused", timeout=1800, max_retries=0)
    answers = await asyncio.gather(
        *(client.chat.completions.create(**line["body"]) for line in lines)
    )
    return [answer.usage for answer in answers]


def job_view(url: str, batch_id: str) -> dict[str, Any]:
    """What the planner says of the job, as soon as it has planned it."""
    while True:
        jobs = httpx.get(f"{url}/blendserve/status", timeout=60).json()["jobs"]
        for job in jobs:
            if job["job_id"] == batch_id and job["phase"] == "running":
                return dict(job)
        time.sleep(0.1)


def best_cached_tokens(lines: list[dict[str, Any]], model: str) -> int:
    """Prompt tokens that an endless cache would find, whatever the order: all but the unique."""
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(model)
    prompts = [
        tokenizer.apply_chat_template(
            line["body"]["messages"], add_generation_prompt=True, return_dict=False
        )
        for line in lines
    ]
    tree = PrefixTree.build([np.array(prompt, dtype=np.int32) for prompt in prompts])
    return tree.prompt_tokens - tree.unique_tokens


def result_table(blended: Outcome, stock: Outcome) -> Table:
    table = Table("", "BlendServe", "stock SGLang, FCFS")
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
        table.add_row(title, *(format(getattr(way, name), style) for way in (blended, stock)))
    return table


def density_line(job: dict[str, Any]) -> str:
    return (
        f"Compute density (compute seconds : memory seconds): job {job['target_density']:.0f}, "
        f"left scanner {job['left_density']:.0f}, right scanner {job['right_density']:.0f}"
    )


def show_answers(
    lines: list[dict[str, Any]], answers: dict[str, dict[str, Any]], console: Console
) -> None:
    console.rule("A few answers")
    prompts = {line["custom_id"]: line["body"]["messages"][-1]["content"] for line in lines}
    for custom_id in SHOWN_ANSWERS:
        answer = answers[custom_id]["choices"][0]["message"]["content"].strip()
        console.print(f"{custom_id}: {shorten(prompts[custom_id])}", style="dim", markup=False)
        console.print(f"  {shorten(answer)}", markup=False)


def shorten(text: str, width: int = 150) -> str:
    text = " ".join(text.split())
    return text if len(text) <= width else text[: width - 3] + "..."


if __name__ == "__main__":
    sys.exit(main())
