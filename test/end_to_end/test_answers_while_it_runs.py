"""On the real engine: a batch followed from the shell while it runs; a machine measured."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import httpx
from conftest import ENGINE_FLAGS, MODEL_NAME, Server
from jobs import jsonl, mixed_requests

TOOL = {"type": "function", "function": {"name": "f", "parameters": {"type": "object"}}}


def blendserve(*arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "blendserve", *arguments],
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )


def chat_lines() -> list[dict[str, Any]]:
    return [line for line in mixed_requests(MODEL_NAME) if "messages" in line["body"]]


def test_a_batch_from_its_file_to_its_answers_without_curl(blend: Server, tmp_path: Path) -> None:
    lines = chat_lines()
    forced = lines[2]["body"]
    forced |= {"tools": [TOOL], "tool_choice": "required"}
    source = tmp_path / "in.jsonl"
    source.write_bytes(jsonl(lines))
    made = blendserve("batches", "create", str(source), "--url", blend.url)
    assert made.returncode == 0, made.stderr
    batch_id = made.stdout.strip()
    followed = blendserve("batches", "download", batch_id, "--follow", "--url", blend.url)
    assert followed.returncode == 0, followed.stderr
    batch = blend.client.batches.retrieve(batch_id)
    assert batch.output_file_id is not None
    assert followed.stdout == blend.client.files.content(batch.output_file_id).text
    answered = {json.loads(line)["custom_id"] for line in followed.stdout.splitlines()}
    assert answered == {line["custom_id"] for line in lines} - {lines[2]["custom_id"]}
    errors = blendserve("batches", "errors", batch_id, "--url", blend.url)
    assert errors.returncode == 1
    assert "tool_choice forces a tool call" in errors.stdout


def test_a_job_tells_the_course_of_what_is_left(blend: Server, tmp_path: Path) -> None:
    lines = chat_lines()
    for line in lines:
        line["body"] |= {"max_tokens": 120, "ignore_eos": True}
    source = tmp_path / "in.jsonl"
    source.write_bytes(jsonl(lines))
    batch_id = blendserve("batches", "create", str(source), "--url", blend.url).stdout.strip()
    courses = []
    while blend.client.batches.retrieve(batch_id).status in ("validating", "in_progress"):
        jobs = httpx.get(f"{blend.url}/blendserve/status", timeout=60).json()["jobs"]
        courses += [job["curve"] for job in jobs if job["curve"]]
    ended = blend.client.batches.retrieve(batch_id)
    assert ended.request_counts is not None
    assert ended.request_counts.completed == len(lines)
    assert courses, "a plan says how it will go on"
    assert all(course["seconds"][-1] > 0 for course in courses)


def test_a_machine_is_measured_and_plans_take_it(model: str, tmp_path: Path) -> None:
    hardware = tmp_path / "this.json"
    flags = ("--model-path", model, *ENGINE_FLAGS)
    run = blendserve("calibrate", "-o", str(hardware), *flags)
    assert run.returncode == 0, run.stderr
    [steps] = json.loads(hardware.read_text())["steps"]
    assert steps["token_seconds"] > 0
    assert steps["steps"] >= 20
    job = tmp_path / "job.jsonl"
    job.write_text('{"id": "a", "input_ids": [1, 2, 3], "output_len": 5}\n')
    plan = blendserve(
        *("plan", "-i", str(job), "--model-spec", model, "--hardware", str(hardware), "--json"),
        *("--kv-tokens", "3000"),
    )
    assert plan.returncode == 0, plan.stderr
    assert "steps of an engine, measured with" in json.loads(plan.stdout)["costs"]
    assert "nobody has measured" not in plan.stderr
