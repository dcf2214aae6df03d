"""schemathesis over our routes' OpenAPI: thousands of requests, no 5xx, no hang.

    pip install --no-deps --requirement requirements/reliability.txt
    python benchmark/batch/fuzz_api.py --requests 20000 --json benchmark/results/batch-fuzz.json

The routes stand behind what the front process has before them. Too slow for the tests: it takes
half an hour. A smaller fuzz of the same routes, by hypothesis alone, is in
test/batch/test_api_fuzz.py.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
import time
from collections import Counter
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import hypothesis
import schemathesis
from fastapi import FastAPI
from fastapi.responses import PlainTextResponse
from starlette.testclient import TestClient

sys.path.insert(0, str(Path(__file__).parents[1]))
sys.path.insert(0, str(Path(__file__).parents[2] / "test" / "batch"))

from batch_fakes import FakeExecutor, chat_line, jsonl
from record import save

from blendserve.batch import (
    BatchLimits,
    BatchService,
    BatchStore,
    KnownHosts,
    OriginGuard,
    OwnRoutes,
    build_router,
)

_SECONDS_PER_REQUEST = 10.0


def fuzz(
    operation: Any, client: TestClient, known: dict[str, str], requests: int, seed: int
) -> tuple[Counter[int], float]:
    """Statuses of generated requests to one route, half of them with real ids; the longest wait."""
    seen: Counter[int] = Counter()
    waits = [0.0]

    @hypothesis.seed(seed)
    @hypothesis.settings(
        max_examples=requests,
        deadline=None,
        database=None,
        phases=[hypothesis.Phase.generate],
        suppress_health_check=list(hypothesis.HealthCheck),
    )
    @hypothesis.given(case=operation.as_strategy(), use_known=hypothesis.strategies.booleans())
    def attempt(case: schemathesis.Case, use_known: bool) -> None:
        if use_known:
            for name in case.path_parameters or {}:
                case.path_parameters[name] = known[name]
            if isinstance(case.body, dict) and "input_file_id" in case.body:
                case.body["input_file_id"] = known["file_id"]
        began = time.monotonic()
        answer = case.call(session=client, base_url="http://testserver")
        waits.append(time.monotonic() - began)
        seen[answer.status_code] += 1
        assert answer.status_code < 500, (case.as_curl_command(), answer.text)
        if answer.status_code >= 400 and answer.status_code != 405:
            assert "message" in answer.json()["error"]

    attempt()
    return seen, max(waits)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--requests", type=int, default=2_000)
    parser.add_argument("--seed", type=int, default=6)
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    statuses: Counter[int] = Counter()
    by_route: dict[str, Counter[int]] = {}
    slowest = 0.0
    with tempfile.TemporaryDirectory() as name:
        store = BatchStore(name)
        service = BatchService(store, FakeExecutor(), BatchLimits(max_file_bytes=1_000_000))
        router = build_router(service)
        described = FastAPI()
        described.include_router(router)

        @asynccontextmanager
        async def life(_: FastAPI) -> AsyncIterator[None]:
            await service.start()
            yield
            await service.stop()

        own = OwnRoutes([router], rest=PlainTextResponse("elsewhere", 404), lifespan=life)
        app = OriginGuard(own, KnownHosts(["testserver"]))
        began = time.monotonic()
        with TestClient(app, raise_server_exceptions=False) as client:
            upload = {"file": ("a.jsonl", jsonl([chat_line("a")]))}
            file_id = client.post("/v1/files", data={"purpose": "batch"}, files=upload).json()["id"]
            batch = {
                "input_file_id": file_id,
                "endpoint": "/v1/chat/completions",
                "completion_window": "24h",
            }
            batch_id = client.post("/v1/batches", json=batch).json()["id"]
            schema = schemathesis.openapi.from_asgi("/openapi.json", described)
            operations = [result.ok() for result in schema.get_all_operations()]
            # What removes the known file comes last.
            operations.sort(key=lambda operation: operation.method == "delete")
            each = -(-options.requests // len(operations))
            known = {"file_id": file_id, "batch_id": batch_id}
            for operation in operations:
                route = f"{operation.method.upper()} {operation.path}"
                seen, longest = fuzz(operation, client, known, each, options.seed)
                by_route[route] = seen
                statuses += seen
                slowest = max(slowest, longest)
                print(route, dict(seen), flush=True)
        store.close()
    result = {
        "requests": statuses.total(),
        "statuses": {str(status): count for status, count in sorted(statuses.items())},
        "routes": {route: dict(seen) for route, seen in by_route.items()},
        "slowest_seconds": slowest,
        "seconds": round(time.monotonic() - began),
        "seed": options.seed,
        "schemathesis": schemathesis.__version__,
    }
    print(json.dumps(result, indent=2))
    assert statuses.total() >= options.requests
    assert slowest < _SECONDS_PER_REQUEST
    if options.json:
        save(options.json, result)


if __name__ == "__main__":
    main()
