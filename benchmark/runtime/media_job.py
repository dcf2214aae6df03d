"""What the plan makes of a job of questions about pictures; its answers beside stock SGLang's.

    python benchmark/runtime/media_job.py --json benchmark/results/media-job.json

40 pictures of 448 x 448 pixels, 8 questions about each, in random order, with a KV pool of 4,096
tokens, on tiny models. Shares are of the prompt tokens that a depth-first order finds in an endless
cache. Takes two to four minutes a family.
"""

from __future__ import annotations

import argparse
import random
import sys
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1]))

import record
from media_lines import (
    chat_line,
    image_part,
    model_folder,
    picture,
    run_job,
    server,
    stock_answers,
    text_part,
    usage,
)

PICTURES, QUESTIONS, POOL_TOKENS = 40, 8, 4096
SIDE = 448  # 32 x 32 patches of 14 pixels, of which four make a token.


def lines(seed: int) -> list[dict[str, Any]]:
    made = []
    for number in range(PICTURES):
        image = image_part(picture(SIDE, SIDE, seed=number))
        for question in range(QUESTIONS):
            text = text_part(f"Question {question}: what is in column {question % 4}, and why?")
            made.append(chat_line(f"{number}-{question}", [image, text], 8))
    random.Random(seed).shuffle(made)
    return made


def measure(family: str) -> dict[str, Any]:
    job = lines(0)
    with model_folder(family) as folder:
        with server(folder, POOL_TOKENS) as url:
            run = run_job(url, job)
        with server(folder, POOL_TOKENS, stock=True) as url:
            stock = stock_answers(url, job)
    prompt, cached = (sum(kind) for kind in zip(*map(usage, run["answers"].values()), strict=True))
    said = {
        name: line["response"]["body"]["choices"][0]["message"]["content"]
        for name, line in run["answers"].items()
    }
    stock_cached = sum(body["cached"] for body in stock.values())
    return {
        "family": family,
        "lines": len(job),
        "answered": len(said),
        "prompt_tokens": prompt,
        "planned_tokens": run["planned_tokens"],
        "best_sharing": run["best_sharing"],
        "planned_sharing": run["planned_sharing"],
        "cached_share": cached / prompt,
        "cached_of_best": cached / prompt / run["best_sharing"],
        "stock_cached_of_best": stock_cached / prompt / run["best_sharing"],
        "equal_answers": sum(stock[name]["text"] == text for name, text in said.items()),
        "seconds": run["seconds"],
    }


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--families", nargs="*", default=["qwen2-vl", "qwen3-vl", "gemma3"])
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    found = []
    for family in options.families:
        found.append(measure(family))
        print(found[-1], flush=True)
    if options.json:
        record.save(options.json, {"pool_tokens": POOL_TOKENS, "jobs": found})
    good = all(
        one["cached_of_best"] >= 0.99
        and one["planned_tokens"] == one["prompt_tokens"]
        and one["equal_answers"] == one["lines"]
        for one in found
    )
    return 0 if good else 1


if __name__ == "__main__":
    sys.exit(main())
