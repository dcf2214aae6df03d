"""Generated requests to every route: always an answer of the contract, never a 5xx.

benchmark/batch/fuzz_api.py does the same with schemathesis and thousands of requests.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from batch_fakes import CHAT, FakeExecutor
from fastapi import FastAPI
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from starlette.testclient import TestClient

from blendserve.batch import BatchService, BatchStore, build_router

JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(), inner, max_size=3),
    max_leaves=8,
)
CREATE = st.fixed_dictionaries(
    {},
    optional={
        "input_file_id": st.text() | JSON,
        "endpoint": st.just(CHAT) | JSON,
        "completion_window": st.just("24h") | st.text() | JSON,
        "metadata": st.dictionaries(st.text(), st.text(), max_size=3) | JSON,
        "output_expires_after": JSON,
        "reuse_results": JSON,
    },
)
ROUTES = st.sampled_from(
    [
        ("GET", "/v1/files"),
        ("GET", "/v1/files/{}"),
        ("DELETE", "/v1/files/{}"),
        ("GET", "/v1/files/{}/content"),
        ("GET", "/v1/batches"),
        ("GET", "/v1/batches/{}"),
        ("POST", "/v1/batches/{}/cancel"),
        ("POST", "/v1/batches"),
        ("POST", "/v1/files"),
    ]
)
QUERY = st.dictionaries(
    st.sampled_from(["after", "limit", "order", "purpose"]), st.text(max_size=12), max_size=3
)


@pytest.fixture(scope="module")
def client(tmp_path_factory: pytest.TempPathFactory) -> Iterator[TestClient]:
    store = BatchStore(tmp_path_factory.mktemp("fuzz"))
    app = FastAPI()
    app.include_router(build_router(BatchService(store, FakeExecutor())))
    with TestClient(app, raise_server_exceptions=False) as running:
        yield running
    store.close()


@settings(
    max_examples=150,
    deadline=None,
    derandomize=True,
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.function_scoped_fixture],
)
@given(route=ROUTES, identifier=st.text(min_size=1, max_size=40), query=QUERY, body=CREATE | JSON)
def test_a_client_is_always_told_what_is_wrong(
    client: TestClient, route: tuple[str, str], identifier: str, query: dict[str, str], body: Any
) -> None:
    method, path = route
    quoted = "".join(f"%{byte:02x}" for byte in identifier.encode("utf-8", "replace"))
    content = json.dumps(body).encode("utf-8", "surrogatepass") if method == "POST" else None
    answer = client.request(
        method,
        path.format(quoted),
        params={name: text.encode("utf-8", "replace") for name, text in query.items()},
        content=content,
        headers={"Content-Type": "application/json"} if content else None,
    )
    assert answer.status_code < 500, (route, identifier, query, body)
    if answer.status_code >= 400 and answer.headers["content-type"] == "application/json":
        assert answer.json().keys() & {"error", "detail"}


def test_the_description_of_the_routes_is_whole(client: TestClient, tmp_path: Path) -> None:
    described = client.get("/openapi.json").json()
    assert len(described["paths"]) == 7
    create = described["components"]["schemas"]["CreateBatch"]["properties"]
    assert CHAT in create["endpoint"]["enum"]
