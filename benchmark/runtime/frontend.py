"""Frontend programs on one server: as SGLang runs them, and as a planned job.

    python benchmark/runtime/frontend.py --output benchmark/results/frontend.json

Three programs, each over inputs that share prefixes: two dependent questions to a document, a tree
of thoughts (forks and a choice), and map-reduce over a document's parts. Each runs with
`sgl.RuntimeEndpoint` on shuffled and on sorted inputs, and with `blendserve.frontend.Endpoint` on
shuffled ones, one after the other, with the cache flushed before. Texts are compared: the server
computes in float32, where greedy answers do not depend on what runs beside.
"""

from __future__ import annotations

import argparse
import random
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import httpx
import sglang as sgl

sys.path.insert(0, str(Path(__file__).parents[1]))
from record import save
from tokenizers import Tokenizer

from blendserve.cli.server_process import free_port, running_server
from blendserve.frontend import Endpoint
from blendserve.runtime.default_model import resolve_model_path

MODEL = "smollm2-135m"
WORDS = [
    *("river", "stone", "light", "paper", "green", "quick", "table", "summer", "house", "music"),
    *("window", "garden", "silver", "letter", "mountain", "yellow", "engine", "bread", "forest"),
]
GREEDY = {"temperature": 0}

# -- programs


@sgl.function
def questions(s: Any, document: str, question: str) -> None:
    """Two answers, the second of which needs the first."""
    s += "You read a document and answer a question about it, shortly.\n"
    s += document + "\n" + question + "\nAnswer:"
    s += sgl.gen("answer", max_tokens=16, ignore_eos=True)
    s += "\nThe reason is" + sgl.gen("reason", max_tokens=8, ignore_eos=True)


@sgl.function
def thoughts(s: Any, document: str, question: str) -> None:
    """Two thoughts side by side, a choice between them, and a conclusion."""
    s += "Think about the document, then judge.\n" + document + "\n" + question + "\n"
    branches = s.fork(2)
    for number, branch in enumerate(branches):
        branch += f"Thought {number}:" + sgl.gen("thought", max_tokens=10, ignore_eos=True)
    branches.join()
    s += "First:" + s["thought"][0] + "\nSecond:" + s["thought"][1] + "\nThe better one is the "
    s += sgl.select("better", choices=["first", "second"])
    s += ", so" + sgl.gen("conclusion", max_tokens=8, ignore_eos=True)


@sgl.function
def map_reduce(s: Any, document: str, question: str) -> None:
    """A note on each part of a document, then one answer from the notes."""
    s += "Take notes of a document, then answer.\n" + document + "\n" + question + "\n"
    parts = s.fork(3)
    for number, part in enumerate(parts):
        part += f"Note {number + 1}:" + sgl.gen("note", max_tokens=6, ignore_eos=True)
    parts.join()
    s += "".join(f"- {note}\n" for note in s["note"])
    s += "Answer:" + sgl.gen("answer", max_tokens=12, ignore_eos=True)


# With the questions to each document.
PROGRAMS = {"questions": (questions, 6), "thoughts": (thoughts, 3), "map_reduce": (map_reduce, 3)}


def inputs_of(documents: int, asked: int, words: int = 230) -> list[dict[str, str]]:
    rng = random.Random(5)
    return [
        {"document": document, "question": f"Question {q}: what is said about {WORDS[q]}?"}
        for document in (
            f"Document {d}. " + " ".join(rng.choice(WORDS) for _ in range(words))
            for d in range(documents)
        )
        for q in range(asked)
    ]


# -- one run


class Requests:
    """What a backend was asked, put between it and the network.

    Attributes:
        prompts: the text of each request, all choices of a `select` one by one.
        written: prompt and answer of each generation.
    """

    def __init__(self, backend: Any) -> None:
        self.prompts: list[str] = []
        self.written: list[str] = []
        send, generate = backend._add_images, backend.generate

        def sending(s: Any, data: dict[str, Any]) -> None:
            send(s, data)
            text = data.get("text")
            self.prompts += text if isinstance(text, list) else [text] if text else []

        def generating(s: Any, sampling_params: Any) -> Any:
            prompt = s.text_
            answer, meta = generate(s, sampling_params)
            self.written.append(prompt + answer)
            return answer, meta

        backend._add_images, backend.generate = sending, generating


def run(
    url: str, name: str, inputs: Sequence[dict[str, str]], threads: int, ours: bool
) -> dict[str, Any]:
    backend = Endpoint(url) if ours else sgl.RuntimeEndpoint(url)
    asked = Requests(backend)
    httpx.post(f"{url}/flush_cache", timeout=60).raise_for_status()
    time.sleep(1)
    before = cached_tokens(url)
    begin = time.monotonic()
    states = PROGRAMS[name][0].run_batch(
        [dict(one) for one in inputs], **GREEDY, backend=backend, num_threads=threads
    )
    seconds = time.monotonic() - begin
    return {
        "seconds": round(seconds, 1),
        "failed": [str(state.error()) for state in states if state.error() is not None],
        "cached_tokens": cached_tokens(url) - before,
        "asked": asked,
        "texts": {
            (one["document"], one["question"]): state.text()
            for one, state in zip(inputs, states, strict=True)
        },
    }


def cached_tokens(url: str) -> int:
    """Prompt tokens that the server has found in its cache so far, of all requests."""
    lines = httpx.get(f"{url}/metrics", timeout=60).raise_for_status().text.splitlines()
    found = [line for line in lines if line.startswith("sglang:cached_tokens_total{")]
    return sum(int(float(line.rpartition(" ")[2])) for line in found)


def judged(result: dict[str, Any]) -> dict[str, Any]:
    """With shares of the prompt tokens that came out of the cache, and that could have."""
    folder = Path(resolve_model_path(MODEL))
    encode = Tokenizer.from_file(str(folder / "tokenizer.json")).encode
    asked = result.pop("asked")
    prompts = [encode(text).ids for text in asked.prompts]
    written = [encode(text).ids[:-1] for text in asked.written]
    total = sum(map(len, prompts))
    # With a cache without end: a prompt finds all that any prompt or text before it begins with,
    # but its last token is always computed. The longer ones come later, whatever the order.
    known: dict[int, Any] = {}
    computed = 0
    for ids, is_prompt in sorted(
        [*((ids, True) for ids in prompts), *((ids, False) for ids in written)],
        key=lambda one: len(one[0]),
    ):
        node, fresh = known, 0
        for token in ids:
            fresh += token not in node
            node = node.setdefault(token, {})
        computed += max(fresh, 1) if is_prompt else 0
    best = 1 - computed / total
    cached = result["cached_tokens"] / total
    return {
        **result,
        "prompt_tokens": total,
        "cached_share": round(cached, 4),
        "best_share": round(best, 4),
        "cached_of_best": round(cached / best, 4),
    }


def compared(url: str, name: str, options: argparse.Namespace) -> dict[str, Any]:
    in_order = inputs_of(options.documents, PROGRAMS[name][1])
    shuffled = random.Random(7).sample(in_order, len(in_order))
    paths = {
        "unmodified, shuffled": (shuffled, False),
        "planned, shuffled": (shuffled, True),
        "unmodified, sorted": (in_order, False),
    }
    results: dict[str, dict[str, Any]] = {}
    reference: dict[Any, str] = {}
    for path, (inputs, ours) in paths.items():
        result = run(url, name, inputs, options.threads, ours)
        texts = result.pop("texts")
        reference = reference or texts
        result["equal_texts"] = sum(texts[key] == text for key, text in reference.items())
        results[path] = judged(result)
        print(f"{name}, {path}: {results[path]}", flush=True)
    seconds = {path: result["seconds"] for path, result in results.items()}
    return {
        "programs": len(in_order),
        "paths": results,
        **{
            f"speedup_over_{order}": round(
                seconds[f"unmodified, {order}"] / seconds["planned, shuffled"], 2
            )
            for order in ("shuffled", "sorted")
        },
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--documents", type=int, default=18)
    parser.add_argument("--threads", type=int, default=32)
    parser.add_argument("--kv-tokens", type=int, default=4096)
    parser.add_argument("--programs", nargs="+", choices=PROGRAMS, default=list(PROGRAMS))
    parser.add_argument("--output", type=Path)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        port = free_port()
        command = [sys.executable, "-m", "blendserve", "serve", "--port", str(port)]
        command += ["--model-path", MODEL, "--max-total-tokens", str(options.kv_tokens)]
        command += ["--enable-metrics", "--dtype", "float32", "--batch-dir", f"{folder}/batches"]
        with running_server(command, port, Path(folder) / "server.log") as url:
            results = {name: compared(url, name, options) for name in options.programs}
    if options.output is not None:
        settings = {"threads": options.threads, "kv_tokens": options.kv_tokens, "model": MODEL}
        save(options.output, {**settings, "results": results})


if __name__ == "__main__":
    main()
