"""Lines with pictures, servers of tiny vision models, and jobs sent to them."""

from __future__ import annotations

import base64
import io
import random
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx
from openai import OpenAI
from PIL import Image

sys.path.insert(0, str(Path(__file__).parents[2] / "test" / "end_to_end"))

import jobs
import tiny_vlm

from blendserve.cli.server_process import free_port, running_server

MODEL = "tiny-vlm"
CHAT = "/v1/chat/completions"
_ENGINE = (
    *("--served-model-name", MODEL, "--dtype", "float32", "--device", "cpu"),
    *("--mem-fraction-static", "0.4", "--chunked-prefill-size", "512", "--enable-cache-report"),
    *("--enable-multimodal", "--sleep-on-idle"),
)


def picture(width: int, height: int, seed: int) -> str:
    """A data: URL of a PNG in a few colours, another one for each seed."""
    colours = random.Random(seed)
    image = Image.new("RGB", (width, height))
    for column in range(4):
        box = (width * column // 4, 0, width * (column + 1) // 4, height)
        image.paste(tuple(colours.randrange(256) for _ in range(3)), box)
    stream = io.BytesIO()
    image.save(stream, "PNG", compress_level=1)
    return "data:image/png;base64," + base64.b64encode(stream.getvalue()).decode()


def image_part(url: str) -> dict[str, Any]:
    return {"type": "image_url", "image_url": {"url": url}}


def video(width: int, height: int, frames: int, seed: int) -> str:
    """A data: URL of an animated GIF, ten frames a second."""
    colours = random.Random(seed)

    def frame(number: int) -> Image.Image:
        image = Image.new("RGB", (width, height), tuple(colours.randrange(256) for _ in range(3)))
        image.paste((number, 0, 0), (0, 0, 1 + number % width, height))
        return image

    stream = io.BytesIO()
    first, *rest = (frame(number) for number in range(frames))
    first.save(stream, "GIF", save_all=True, append_images=rest, duration=100, loop=0)
    return "data:image/gif;base64," + base64.b64encode(stream.getvalue()).decode()


def video_part(url: str) -> dict[str, Any]:
    return {"type": "video_url", "video_url": {"url": url}}


def text_part(text: str) -> dict[str, Any]:
    return {"type": "text", "text": text}


def chat_line(name: str, parts: list[dict[str, Any]], max_tokens: int) -> dict[str, Any]:
    messages = [{"role": "user", "content": parts}]
    limits = {"temperature": 0, "max_tokens": max_tokens, "ignore_eos": True}
    body = {"model": MODEL, "messages": messages, **limits}
    return {"custom_id": name, "method": "POST", "url": CHAT, "body": body}


@contextmanager
def model_folder(family: str) -> Iterator[str]:
    """A tiny model of a family."""
    with tempfile.TemporaryDirectory() as folder:
        yield str(tiny_vlm.build(family, Path(folder) / family))


@contextmanager
def server(model: str, pool_tokens: int, *, stock: bool = False) -> Iterator[str]:
    """URL of a server with so much KV memory."""
    port = free_port()
    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, "-m", "sglang.launch_server", "--log-level", "warning"]
        if not stock:
            command = [sys.executable, "-m", "blendserve", "serve"]
            command += ["--batch-dir", f"{folder}/batches"]
        command += ["--model-path", model, *_ENGINE, "--port", str(port)]
        command += ["--max-total-tokens", str(pool_tokens)]
        environment = {"BLENDSERVE_ENABLED": "0"} if stock else {}
        with running_server(command, port, Path(folder) / "log", environment) as url:
            yield url


def run_job(url: str, lines: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Send a job and wait for it.

    Returns:
        answers and errors: bodies by custom_id. seconds. planned_tokens, best_sharing,
        planned_sharing: what the server said of its plan.
    """
    client = OpenAI(base_url=f"{url}/v1", api_key="unused", timeout=300, max_retries=0)
    started = time.perf_counter()
    batch = jobs.submit(client, list(lines), CHAT)
    plan: dict[str, Any] = {}
    while batch.status not in jobs.ENDED:
        assert time.perf_counter() - started < 600, batch
        time.sleep(0.1)
        for job in httpx.get(f"{url}/blendserve/status", timeout=60).json()["jobs"]:
            plan = job if job["phase"] == "running" else plan
        batch = client.batches.retrieve(batch.id)
    return {
        "answers": jobs.results(client, batch.output_file_id),
        "errors": jobs.results(client, batch.error_file_id),
        "seconds": round(time.perf_counter() - started, 1),
        "planned_tokens": plan.get("prompt_tokens", 0),
        "best_sharing": plan.get("best_sharing", 0.0),
        "planned_sharing": plan.get("planned_sharing", 0.0),
    }


def usage(result: dict[str, Any]) -> tuple[int, int]:
    """(prompt tokens, cached of them) of an answer."""
    found = result["response"]["body"]["usage"]
    details = found.get("prompt_tokens_details") or {}
    return found["prompt_tokens"], details.get("cached_tokens") or 0


def stock_answers(url: str, lines: Sequence[dict[str, Any]]) -> dict[str, dict[str, Any]]:
    """Text and cached tokens of each line, sent to a stock server, 16 at a time, in this order."""

    def ask(line: dict[str, Any]) -> tuple[str, dict[str, Any]]:
        answer = client.post(f"{url}{line['url']}", json=line["body"])
        body = answer.raise_for_status().json()
        text = body["choices"][0]["message"]["content"]
        return line["custom_id"], {"text": text, "cached": usage({"response": {"body": body}})[1]}

    with httpx.Client(timeout=600) as client, ThreadPoolExecutor(16) as threads:
        return dict(threads.map(ask, lines))
