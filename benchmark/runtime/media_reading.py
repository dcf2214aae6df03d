"""How fast lines with pictures are read for planning, and with how much memory.

    python benchmark/runtime/media_reading.py --json benchmark/results/media-reading.json

5,000 lines with a photo of about 100 KB each, all different, of 64 sizes: from the bytes of a line
to the tokens and the identity of its picture, with a tiny Qwen2-VL's processor and no engine.
"""

from __future__ import annotations

import argparse
import base64
import io
import sys
import tempfile
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))

import numpy as np
import orjson
import record
from media_lines import chat_line, image_part, text_part, tiny_vlm
from PIL import Image

from blendserve.batch.line_parser import read_entry
from blendserve.runtime.media_model import MediaModel

LINES, SIZES = 5000, 64


def photo(width: int, height: int) -> bytes:
    """Coarse noise: as large as a JPEG of a photo of that size."""
    coarse = np.random.default_rng(width).integers(0, 255, (height // 3, width // 3, 3))
    image = Image.fromarray(coarse.astype(np.uint8)).resize((width, height))
    stream = io.BytesIO()
    image.save(stream, "JPEG", quality=85)
    return stream.getvalue()


def resident_bytes() -> int:
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * 4096


def measure() -> dict[str, float]:
    photos = [photo(600 + 4 * k, 450 + 2 * k) for k in range(SIZES)]
    with tempfile.TemporaryDirectory() as folder:
        model = MediaModel(str(tiny_vlm.build("qwen2-vl", Path(folder) / "vlm", weights=False)))

        def line(number: int) -> bytes:
            # Behind the end of a JPEG bytes have no meaning, but they make it another picture.
            content = photos[number % SIZES] + number.to_bytes(4, "big")
            url = "data:image/jpeg;base64," + base64.b64encode(content).decode()
            parts = [image_part(url), text_part(f"Question {number}?")]
            return orjson.dumps(chat_line(str(number), parts, 8))

        read_seconds = first_seconds = 0.0
        tokens = line_bytes = early = 0
        for number in range(LINES):
            data = line(number)
            started = time.perf_counter()
            ids, _ = model.read(read_entry(data).fields["body"]["messages"], None)
            passed = time.perf_counter() - started
            tokens, line_bytes = tokens + len(ids), line_bytes + len(data)
            # A size that comes for the first time is learnt.
            if number < SIZES:
                first_seconds += passed
            else:
                read_seconds += passed
            if number == LINES // 5:
                early = resident_bytes()
        late = resident_bytes()
        model.close()
    return {
        "lines": LINES,
        "mean_line_bytes": line_bytes // LINES,
        "mean_prompt_tokens": tokens // LINES,
        "lines_per_second": round((LINES - SIZES) / read_seconds, 1),
        "seconds_to_learn_a_size": round(first_seconds / SIZES, 4),
        "resident_megabytes_after_a_fifth": round(early / 1e6, 1),
        "resident_megabytes_at_the_end": round(late / 1e6, 1),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    found = measure()
    print(found)
    if options.json:
        record.save(options.json, found)


if __name__ == "__main__":
    main()
