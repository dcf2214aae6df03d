"""Our routes inside SGLang's server: its CORS rules and error shapes never reach them."""

from __future__ import annotations

from typing import Any

import pytest
from fastapi import APIRouter, FastAPI
from fastapi.middleware.cors import CORSMiddleware
from starlette.testclient import TestClient

from blendserve.batch import KnownHosts, build_health_router
from blendserve.runtime.http import _OwnFirst

EVIL = {"Origin": "http://evil.example"}


@pytest.fixture
def server() -> Any:
    started: list[str] = []
    app = FastAPI(on_startup=[lambda: started.append("sglang")])
    app.add_middleware(
        CORSMiddleware,
        allow_origins=["*"],
        allow_credentials=True,
        allow_methods=["*"],
        allow_headers=["*"],
    )

    @app.get("/v1/models")
    async def models() -> str:
        return "sglang's"

    ours = APIRouter()

    @ours.get("/v1/files")
    async def files() -> str:
        return "ours"

    routers = [ours, build_health_router(lambda: False)]
    app.add_middleware(_OwnFirst, routers=routers, hosts=KnownHosts())
    with TestClient(app, base_url="http://localhost") as client:
        assert started == ["sglang"], "its own start-up has run"
        yield client


def test_pages_of_other_origins_reach_none_of_our_routes(server: Any) -> None:
    asked = {**EVIL, "Access-Control-Request-Method": "DELETE"}
    for method, headers, status in (("OPTIONS", asked, 403), ("GET", EVIL, 200)):
        answer = server.request(method, "/v1/files", headers=headers)
        assert answer.status_code == status
        assert not [name for name in answer.headers if name.startswith("access-control-")]
    assert server.post("/v1/files", headers=EVIL).status_code == 403
    assert server.get("/v1/files", headers={"Host": "evil.example"}).status_code == 421


def test_the_rest_stays_sglangs(server: Any) -> None:
    answer = server.get("/v1/models", headers={**EVIL, "Host": "evil.example"})
    assert (answer.status_code, answer.json()) == (200, "sglang's")
    assert answer.headers["access-control-allow-origin"]
    assert server.get("/v1/file").json() == {"detail": "Not Found"}


def test_errors_of_our_prefixes_are_ours(server: Any) -> None:
    assert server.put("/v1/files").json()["error"]["code"] == "method_not_allowed"
    assert server.get("/blendserve/engine").json()["error"]["code"] == "not_found"
    assert server.get("/blendserve/live").status_code == 200
    assert server.get("/blendserve/ready").status_code == 503
