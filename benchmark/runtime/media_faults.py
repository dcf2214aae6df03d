"""Bad media on a real engine: each its own error line, and nothing else hurt.

    python benchmark/runtime/media_faults.py --json benchmark/results/media-faults.json

A job of good lines, then the same lines between bad and odd ones, on a tiny Qwen2-VL. The good ones
must be answered as before, by the same engine. Takes about a minute.
"""

from __future__ import annotations

import argparse
import base64
import io
import os
import struct
import sys
import tempfile
import zlib
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1]))

import httpx
import numpy as np
import record
from media_lines import (
    chat_line,
    image_part,
    model_folder,
    picture,
    run_job,
    server,
    text_part,
    video,
    video_part,
)
from PIL import Image

TEXT = text_part("What is it?")


def data_url(content: bytes, kind: str = "image/png") -> str:
    return f"data:{kind};base64," + base64.b64encode(content).decode()


def png(width: int, height: int, rows: bytes = b"") -> bytes:
    """A PNG with any size in its header."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        whole = kind + data
        return struct.pack(">I", len(data)) + whole + struct.pack(">I", zlib.crc32(whole))

    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    ends = chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(rows, 9)) + chunk(b"IEND", b"")
    return b"\x89PNG\r\n\x1a\n" + ends


def encoded(image: Image.Image, kind: str, **options: Any) -> bytes:
    stream = io.BytesIO()
    image.save(stream, kind, **options)
    return stream.getvalue()


def noise(side: int) -> Image.Image:
    pixels = np.random.default_rng(0).integers(0, 255, (side, side, 3), dtype=np.uint8)
    return Image.fromarray(pixels)


def bad(root: Path) -> dict[str, list[dict[str, Any]]]:
    """Parts of lines that must be refused, by name."""
    whole = encoded(noise(200), "PNG")
    turned = bytearray(whole)
    turned[len(whole) // 2 :: 7] = bytes(len(turned[len(whole) // 2 :: 7]))
    (root / "text.png").write_text("no picture")
    return {
        "corrupt": [image_part(data_url(bytes(turned)))],
        "truncated": [image_part(data_url(whole[: len(whole) // 2]))],
        "truncated-jpeg": [image_part(data_url(encoded(noise(200), "JPEG")[:3000]))],
        "no-picture": [image_part(data_url(b"hello"))],
        "empty": [image_part(data_url(b""))],
        "no-pixels": [image_part(data_url(png(0, 0)))],
        "100-megapixels": [image_part(data_url(png(10_000, 10_000)))],
        "real-100-megapixels": [image_part(data_url(png(10_000, 10_000, bytes(10_000 * 30_001))))],
        "bomb": [image_part(data_url(png(60_000, 60_000)))],
        "wrong-base64": [image_part("data:image/png;base64,@@@")],
        "late-wrong-base64": [image_part(data_url(whole)[:-400] + "!" * 400)],
        "no-base64": [image_part("data:image/png,abc")],
        "long-and-thin": [image_part(picture(3000, 3, seed=0))],
        "200-pictures": [image_part(picture(224, 224, seed=k)) for k in range(200)],
        "bad-after-good": [
            image_part(picture(60, 60, seed=0)),
            image_part(data_url(whole[:500])),
        ],
        "sound": [{"type": "audio_url", "audio_url": {"url": data_url(b"RIFF", "audio/wav")}}],
        "sound-inline": [
            {"type": "input_audio", "input_audio": {"data": "UklGRg==", "format": "wav"}}
        ],
        "bad-video": [video_part(data_url(b"hello", "video/mp4"))],
        "missing-file": [image_part((root / "missing.png").as_uri())],
        "no-picture-file": [image_part((root / "text.png").as_uri())],
        "file-elsewhere": [image_part("file:///etc/hostname")],
        "web": [image_part("https://media.example/cat.png")],
    }


def odd(root: Path) -> dict[str, list[dict[str, Any]]]:
    """Parts of lines that must be answered, by name."""
    image = noise(90)
    frames = [noise(40), noise(50).resize((40, 40)), noise(60).resize((40, 40))]
    (root / "some cats").mkdir()
    (root / "some cats" / "1.png").write_bytes(encoded(image, "PNG"))
    sixteen = Image.fromarray(np.arange(8100, dtype=np.uint16).reshape(90, 90))
    gif = encoded(frames[0], "GIF", save_all=True, append_images=frames[1:])
    return {
        "animated-gif": [image_part(data_url(gif))],
        "cmyk": [image_part(data_url(encoded(image.convert("CMYK"), "JPEG")))],
        "16-bit": [image_part(data_url(encoded(sixteen, "PNG")))],
        "palette": [image_part(data_url(encoded(image.convert("P"), "PNG")))],
        "alpha": [image_part(data_url(encoded(image.convert("RGBA"), "PNG")))],
        "one-bit": [image_part(data_url(encoded(image.convert("1"), "PNG")))],
        "webp": [image_part(data_url(encoded(image, "WEBP")))],
        "wrong-type": [image_part(data_url(encoded(image, "JPEG"), "image/png"))],
        "one-pixel": [image_part(picture(1, 1, seed=0))],
        "file": [image_part((root / "some cats" / "1.png").as_uri())],
        "video": [video_part(video(64, 48, 12, seed=0))],
    }


def check() -> dict[str, Any]:
    good = [
        chat_line(f"good-{k}", [image_part(picture(100 + k, 90, seed=k % 5)), TEXT], 6)
        for k in range(40)
    ]
    with tempfile.TemporaryDirectory() as folder, model_folder("qwen2-vl") as model:
        root = Path(folder).resolve()
        os.environ["BLENDSERVE_MEDIA_ROOT"] = str(root)
        refused, taken = bad(root), odd(root)
        others = [chat_line(name, [*parts, TEXT], 6) for name, parts in (refused | taken).items()]
        mixed = [line for pair in zip(good, others, strict=False) for line in pair]
        mixed += good[len(others) :]
        with server(model, 16384) as url:
            before = run_job(url, good)
            after = run_job(url, mixed)
            engine = httpx.get(f"{url}/blendserve/status", timeout=60).json()["engine"]
    said = {name: line.get("error") or line["response"] for name, line in after["errors"].items()}
    return {
        "lines": len(mixed),
        "wrongly_answered": sorted(set(refused) & set(after["answers"])),
        "wrongly_refused": sorted(set(after["errors"]) - set(refused)),
        "changed_answers": sorted(
            line["custom_id"]
            for line in good
            if text_of(before, line["custom_id"]) != text_of(after, line["custom_id"])
        ),
        "not_400": sorted(name for name, one in said.items() if one.get("status_code") != 400),
        "engine_restarts": engine.get("restarts"),
        "messages": {name: message(one) for name, one in sorted(said.items())},
    }


def text_of(result: dict[str, Any], name: str) -> Any:
    return result["answers"][name]["response"]["body"]["choices"][0]["message"]["content"]


def message(fault: dict[str, Any]) -> Any:
    body = fault.get("body", fault)
    return (body.get("error", body)).get("message", body)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    found = check()
    for name, value in found.items():
        print(f"{name}: {value}")
    if options.json:
        record.save(options.json, found)
    faults = ("wrongly_answered", "wrongly_refused", "changed_answers", "not_400")
    return 1 if any(found[name] for name in (*faults, "engine_restarts")) else 0


if __name__ == "__main__":
    sys.exit(main())
