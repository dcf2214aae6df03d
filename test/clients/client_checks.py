"""Other people's clients, unmodified, against a server of ours. It runs in their environment:

    python client_checks.py NAME URL MODEL EXPECTED_FILE

EXPECTED_FILE holds {question: answer}, as the server answers a bare HTTP request with temperature 0
and TOKENS tokens. What a client gets must be the same.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal

TOKENS = 16
ENDED = ("completed", "failed", "expired", "cancelled")
Expected = dict[str, str]


def litellm_online(url: str, model: str, expected: Expected) -> str:
    import litellm

    for question, answer in expected.items():
        asked = {
            "model": f"openai/{model}",
            "api_base": url,
            "api_key": "unused",
            "messages": messages(question),
            "temperature": 0,
            "max_tokens": TOKENS,
        }
        same(litellm.completion(**asked).choices[0].message.content, answer)
        streamed = litellm.completion(**asked, stream=True)
        same("".join(part.choices[0].delta.content or "" for part in streamed), answer)
    return f"{len(expected)} completions, and streamed"


def litellm_batch(url: str, model: str, expected: Expected) -> str:
    import litellm

    to: dict[str, Any] = {"custom_llm_provider": "openai", "api_base": url, "api_key": "unused"}
    with batch_file(model, expected).open("rb") as source:
        upload = litellm.create_file(file=source, purpose="batch", **to)
    batch = litellm.create_batch(
        completion_window="24h",
        endpoint="/v1/chat/completions",
        input_file_id=upload.id,
        metadata={"from": "litellm"},
        **to,
    )
    batch = until_ended(batch, lambda: litellm.retrieve_batch(batch_id=batch.id, **to))
    assert batch.metadata == {"from": "litellm"}, batch.metadata
    content = litellm.file_content(file_id=batch.output_file_id, **to)
    return same_batch(content.text, expected)


def openai_sdk(url: str, model: str, expected: Expected) -> str:
    from openai import OpenAI

    client = OpenAI(base_url=url, api_key="unused")
    with batch_file(model, expected).open("rb") as source:
        upload = client.files.create(file=source, purpose="batch")
    batch = client.batches.create(
        input_file_id=upload.id, endpoint="/v1/chat/completions", completion_window="24h"
    )
    batch = until_ended(batch, lambda: client.batches.retrieve(batch.id))
    assert batch.id in [one.id for one in client.batches.list(limit=5)]
    assert batch.output_file_id is not None
    return same_batch(client.files.content(batch.output_file_id).text, expected)


def langchain(url: str, model: str, expected: Expected) -> str:
    from langchain_core.output_parsers import StrOutputParser
    from langchain_core.prompts import ChatPromptTemplate
    from langchain_openai import ChatOpenAI

    to: dict[str, Any] = {"base_url": url, "api_key": "unused", "model": model, "temperature": 0}
    chat = ChatOpenAI(**to, max_tokens=TOKENS)
    chain = ChatPromptTemplate([("user", "{question}")]) | chat | StrOutputParser()
    answers = chain.batch([{"question": question} for question in expected])
    for got, answer in zip(answers, expected.values(), strict=True):
        same(got, answer)
    for question, answer in expected.items():
        same("".join(chain.stream({"question": question})), answer)
    schema = Verdict.model_json_schema()
    # A model of noise puts many blanks into its JSON.
    structured = ChatOpenAI(**to, max_tokens=512).with_structured_output(schema)
    verdict = structured.invoke(next(iter(expected)))
    assert verdict["verdict"] in ("good", "bad"), verdict
    return f"{len(expected)} lines by batch(), by stream(), and structured output"


def instructor(url: str, model: str, expected: Expected) -> str:
    from instructor import Mode, from_openai
    from openai import OpenAI

    client = from_openai(OpenAI(base_url=url, api_key="unused"), mode=Mode.JSON_SCHEMA)
    for question in expected:
        verdict = client.chat.completions.create(
            model=model, response_model=Verdict, messages=messages(question), max_retries=0
        )
        assert verdict.verdict in ("good", "bad"), verdict
    return f"{len(expected)} objects of a pydantic model"


def llm_cli(url: str, model: str, expected: Expected) -> str:
    with tempfile.TemporaryDirectory() as folder:
        entry = [{"model_id": "ours", "model_name": model, "api_base": url}]
        # JSON is YAML, too.
        (Path(folder) / "extra-openai-models.yaml").write_text(json.dumps(entry))
        for question, answer in expected.items():
            command = [str(Path(sys.executable).with_name("llm")), "-m", "ours", "--no-log"]
            command += ["-o", "temperature", "0", "-o", "max_tokens", str(TOKENS), question]
            environment = {**os.environ, "LLM_USER_PATH": folder}
            done = subprocess.run(
                command, env=environment, capture_output=True, stdin=subprocess.DEVNULL
            )
            assert done.returncode == 0, done.stderr.decode()
            same(done.stdout.decode(), answer)
    return f"{len(expected)} commands"


def messages(question: str) -> list[dict[str, str]]:
    return [{"role": "user", "content": question}]


def same(got: str | None, answer: str) -> None:
    # Some clients cut blanks off.
    assert got is not None
    assert got.strip() == answer.strip(), f"got {got!r}, expected {answer!r}"


def batch_file(model: str, expected: Expected) -> Path:
    path = Path(tempfile.mkdtemp()) / "batch.jsonl"
    bodies = (
        {"model": model, "messages": messages(question), "temperature": 0, "max_tokens": TOKENS}
        for question in expected
    )
    lines = (
        {"custom_id": str(k), "method": "POST", "url": "/v1/chat/completions", "body": body}
        for k, body in enumerate(bodies)
    )
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return path


def until_ended(batch: Any, again: Callable[[], Any]) -> Any:
    deadline = time.monotonic() + 300
    while batch.status not in ENDED and time.monotonic() < deadline:
        time.sleep(0.5)
        batch = again()
    assert batch.status == "completed", batch
    return batch


def same_batch(text: str, expected: Expected) -> str:
    lines = {line["custom_id"]: line for line in map(json.loads, text.splitlines())}
    assert len(lines) == len(expected), lines
    for k, answer in enumerate(expected.values()):
        body = lines[str(k)]["response"]["body"]
        same(body["choices"][0]["message"]["content"], answer)
    return f"a batch of {len(expected)} lines, from its file to its answers"


CHECKS: dict[str, Callable[[str, str, Expected], str]] = {
    "litellm": litellm_online,
    "litellm-batch": litellm_batch,
    "openai": openai_sdk,
    "langchain-openai": langchain,
    "instructor": instructor,
    "llm": llm_cli,
}

if __name__ == "__main__":
    # The environment of clients has it; that of the server does not need it here.
    from pydantic import BaseModel

    class Verdict(BaseModel):
        verdict: Literal["good", "bad"]

    name, url, model, expected_file = sys.argv[1:]
    print(CHECKS[name](url, model, json.loads(Path(expected_file).read_text())))
