"""Each engine, started as its own documentation advises for a CPU, over one job."""

from __future__ import annotations

import asyncio
import json
import os
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import httpx
from install import LLAMA, LLAMA_SERVER, VLLM
from jobs import Line, warm_up
from tokenizers import Tokenizer

from blendserve.cli.follow import openai_client
from blendserve.cli.server_process import (
    die_with_parent,
    free_port,
    log_tail,
    running_server,
)
from blendserve.runtime.default_model import MODEL_NAME, find_gguf, resolve_model_path

ENDED = ("completed", "failed", "expired", "cancelled")
CHUNK_TOKENS = 2048
# The smallest multiple of what its attention kernel is optimised for: blocks are what it shares.
VLLM_BLOCK_TOKENS = 32
LLAMA_SLOTS = (4, 32)


class Setting(NamedTuple):
    """What an engine is given: the job and its memory.

    Attributes:
        kv_tokens: for how many tokens it has KV memory.
        folder: for its files and its log, `engine.log`.
    """

    lines: list[Line]
    dtype: str
    kv_tokens: int
    folder: Path

    @property
    def log(self) -> Path:
        return self.folder / "engine.log"


Result = dict[str, Any]


def blendserve(given: Setting) -> Result:
    """`blendserve serve`, and the job through its Batch API."""
    port = free_port()
    command = [sys.executable, "-m", "blendserve", "serve", *sglang_flags(given)]
    command += ["--port", str(port), "--batch-dir", str(given.folder / "batches")]
    began = time.monotonic()
    with running_server(command, port, given.log) as url:
        start_seconds = time.monotonic() - began
        one_batch(url, warm_up(), given.folder / "warm-up.jsonl")
        started = time.monotonic()
        answers = one_batch(url, given.lines, given.folder / "job.jsonl")
        seconds = time.monotonic() - started
    usages = [answer["response"]["body"]["usage"] for answer in answers]
    return outcome(start_seconds, seconds, usages)


def one_batch(url: str, lines: list[Line], file: Path) -> list[dict[str, Any]]:
    write_lines(file, lines)
    client = openai_client(url, {})
    with file.open("rb") as source:
        upload = client.files.create(file=source, purpose="batch")
    batch = client.batches.create(
        input_file_id=upload.id, endpoint="/v1/chat/completions", completion_window="24h"
    )
    while batch.status not in ENDED:
        time.sleep(0.2)
        batch = client.batches.retrieve(batch.id)
    if batch.status != "completed" or batch.output_file_id is None:
        raise RuntimeError(f"the batch ended as {batch.status}: {batch.errors}")
    text = client.files.content(batch.output_file_id).text
    return [json.loads(line) for line in text.splitlines()]


def stock(given: Setting) -> Result:
    """SGLang's own server, unmodified, first come first served."""
    return sglang(given, policy="fcfs", ours=False)


def stock_best(given: Setting) -> Result:
    """SGLang with its prefix policy, our attention, packed weights and row kernels."""
    return sglang(given, policy="lpm", ours=True)


def sglang(given: Setting, policy: str, ours: bool) -> Result:
    port = free_port()
    command = [sys.executable, "-m", "sglang.launch_server", *sglang_flags(given)]
    command += ["--model-path", resolve_model_path(MODEL_NAME), "--served-model-name", MODEL_NAME]
    command += ["--device", "cpu", "--disable-overlap-schedule", "--mem-fraction-static", "0.1"]
    command += ["--sleep-on-idle", "--enable-cache-report", "--port", str(port)]
    command += ["--schedule-policy", policy]
    if ours:
        command += ["--attention-backend", "blend"]
    environment = {"BLENDSERVE_ENABLED": str(int(ours))}
    return served(command, port, given, environment)


def sglang_flags(given: Setting) -> list[str]:
    flags = ["--max-total-tokens", str(given.kv_tokens), "--dtype", given.dtype]
    return [*flags, "--chunked-prefill-size", str(CHUNK_TOKENS)]


def llama(given: Setting) -> Result:
    """llama.cpp's server, with as many slots as have room for the job's longest line."""
    port, threads = free_port(), str(len(os.sched_getaffinity(0)))
    slots = max(LLAMA_SLOTS[0], min(LLAMA_SLOTS[1], given.kv_tokens // longest(given.lines)))
    short = {"float32": "f32", "bfloat16": "bf16"}[given.dtype]
    command = [str(LLAMA_SERVER), "--model", str(llama_model(short)), "--alias", MODEL_NAME]
    command += ["--port", str(port), "--threads", threads, "--threads-batch", threads]
    command += ["--ctx-size", str(given.kv_tokens), "--kv-unified", "--parallel", str(slots)]
    command += ["--cache-type-k", short, "--cache-type-v", short, "--jinja"]
    # KV that lies beside the pool, in the host's memory, would be more memory than others have.
    command += ["--cache-ram", "0", "--batch-size", str(CHUNK_TOKENS), "--no-ui"]
    return {**served(command, port, given, {}), "slots": slots}


def longest(lines: list[Line]) -> int:
    """Tokens of the job's longest line, its answer and the chat template's own (at most 64)."""
    tokenizer = Tokenizer.from_file(str(Path(resolve_model_path(MODEL_NAME)) / "tokenizer.json"))
    texts = ["".join(m["content"] for m in line["body"]["messages"]) for line in lines]
    counts = [len(encoded.ids) for encoded in tokenizer.encode_batch(texts)]
    own = (8 * len(line["body"]["messages"]) + 64 for line in lines)
    answers = (line["body"]["max_tokens"] for line in lines)
    return max(map(sum, zip(counts, own, answers, strict=True)))


def llama_model(short: str) -> Path:
    """The same weights in llama.cpp's own form, written once by its own tool."""
    path = LLAMA / f"smollm2-{short}.gguf"
    if not path.is_file():
        scratch = path.with_suffix(".partial")
        tool = LLAMA_SERVER.with_name("llama-quantize")
        command = [str(tool), "--allow-requantize", str(find_gguf()), str(scratch), short.upper()]
        subprocess.run(command, check=True, capture_output=True)
        scratch.rename(path)
    return path


def served(command: list[str], port: int, given: Setting, environment: dict[str, str]) -> Result:
    """All lines at once to a server of chat completions, which takes them in its own order."""
    began = time.monotonic()
    with running_server(command, port, given.log, environment) as url:
        start_seconds = time.monotonic() - began
        asyncio.run(send_all(url, warm_up()))
        started = time.monotonic()
        usages = asyncio.run(send_all(url, given.lines))
        seconds = time.monotonic() - started
    return outcome(start_seconds, seconds, usages)


async def send_all(url: str, lines: list[Line]) -> list[dict[str, Any]]:
    limits = httpx.Limits(max_connections=len(lines))
    async with httpx.AsyncClient(timeout=3600, limits=limits, trust_env=False) as client:
        answers = await asyncio.gather(
            *(client.post(url + line["url"], json=line["body"]) for line in lines)
        )
    for answer in answers:
        if answer.status_code != 200:
            raise RuntimeError(f"a line was answered {answer.status_code}: {answer.text[:300]}")
    return [answer.json()["usage"] for answer in answers]


def vllm(given: Setting) -> Result:
    """vLLM's `run-batch` with prefix caching, its threads bound, and what it advises preloaded."""
    folder = given.folder
    warm, job, output, times = (folder / name for name in ("w.jsonl", "j.jsonl", "o.jsonl", "t"))
    write_lines(warm, warm_up())
    write_lines(job, given.lines)
    blocks = given.kv_tokens // VLLM_BLOCK_TOKENS + 1  # one of them is never used
    command = [str(VLLM / "bin" / "python"), str(Path(__file__).with_name("vllm_job.py"))]
    command += [str(warm), str(times), "-i", str(job), "-o", str(output)]
    command += ["--model", resolve_model_path(MODEL_NAME), "--served-model-name", MODEL_NAME]
    command += ["--dtype", given.dtype, "--max-model-len", "4096", "--enable-prefix-caching"]
    command += ["--block-size", str(VLLM_BLOCK_TOKENS), "--num-gpu-blocks-override", str(blocks)]
    command += ["--max-num-batched-tokens", str(CHUNK_TOKENS), "--enable-prompt-tokens-details"]
    # What it checks to be free at its start; the blocks above are what it takes.
    command += ["--gpu-memory-utilization", "0.3"]
    preloaded = [*VLLM.glob("tcmalloc/usr/lib/*/libtcmalloc_minimal.so.4")]
    preloaded += VLLM.glob("lib/libiomp5.so")
    environment = {
        **os.environ,
        "LD_PRELOAD": ":".join(map(str, preloaded)),
        "VLLM_CPU_OMP_THREADS_BIND": ",".join(map(str, sorted(os.sched_getaffinity(0)))),
        "VLLM_CACHE_ROOT": str(VLLM / "cache"),
        "VLLM_NO_USAGE_STATS": "1",
        "HF_HUB_OFFLINE": "1",
    }
    environment.pop("PYTHONPATH", None)
    began = time.monotonic()
    with given.log.open("ab") as log:
        ended = subprocess.run(
            command, env=environment, stdout=log, stderr=log, preexec_fn=die_with_parent
        )
    if ended.returncode or not times.is_file():
        raise RuntimeError(f"vLLM ended with status {ended.returncode}:\n{log_tail(given.log)}")
    marks = json.loads(times.read_text())
    answers = [json.loads(line) for line in output.read_text().splitlines()]
    failed = [a for a in answers if a["error"] or a["response"]["status_code"] != 200]
    if failed:
        raise RuntimeError(f"{len(failed)} lines failed, the first: {failed[0]}")
    usages = [answer["response"]["body"]["usage"] for answer in answers]
    result = outcome(marks["ready"] - began, marks["seconds"], usages)
    return {**result, "preloaded": [path.name for path in preloaded]}


def outcome(start_seconds: float, seconds: float, usages: list[dict[str, Any]]) -> Result:
    """Hits are what each engine reports for itself."""
    cached = sum((u.get("prompt_tokens_details") or {}).get("cached_tokens") or 0 for u in usages)
    return {
        "seconds": round(seconds, 2),
        "start_seconds": round(start_seconds, 1),
        "requests": len(usages),
        "prompt_tokens": sum(usage["prompt_tokens"] for usage in usages),
        "output_tokens": sum(usage["completion_tokens"] for usage in usages),
        "cached_tokens": cached,
    }


def write_lines(file: Path, lines: list[Line]) -> None:
    file.write_text("".join(json.dumps(line) + "\n" for line in lines))


class Engine(NamedTuple):
    """
    Attributes:
        presorted: its input is sorted beforehand, whatever order the job has.
    """

    run: Callable[[Setting], Result]
    presorted: bool = False


ENGINES = {
    "blendserve": Engine(blendserve),
    "stock": Engine(stock),
    "stock-best": Engine(stock_best, presorted=True),
    "vllm": Engine(vllm),
    "llama.cpp": Engine(llama),
}
