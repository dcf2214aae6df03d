"""The coordinator's port: to the front it is an engine's, to anybody else it is closed."""

from __future__ import annotations

import asyncio
import json
import socket
from contextlib import asynccontextmanager

import httpx
import pytest
import uvicorn
from cluster_fakes import MOST_SECONDS, FakeCluster, FakeEngine

from blendserve.batch import EngineAddress, EngineInfo, EngineUnavailable, RemoteExecutor
from blendserve.batch.lines import FileLineSource
from blendserve.cli.coordinator import build_app

TOKEN = "the-fronts-own-key"


@asynccontextmanager
async def coordinator(tmp_path, *engines):
    """The coordinator's address, over fake engines, and a client that has its key."""
    (tmp_path / "files").mkdir()
    ready = asyncio.Event()
    async with FakeCluster(engines) as cluster:
        app = build_app(cluster.executor, TOKEN, tmp_path, ready)
        with socket.socket() as listener:
            listener.bind(("127.0.0.1", 0))
            listener.listen(64)
            config = uvicorn.Config(app, log_level="critical", timeout_graceful_shutdown=0)
            server = uvicorn.Server(config)
            serve = asyncio.create_task(server._serve(sockets=[listener]))
            address = EngineAddress(f"http://127.0.0.1:{listener.getsockname()[1]}", TOKEN)
            async with httpx.AsyncClient(
                base_url=address.url, headers=address.headers, timeout=20, trust_env=False
            ) as client:
                yield cluster, client, address, ready
            server.should_exit = True
            await asyncio.wait([serve], timeout=10)


def test_it_is_closed_to_all_but_the_front_and_healthy_once_engines_are_there(tmp_path):
    async def scenario() -> None:
        async with coordinator(tmp_path, FakeEngine()) as (_, client, address, ready):
            async with httpx.AsyncClient(base_url=address.url, trust_env=False) as stranger:
                assert (await stranger.get("/health")).status_code == 503
                ready.set()
                assert (await stranger.get("/health")).status_code == 200
                for path in ("/blendserve/engine", "/blendserve/status", "/v1/models", "/metrics"):
                    assert (await stranger.get(path)).status_code == 401
                wrong = await stranger.get("/v1/models", headers={"Authorization": "Bearer no"})
                assert wrong.status_code == 401
            info = EngineInfo.model_validate_json((await client.get("/blendserve/engine")).content)
            assert info.fingerprint == "fake@1"
            assert info.endpoints == ["/v1/completions"]

    asyncio.run(scenario())


def test_online_requests_go_to_any_engine_and_what_steers_one_to_none(tmp_path):
    async def scenario() -> None:
        engines = FakeEngine(), FakeEngine()
        async with coordinator(tmp_path, *engines) as (cluster, client, _, _):
            body = {"prompt": [1, 2], "max_tokens": 40, "rid": "a"}
            answers = await asyncio.gather(
                *(client.post("/v1/completions", json={**body, "rid": str(n)}) for n in range(6))
            )
            assert [answer.status_code for answer in answers] == [200] * 6
            assert all(len(engine.heard) >= 2 for engine in engines)
            assert (await client.get("/v1/models")).json()["data"] == [{"id": "fake"}]
            steers = await client.post("/flush_cache")
            assert steers.status_code == 501
            assert "ask the engine itself" in steers.json()["error"]["message"]
            link = await client.post("/blendserve/link", json={})
            assert link.status_code == 501
            for wire in cluster.wires:
                wire.cut()
            await cluster.until(lambda: not cluster.executor.cluster.members)
            gone = await client.post("/v1/completions", json=body)
            assert (gone.status_code, gone.headers["retry-after"]) == (503, "5")

    asyncio.run(scenario())


def test_metrics_name_the_engines(tmp_path):
    async def scenario() -> None:
        async with coordinator(tmp_path, FakeEngine(), FakeEngine()) as (cluster, client, _, _):
            text = (await client.get("/metrics")).text
            assert 'blendserve_engines{state="up"} 2.0' in text
            url = cluster.wires[1].url
            assert f'blendserve_engine_lines_in_flight{{engine="{url}"}} 0.0' in text
            assert f'blendserve_running_requests{{dp_rank="0",engine="{url}",side="left"}}' in text

    asyncio.run(scenario())


def write_job(path, count):
    with path.open("w") as file:
        for n in range(count):
            body = {"prompt": [n % 5, *range(500, 540), 1_000 + n], "max_tokens": 3}
            line = {"custom_id": f"r{n}", "method": "POST", "url": "/v1/completions", "body": body}
            file.write(json.dumps(line) + "\n")


def test_a_job_of_the_front_runs_and_its_suspects_are_told(tmp_path):
    async def scenario() -> None:
        engines = [FakeEngine() for _ in range(3)]
        async with coordinator(tmp_path, *engines) as (cluster, client, address, _):
            path = tmp_path / "files" / "job"
            write_job(path, 120)
            looked = []
            remote = RemoteExecutor(on_lost=lambda: looked.append(True))
            info = EngineInfo.model_validate_json((await client.get("/blendserve/engine")).content)
            remote.engine_up(address, info)
            source = FileLineSource(path, 1 << 20)

            async def run(name):
                async with asyncio.timeout(MOST_SECONDS):
                    results = remote.run(name, source, range(120), lambda _: None)
                    return [result async for result in results]

            results = await run("one")
            assert sorted(result.index for result in results) == list(range(120))
            for engine in engines:
                engine.deadly = {1_000 + 33}
            with pytest.raises(EngineUnavailable, match="2 engines died") as told:
                await run("two")
            assert 33 in told.value.in_flight
            # Somebody looks whether there is an engine, finds one, and the job goes on.
            assert looked == [True]
            assert len(cluster.executor.cluster.members) == 1
            source.close()

    asyncio.run(scenario())
