"""Two data-parallel replicas behind one server: both work on a job."""

from __future__ import annotations

import os
from collections.abc import Iterator

import httpx
import pytest
from conftest import MODEL_NAME, Server, blend_command
from jobs import finish, results, submit

from blendserve.cli.server_process import free_port, running_server


@pytest.fixture(scope="module")
def replicas(model: str, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    port, folder = free_port(), tmp_path_factory.mktemp("replicas")
    command = [*blend_command(model, port, folder / "batches"), "--dp-size", "2"]
    # SGLang wants to be told which cores a replica has, where there are fewer NUMA nodes.
    cores = {"SGLANG_CPU_OMP_THREADS_BIND": f"0|{(os.cpu_count() or 1) - 1}"}
    with running_server(command, port, folder / "server.log", cores) as url:
        yield Server(url, folder / "batches")


def test_both_replicas_take_requests_of_a_job(replicas: Server) -> None:
    lines = [
        {
            "custom_id": f"{k}",
            "method": "POST",
            "url": "/v1/completions",
            "body": {
                "model": MODEL_NAME,
                "prompt": f"Group {k % 4}: " + "the same words again and again " * 8 + f"{k}",
                "max_tokens": 2 if k % 2 else 40,
                "temperature": 0,
                "ignore_eos": True,
            },
        }
        for k in range(48)
    ]
    batch = finish(replicas.client, submit(replicas.client, lines, "/v1/completions"))
    answers = results(replicas.client, batch.output_file_id)
    tokens = {
        k: line["response"]["body"]["usage"]["completion_tokens"] for k, line in answers.items()
    }
    assert tokens == {f"{k}": 2 if k % 2 else 40 for k in range(48)}
    schedulers = httpx.get(f"{replicas.url}/blendserve/status").json()["schedulers"]
    assert sorted(report["dp_rank"] for report in schedulers) == [0, 1]
    assert all(sum(report["taken"].values()) > 10 for report in schedulers)
    assert sum(sum(report["taken"].values()) for report in schedulers) == 48
    assert not any(sum(report["running"].values()) for report in schedulers)
