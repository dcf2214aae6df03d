"""Clients that other people wrote, unmodified, against `blendserve serve` on a tiny model.

    python test/clients/run_clients.py [--log FILE]       # or: make test-clients

They have an environment of their own (.venv/clients, requirements/clients.txt). Each is a process
of its own; its answers must be those of a bare HTTP request. The status is 1 if any differs.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path

import httpx

sys.path.insert(0, str(Path(__file__).parents[1] / "end_to_end"))

import tiny_model
from client_checks import CHECKS, TOKENS, messages

from blendserve.cli.server_process import free_port, running_server

ROOT = Path(__file__).parents[2]
PYTHON = ROOT / ".venv" / "clients" / "bin" / "python"
MODEL = "tiny"
QUESTIONS = ("What is a river?", "Name three stones.", "Is paper older than glass?", "Why green?")
# Greedy answers of float32 do not depend on what runs beside them.
FLAGS = ("--device", "cpu", "--dtype", "float32", "--mem-fraction-static", "0.1")
FLAGS += ("--max-total-tokens", "4000", "--served-model-name", MODEL, "--sleep-on-idle")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--log", type=Path, help="also write what is printed to this file")
    parser.add_argument("--only", nargs="*", choices=list(CHECKS), default=list(CHECKS))
    options = parser.parse_args()
    os.environ.setdefault("OMP_WAIT_POLICY", "passive")
    said: list[str] = []
    failed = 0
    with tempfile.TemporaryDirectory(prefix="blendserve-clients-") as name:
        folder, port = Path(name), free_port()
        model = tiny_model.build(folder / "model")
        command = [sys.executable, "-m", "blendserve", "serve", "--model-path", str(model), *FLAGS]
        command += ["--batch-dir", str(folder / "batches"), "--port", str(port)]
        with running_server(command, port, folder / "server.log") as url:
            expected = folder / "expected.json"
            expected.write_text(json.dumps({asked: answer(url, asked) for asked in QUESTIONS}))
            for client in options.only:
                wrong, line = check(client, f"{url}/v1", expected)
                failed += wrong
                print(line, flush=True)
                said.append(line)
    said.append(f"{len(options.only) - failed} passed, {failed} failed")
    print(said[-1])
    if options.log:
        options.log.write_text("\n".join(said) + "\n")
    return 1 if failed else 0


def answer(url: str, question: str) -> str:
    body = {
        "model": MODEL,
        "messages": messages(question),
        "temperature": 0,
        "max_tokens": TOKENS,
    }
    got = httpx.post(f"{url}/v1/chat/completions", json=body, timeout=300, trust_env=False)
    return str(got.raise_for_status().json()["choices"][0]["message"]["content"])


def check(client: str, url: str, expected: Path) -> tuple[bool, str]:
    """Whether it failed, and a line that says so."""
    package = client.removesuffix("-batch")
    ask = f"import importlib.metadata as m; print(m.version({package!r}))"
    version = subprocess.run([str(PYTHON), "-c", ask], capture_output=True, text=True).stdout
    checks = Path(__file__).with_name("client_checks.py")
    command = [str(PYTHON), str(checks), client, url, MODEL, str(expected)]
    environment = {**os.environ, "NO_PROXY": "127.0.0.1", "LITELLM_LOCAL_MODEL_COST_MAP": "True"}
    environment.pop("PYTHONPATH", None)
    head = f"{client} ({version.strip()}): "
    try:
        done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=400)
    except subprocess.TimeoutExpired:
        return True, head + "FAILED: not done after 400 s"
    if done.returncode:
        return True, head + "FAILED: " + done.stderr.strip()[-1500:]
    return False, head + done.stdout.strip().splitlines()[-1]


if __name__ == "__main__":
    sys.exit(main())
