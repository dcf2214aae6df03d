"""Files of requests for the front's benchmarks; synthetic, and answered by a fake engine."""

from __future__ import annotations

import json
import random
from pathlib import Path

FAKE_ENGINE = Path(__file__).parents[2] / "test" / "batch" / "fake_engine.py"


def write_job(path: Path, lines: int, line_bytes: int) -> int:
    """Writes `lines` chat requests of about `line_bytes` bytes; the size of the file."""
    chance = random.Random(0)
    letters = "".join(chance.choices("abcdefghij klmnopqrst", k=line_bytes))
    with path.open("w") as file:
        for number in range(lines):
            start = number % max(line_bytes // 2, 1)
            prompt = f"say {number} {letters[start:]}{letters[:start]}"[: max(line_bytes - 190, 8)]
            body = {
                "model": "fake-model",
                "messages": [{"role": "user", "content": prompt}],
                "max_tokens": 8,
            }
            line = {
                "custom_id": f"request-{number}",
                "method": "POST",
                "url": "/v1/chat/completions",
                "body": body,
            }
            file.write(json.dumps(line) + "\n")
    return path.stat().st_size
