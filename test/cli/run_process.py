"""run-batch as a process of its own, over the batch tests' fake engine."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

FAKES = Path(__file__).parents[1] / "batch"
# What is started in the background of a shell ignores Ctrl-C, and so would its children.
COMMAND = """
import signal, sys
signal.signal(signal.SIGINT, signal.default_int_handler)
from blendserve.cli import main, offline_job
offline_job.ENGINE_COMMAND = (sys.executable, {engine!r}, *{options!r})
sys.exit(main(["run-batch", *sys.argv[1:]]))
"""


def lines(count: int, orders: dict[int, str] | None = None) -> list[dict[str, Any]]:
    return [
        {
            "custom_id": f"r{number}",
            "method": "POST",
            "url": "/v1/chat/completions",
            "body": {
                "model": "fake-model",
                "messages": [
                    {"role": "user", "content": (orders or {}).get(number, f"say {number}")}
                ],
            },
        }
        for number in range(count)
    ]


def jsonl(entries: list[dict[str, Any]]) -> bytes:
    return b"".join(json.dumps(entry).encode() + b"\n" for entry in entries)


class Run:
    """run-batch as a process of its own."""

    def __init__(
        self,
        folder: Path,
        *arguments: str,
        options: tuple[str, ...] = (),
        environment: Mapping[str, str] | None = None,
    ) -> None:
        code = COMMAND.format(engine=str(FAKES / "fake_engine.py"), options=options)
        self.process = subprocess.Popen(
            [
                *(sys.executable, "-c", code, "-o", str(folder / "out.jsonl")),
                *("--served-model-name", "fake-model", *arguments),
            ],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            env={
                **os.environ,
                "PYTHONPATH": os.pathsep.join(filter(None, sys.path)),
                **(environment or {}),
            },
        )

    def until_it_says(self, text: str) -> None:
        """Reads what it prints for eyes, up to a line with this text."""
        assert self.process.stderr is not None
        for line in self.process.stderr:
            if text in line.decode():
                return
        raise AssertionError(f"it ended without {text!r}")

    def until_answers(self, path: Path, count: int) -> None:
        """Waits until a file has so many lines."""
        deadline = time.monotonic() + 60
        while not path.exists() or len(path.read_bytes().splitlines()) < count:
            assert time.monotonic() < deadline
            assert self.process.poll() is None, self.end()
            time.sleep(0.01)

    def end(self, stdin: bytes = b"") -> int:
        out, said = self.process.communicate(stdin, timeout=60)
        self.out, self.said = out.decode(), said.decode()
        return self.process.returncode


def ids(path: Path) -> list[str]:
    return [json.loads(line)["custom_id"] for line in path.read_bytes().splitlines()]


def ids_of_whole_lines(path: Path) -> list[str]:
    whole = path.read_bytes().rpartition(b"\n")[0]
    return [json.loads(line)["custom_id"] for line in whole.splitlines()]
