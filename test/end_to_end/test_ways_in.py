"""The other ways in: a frontend program, a file offline, and command lines that are wrong."""

from __future__ import annotations

import json
import runpy
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest
from conftest import ENGINE_FLAGS, MODEL_NAME, Server
from jobs import finish, jsonl, mixed_requests, results, submit
from openai.types.responses import Response

EXAMPLES = Path(__file__).parents[2] / "examples"


def blendserve(*arguments: str) -> subprocess.CompletedProcess[str]:
    # The default batch directory lies in the current folder.
    with tempfile.TemporaryDirectory() as folder:
        return subprocess.run(
            [sys.executable, "-m", "blendserve", *arguments],
            capture_output=True,
            text=True,
            timeout=240,
            check=False,
            cwd=folder,
        )


def tail(log: Path, lines: int = 40) -> str:
    """The end of a server's log, long lines cut."""
    return "\n".join(line[:300] for line in log.read_text(errors="replace").splitlines()[-lines:])


def test_a_frontend_program_runs_unmodified(blend: Server) -> None:
    program = runpy.run_path(str(EXAMPLES / "frontend_program.py"))
    assert program["main"](blend.url) == 0


def test_run_batch_answers_a_file_and_reports_failed_lines(model: str, tmp_path: Path) -> None:
    lines = [line for line in mixed_requests(MODEL_NAME) if "messages" in line["body"]][:12]
    lines[3]["body"]["temperature"] = "warm"
    source, output = tmp_path / "in.jsonl", tmp_path / "out.jsonl"
    source.write_bytes(jsonl(lines))
    try:
        run = blendserve(
            *("run-batch", "-i", str(source), "-o", str(output), "--model-path", model),
            *ENGINE_FLAGS,
        )
    except subprocess.TimeoutExpired:
        log = tmp_path / "out.jsonl.blendserve" / "server.log"
        pytest.fail("no end; the server's log ends:\n" + tail(log))
    assert run.returncode == 1, run.stderr
    answered = [json.loads(line)["custom_id"] for line in output.open()]
    failed = [json.loads(line)["custom_id"] for line in (tmp_path / "out.errors.jsonl").open()]
    assert failed == [lines[3]["custom_id"]]
    assert sorted(answered + failed) == sorted(line["custom_id"] for line in lines)
    assert not (tmp_path / "out.jsonl.blendserve").exists()
    # A second run would replace finished work, so it must be asked for.
    again = blendserve("run-batch", "-i", str(source), "-o", str(output), "--model-path", model)
    assert again.returncode == 2
    assert "--overwrite" in again.stderr


def test_an_unknown_flag_names_the_nearest_one() -> None:
    run = blendserve("serve", "--max-total-tokenz", "100")
    assert run.returncode == 2
    assert "unknown flag --max-total-tokenz; did you mean --max-total-tokens?" in run.stderr


def test_a_model_folder_without_config_is_refused(tmp_path: Path) -> None:
    run = blendserve("serve", "--model-path", str(tmp_path))
    assert run.returncode == 2
    assert str(tmp_path) in run.stderr
    assert "config.json" in run.stderr


@pytest.mark.parametrize("launcher", ["blendserve", "sglang"])
def test_an_unsupported_sglang_is_refused_before_anything_loads(
    launcher: str, tmp_path: Path, model: str
) -> None:
    """The installed release is made to look like a later one, in the child process alone."""
    (tmp_path / "sitecustomize.py").write_text(
        "import importlib.metadata as metadata\n"
        "real = metadata.version\n"
        "metadata.version = lambda name: '0.9.0' if name == 'sglang' else real(name)\n"
    )
    command = {
        "blendserve": ["-m", "blendserve", "serve"],
        "sglang": ["-m", "sglang.launch_server"],
    }[launcher]
    run = subprocess.run(
        [sys.executable, *command, "--model-path", model, *ENGINE_FLAGS],
        capture_output=True,
        text=True,
        timeout=240,
        check=False,
        cwd=tmp_path,
        env={"PYTHONPATH": str(tmp_path), "PATH": "", "BLENDSERVE_ENABLED": "1", **_home()},
    )
    assert run.returncode != 0
    assert "SGLang 0.9.0 is installed; BlendServe supports 0.5.16 to 0.5.23" in run.stderr


def _home() -> dict[str, str]:
    import os

    return {name: os.environ[name] for name in ("HOME", "XDG_CACHE_HOME") if name in os.environ}


def test_a_batch_of_responses_is_answered_as_an_online_one(blend: Server) -> None:
    body = {"model": MODEL_NAME, "input": "Say hello.", "max_output_tokens": 4, "temperature": 0}
    lines = [
        {"custom_id": f"r{k}", "method": "POST", "url": "/v1/responses", "body": body}
        for k in range(3)
    ]
    batch = finish(blend.client, submit(blend.client, lines, "/v1/responses"))
    assert batch.status == "completed"
    answers = results(blend.client, batch.output_file_id)
    assert answers.keys() == {"r0", "r1", "r2"}
    online = blend.client.responses.create(**body)
    for answer in answers.values():
        parsed = Response.model_validate(answer["response"]["body"])
        assert parsed.output_text == online.output_text
        assert parsed.usage is not None
        assert online.usage is not None
        assert parsed.usage.output_tokens == online.usage.output_tokens
    assert batch.usage is not None
    assert batch.usage.output_tokens == 3 * online.usage.output_tokens
