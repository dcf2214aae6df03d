"""Embeddings, labels and scores as jobs of the real engine: planned, and the answers of online."""

from __future__ import annotations

import json
import os
import random
import subprocess
import sys
from pathlib import Path
from typing import Any

import httpx
import pytest
import tiny_model
import torch
from conftest import ENGINE_FLAGS, Server
from jobs import WORDS, finish, submit
from safetensors.torch import load_file, save_file

GROUPS, EACH = 12, 8


@pytest.fixture(scope="module")
def labeller(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tiny model with a head of three labels."""
    folder = tiny_model.build(tmp_path_factory.mktemp("labeller") / "tiny")
    config = json.loads((folder / "config.json").read_text())
    labels = {str(number): name for number, name in enumerate(("good", "bad", "odd"))}
    config |= {"architectures": ["LlamaForSequenceClassification"], "id2label": labels}
    (folder / "config.json").write_text(json.dumps(config))
    weights = load_file(folder / "model.safetensors")
    generator = torch.Generator().manual_seed(1)
    weights["score.weight"] = torch.randn(len(labels), tiny_model.HIDDEN, generator=generator)
    save_file(weights, folder / "model.safetensors", {"format": "pt"})
    return folder


def line(custom_id: str, url: str, **body: Any) -> dict[str, Any]:
    return {"custom_id": custom_id, "method": "POST", "url": url, "body": body}


def prefill_only_lines() -> list[dict[str, Any]]:
    """Labels and scores behind twelve prefixes of about 150 tokens, shuffled: far more than the
    pool of 1,000 tokens holds."""
    rng = random.Random(3)

    def words(count: int) -> str:
        return " ".join(rng.choice(WORDS) for _ in range(count))

    prefixes = [words(100) for _ in range(GROUPS)]
    found = []
    for group, prefix in enumerate(prefixes):
        for k in range(EACH):
            text = f"{prefix} {words(6)}"
            name = f"{group}-{k}"
            if k == 0:
                found.append(line(name, "/v1/score", query=f"{prefix} ", items=[words(4), "no"]))
            elif k == 1:
                found.append(line(name, "/v1/embeddings", input=[text, f"{prefix} {words(3)}"]))
            else:
                found.append(line(name, "/v1/classify", input=text))
    rng.shuffle(found)
    return found


def test_a_shuffled_job_of_labels_and_scores_fills_steps_in_the_order_of_its_prefixes(
    tmp_path: Path, labeller: Path
) -> None:
    lines = [*prefill_only_lines(), line("chat", "/v1/chat/completions", messages=[])]
    (tmp_path / "in.jsonl").write_text("".join(json.dumps(one) + "\n" for one in lines))
    trace = tmp_path / "trace.jsonl"
    run = subprocess.run(
        [
            *(sys.executable, "-m", "blendserve", "run-batch", "-i", "in.jsonl", "-o", "out.jsonl"),
            *("--json", "--model-path", str(labeller), *ENGINE_FLAGS),
            *("--max-total-tokens", "1000"),
        ],
        capture_output=True,
        text=True,
        timeout=480,
        check=False,
        cwd=tmp_path,
        env={**os.environ, "BLENDSERVE_TRACE_FILE": str(trace)},
    )
    assert run.returncode == 1, run.stderr[-3000:]
    results = [json.loads(each) for each in (tmp_path / "out.jsonl").read_bytes().splitlines()]
    assert len(results) == GROUPS * EACH
    bodies = {one["custom_id"]: one["response"]["body"] for one in results}
    assert {bodies["0-2"]["data"][0]["label"]} <= {"good", "bad", "odd"}
    assert [len(row) for row in bodies["0-0"]["scores"]] == [3, 3]
    assert len(bodies["0-1"]["data"]) == 2
    [error] = (tmp_path / "out.errors.jsonl").read_bytes().splitlines()
    assert json.loads(error)["response"]["body"]["error"]["code"] == "invalid_endpoint"
    steps = [json.loads(step) for step in trace.read_bytes().splitlines()]
    computed = sum(step["prefill_tokens"] for step in steps)
    asked = sum(body["usage"]["prompt_tokens"] for body in bodies.values())
    # Each prefix about once: nothing of it is computed for three of four lines.
    assert computed < 0.35 * asked
    # Not two of a group at a time: lines with several texts or items are several requests.
    assert len(steps) < GROUPS * (EACH + 2) / 2


def test_a_batch_of_scores_has_the_scores_of_online(blend: Server, model: str) -> None:
    bodies = [
        {
            "query": "The river was high. ",
            "items": [f"Stone {number}", "Nobody crossed it"],
            "label_token_ids": [20, 21],
            "apply_softmax": True,
        }
        for number in range(4)
    ]
    lines = [line(str(number), "/v1/score", **body) for number, body in enumerate(bodies)]
    batch = finish(blend.client, submit(blend.client, lines, "/v1/score"))
    assert batch.status == "completed"
    assert batch.output_file_id is not None
    content = blend.client.files.content(batch.output_file_id).text
    found = {one["custom_id"]: one for one in map(json.loads, content.splitlines())}
    for number, body in enumerate(bodies):
        online = httpx.post(f"{blend.url}/v1/score", json=body, timeout=60).json()
        answered = found[str(number)]["response"]["body"]["scores"]
        for row, other in zip(answered, online["scores"], strict=True):
            assert row == pytest.approx(other, abs=1e-4)


def test_an_endpoint_that_the_model_does_not_serve_is_refused(blend: Server) -> None:
    for url in ("/v1/classify", "/v1/rerank", "/score"):
        answer = httpx.post(
            f"{blend.url}/v1/batches",
            json={"input_file_id": "file-0", "endpoint": url, "completion_window": "24h"},
            timeout=60,
        )
        assert answer.status_code == 400
        assert "There is no endpoint" in answer.json()["error"]["message"]
        assert ("Did you mean '/v1/score'?" in answer.text) == (url == "/score")
