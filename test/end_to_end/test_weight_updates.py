"""Weights that were packed for the CPU can be read and replaced while the engine runs."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import httpx
import pytest
import tiny_model
from conftest import Server

pytestmark = pytest.mark.skipif(
    "END_TO_END_MODEL" in os.environ, reason="other weights of a real model are not at hand"
)


def answer(server: Server) -> list[int]:
    request = {"text": "The weather", "sampling_params": {"temperature": 0, "max_new_tokens": 12}}
    response = httpx.post(f"{server.url}/generate", json=request, timeout=300)
    return list(response.raise_for_status().json()["output_ids"])


def update(server: Server, folder: str) -> dict[str, Any]:
    request = {"model_path": folder}
    response = httpx.post(f"{server.url}/update_weights_from_disk", json=request, timeout=300)
    return dict(response.json())


def weight(server: Server, name: str) -> Any:
    request = {"name": name, "truncate_size": 3}
    response = httpx.post(f"{server.url}/get_weights_by_name", json=request, timeout=300)
    return response.raise_for_status().json()


def test_an_engine_answers_by_the_weights_that_it_was_given_last(
    stock: Server, blend: Server, model: str, tmp_path: Path
) -> None:
    others = str(tiny_model.build(tmp_path / "others", seed=1))
    before = answer(blend)
    try:
        assert update(blend, others)["success"]
        assert update(stock, others)["success"]
        changed = answer(blend)
        assert changed != before
        assert changed == answer(stock)
        failed = update(blend, str(tmp_path))
        assert not failed["success"]
        assert answer(blend) == changed
    finally:
        for server in (blend, stock):
            update(server, model)
    assert answer(blend) == before


@pytest.mark.parametrize("name", ["q_proj", "o_proj"])
def test_the_weights_are_read_as_they_were_loaded(stock: Server, blend: Server, name: str) -> None:
    path = f"model.layers.1.self_attn.{name}.weight"
    assert weight(blend, path) == weight(stock, path)
