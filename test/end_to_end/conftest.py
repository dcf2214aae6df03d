"""Engines for the end-to-end tests: one stock SGLang and one blended, started once a session."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest
import tiny_model
from openai import OpenAI

from blendserve.cli.server_process import free_port, running_server
from blendserve.runtime.default_model import resolve_model_path

MODEL_NAME = "test-model"
# A pool in which the sixty requests of the exactness test cannot all stay, and short chunks.
ENGINE_FLAGS = (
    *("--max-total-tokens", "3000", "--chunked-prefill-size", "256", "--enable-mixed-chunk"),
    *("--device", "cpu", "--dtype", "float32", "--mem-fraction-static", "0.1"),
    *("--served-model-name", MODEL_NAME, "--enable-cache-report", "--sleep-on-idle"),
)


# Threads that wait without spinning: several engines share few cores here.
os.environ.setdefault("OMP_WAIT_POLICY", "passive")


@dataclass
class Server:
    """A running server and the directory that its Batch API keeps."""

    url: str
    batch_dir: Path | None = None

    @property
    def client(self) -> OpenAI:
        return OpenAI(base_url=f"{self.url}/v1", api_key="unused", timeout=300, max_retries=0)


@pytest.fixture(scope="session")
def model(tmp_path_factory: pytest.TempPathFactory) -> str:
    named = os.environ.get("END_TO_END_MODEL")
    if named:
        return resolve_model_path(named)
    return str(tiny_model.build(tmp_path_factory.mktemp("model") / "tiny"))


def stock_command(model: str, port: int) -> list[str]:
    launch = [sys.executable, "-m", "sglang.launch_server", "--model-path", model]
    return [*launch, *ENGINE_FLAGS, "--port", str(port)]


def blend_command(model: str, port: int, batch_dir: Path) -> list[str]:
    serve = [sys.executable, "-m", "blendserve", "serve", "--batch-dir", str(batch_dir)]
    return [*serve, "--model-path", model, *ENGINE_FLAGS, "--enable-metrics", "--port", str(port)]


@pytest.fixture(scope="session")
def stock(model: str, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """SGLang as it comes: the plugin is installed and stays off."""
    port = free_port()
    log = tmp_path_factory.mktemp("stock") / "server.log"
    with running_server(stock_command(model, port), port, log, {"BLENDSERVE_ENABLED": "0"}) as url:
        yield Server(url)


@pytest.fixture(scope="session")
def blend(model: str, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    port = free_port()
    folder = tmp_path_factory.mktemp("blend")
    command = blend_command(model, port, folder / "batches")
    with running_server(command, port, folder / "server.log") as url:
        yield Server(url, folder / "batches")
