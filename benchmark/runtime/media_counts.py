"""Are the tokens of prompts with pictures that are planned the ones that the engine counts?

    python benchmark/runtime/media_counts.py --json benchmark/results/media-counts.json

On a tiny model of each family: 30 sizes of pictures, one to three in a prompt, the text before,
between or behind them; and videos, where the model takes them. Each line's count by the reader of
`blendserve plan` is held against the usage in its answer, and the sum against what the server
planned. Takes about two minutes a family.
"""

from __future__ import annotations

import argparse
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
    text_part,
    tiny_vlm,
    usage,
    video,
    video_part,
)

from blendserve.runtime.media_model import MediaModel

# From less than a patch to more than the processors take, square, wide and high.
SIZES = (
    *((14, 14), (20, 31), (28, 28), (56, 56), (57, 55), (64, 200), (100, 100), (112, 112)),
    *((113, 111), (150, 40), (40, 150), (200, 200), (224, 224), (225, 223), (256, 256)),
    *((300, 200), (200, 300), (320, 240), (336, 336), (400, 100), (100, 400), (448, 448)),
    *((500, 333), (512, 512), (600, 30), (30, 600), (640, 480), (480, 640), (777, 555)),
    (900, 700),
)
# (width, height, frames)
VIDEOS = ((64, 48, 4), (64, 48, 12), (120, 90, 12), (64, 96, 31), (320, 180, 8), (400, 300, 20))
TEXT = "Which of them is it,\n and why? "


def lines() -> list[dict[str, Any]]:
    made = []
    for number, size in enumerate(SIZES):
        sizes = [size, SIZES[(number * 7 + 3) % 20], SIZES[(number * 11 + 5) % 20]]
        for count in (1, 2, 3):
            images = [
                image_part(picture(*one, seed=number * 3 + at))
                for at, one in enumerate(sizes[:count])
            ]
            text = text_part(TEXT + str(number))
            for place, parts in {
                "before": [text, *images],
                "between": [images[0], text, *images[1:], text],
                "behind": [*images, text],
            }.items():
                name = f"{size[0]}x{size[1]}-{count}-{place}"
                made.append(chat_line(name, parts, 1))
    return made


def video_lines() -> list[dict[str, Any]]:
    made = []
    for number, size in enumerate(VIDEOS):
        one, other = (video_part(video(*size, seed=number * 2 + k)) for k in range(2))
        image, text = image_part(picture(100, 60, seed=number)), text_part(TEXT)
        for place, parts in {
            "before": [text, one],
            "behind": [one, text],
            "two": [one, text, other],
            "mixed": [image, text, one, image],
        }.items():
            made.append(chat_line(f"video-{number}-{place}", parts, 1))
    return made


def check(family: str) -> dict[str, Any]:
    with model_folder(family) as folder:
        reader = MediaModel(folder)
        job = lines() + (video_lines() if family.startswith("qwen") else [])
        planned = {}
        for line in job:
            ids, _ = reader.read(line["body"]["messages"], None)
            planned[line["custom_id"]] = len(ids)
        reader.close()
        with server(folder, 16384) as url:
            result = run_job(url, job)
    counted = {name: usage(answer)[0] for name, answer in result["answers"].items()}
    return {
        "family": family,
        "lines": len(job),
        "answered": len(counted),
        "equal_lines": sum(counted.get(name) == tokens for name, tokens in planned.items()),
        "different": {
            name: [tokens, counted.get(name)]
            for name, tokens in planned.items()
            if counted.get(name) != tokens
        },
        "planned_tokens_of_the_reader": sum(planned.values()),
        "planned_tokens_of_the_server": result["planned_tokens"],
        "counted_tokens": sum(counted.values()),
        "seconds": result["seconds"],
    }


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--families", nargs="*", default=list(tiny_vlm.FAMILIES))
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    found = []
    for family in options.families:
        found.append(check(family))
        print(found[-1], flush=True)
    if options.json:
        record.save(options.json, {"sizes": SIZES, "videos": VIDEOS, "families": found})
    exact = all(
        one["equal_lines"] == one["lines"]
        and one["planned_tokens_of_the_server"] == one["counted_tokens"]
        for one in found
    )
    return 0 if exact else 1


if __name__ == "__main__":
    sys.exit(main())
