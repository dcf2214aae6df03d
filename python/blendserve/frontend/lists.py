"""Lists of prompts or conversations in, answers out: `run-batch` as a Python function."""

from __future__ import annotations

import difflib
import json
import signal
import subprocess
import sys
import tempfile
from collections.abc import Iterable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from blendserve.batch.progress import Usage, usage_of
from blendserve.frontend.flags import as_flags

_COMPLETIONS, _CHAT = "/v1/completions", "/v1/chat/completions"
# Set by these functions, or of no use without a connection.
_NOT_PARAMETERS = frozenset({"prompt", "messages", "model", "stream", "stream_options"})
# SGLang's Engine and LLM.generate spell these in their own way.
_SPELLINGS = {"max_new_tokens": "max_tokens"}
_ALL_ANSWERED, _SOME_FAILED, _STOPPED = 0, 1, 130
_STOP_SECONDS = 60.0
_TOLD_LINES = 15

Message = Mapping[str, Any]
Parameters = Mapping[str, Any]


class GenerateFailed(RuntimeError):
    """The job could not run, or not to its end; the message says why and what to do."""


@dataclass(frozen=True)
class Answer:
    """The answer to one prompt.

    Attributes:
        texts: one for each of `n`; none where there is an error.
        finish_reasons: "stop" or "length", beside the texts.
        usage: tokens.
        error: why there is no answer.
    """

    texts: tuple[str, ...] = ()
    finish_reasons: tuple[str, ...] = ()
    usage: Usage = field(default_factory=Usage)
    error: str | None = None

    @property
    def text(self) -> str:
        """The first text. Raises GenerateFailed if there is none."""
        if not self.texts:
            raise GenerateFailed(f"this prompt has no answer: {self.error}")
        return self.texts[0]


def generate(
    prompts: Sequence[str | Sequence[int]],
    sampling_params: Parameters | Sequence[Parameters] | None = None,
    *,
    model_path: str | None = None,
    state_dir: str | Path | None = None,
    **flags: Any,
) -> list[Answer]:
    """The answers to prompts, in their order; planned as one job, on an engine of its own.

    Args:
        prompts: texts, or token ids.
        sampling_params: those of /v1/completions (`max_tokens`, `temperature`, `stop`, `n`,
            `regex` ...), for all or one for each.
        model_path: folder or hub id; None: the small default model.
        state_dir: folder that keeps what is answered: the same call goes on where the last one
            ended, and once it has ended only reads. None: nothing is kept.
        flags: those of `blendserve serve` with underscores, as `tp_size=2`.

    Raises:
        ValueError: parameters that do not exist, or a `state_dir` of another call.
        GenerateFailed: the engine did not start, or the job stopped; the same call goes on.
    """
    bodies = [{"prompt": prompt} for prompt in prompts]
    return _answers(_COMPLETIONS, bodies, sampling_params, model_path, state_dir, flags)


def chat(
    messages: Sequence[Sequence[Message]],
    sampling_params: Parameters | Sequence[Parameters] | None = None,
    *,
    model_path: str | None = None,
    state_dir: str | Path | None = None,
    **flags: Any,
) -> list[Answer]:
    """As `generate`, for conversations: each a list of {"role": ..., "content": ...}, with the
    parameters of /v1/chat/completions."""
    bodies = [{"messages": list(one)} for one in messages]
    return _answers(_CHAT, bodies, sampling_params, model_path, state_dir, flags)


def _answers(
    url: str,
    bodies: list[dict[str, Any]],
    sampling_params: Parameters | Sequence[Parameters] | None,
    model_path: str | None,
    state_dir: str | Path | None,
    flags: dict[str, Any],
) -> list[Answer]:
    if not bodies:
        return []
    each = _each(sampling_params, len(bodies))
    _check_names(url, each)
    lines = [
        {
            "custom_id": str(index),
            "method": "POST",
            "url": url,
            "body": {**body, **{_SPELLINGS.get(name, name): params[name] for name in params}},
        }
        for index, (body, params) in enumerate(zip(bodies, each, strict=True))
    ]
    with ExitStack() as stack:
        if state_dir is None:
            state_dir = stack.enter_context(tempfile.TemporaryDirectory(prefix="blendserve-"))
        job = _ListJob(Path(state_dir), as_flags({"model_path": model_path, **flags}))
        job.prepare(json.dumps(line, ensure_ascii=True) + "\n" for line in lines)
        if not job.is_done:
            job.run()
        return job.answers(len(lines))


def _each(given: Parameters | Sequence[Parameters] | None, count: int) -> list[Parameters]:
    if given is None or isinstance(given, Mapping):
        return [given or {}] * count
    if len(given) != count:
        raise ValueError(f"{len(given)} sampling_params for {count} prompts; give one or {count}.")
    return list(given)


def _check_names(url: str, each: Iterable[Parameters]) -> None:
    """SGLang passes over names that it does not know."""
    from sglang.srt.entrypoints.openai import protocol

    kind = protocol.CompletionRequest if url == _COMPLETIONS else protocol.ChatCompletionRequest
    known = {*kind.model_fields, *_SPELLINGS} - _NOT_PARAMETERS
    for name in {name for params in each for name in params} - known:
        near = difflib.get_close_matches(name, known, n=1)
        hint = f" Did you mean {near[0]!r}?" if near else f" Those of {url} are taken."
        raise ValueError(f"sampling_params has no {name!r} here.{hint}")


class _ListJob:
    """A run of `run-batch` in a folder of its own."""

    def __init__(self, folder: Path, flags: list[str]) -> None:
        self._folder = folder
        self._flags = flags
        self._input = folder / "input.jsonl"
        self._output = folder / "answers.jsonl"
        self._errors = folder / "answers.errors.jsonl"
        self._call = folder / "call.json"
        self._log = folder / "run.log"

    def prepare(self, lines: Iterable[str]) -> None:
        """Write the input. Raises ValueError if the folder has another's."""
        self._folder.mkdir(parents=True, exist_ok=True)
        draft = self._folder / "input.draft"
        with draft.open("w", encoding="ascii") as file:
            file.writelines(lines)
        call = json.dumps({"flags": self._flags})
        if self._call.exists():
            same = self._input.read_bytes() == draft.read_bytes()
            if not same or self._call.read_text() != call:
                draft.unlink()
                what = "the same prompts on another engine" if same else "other prompts"
                raise ValueError(
                    f"{self._folder} is of a call with {what}. Give another folder, or remove it."
                )
            draft.unlink()
            return
        draft.replace(self._input)
        self._call.write_text(call)

    @property
    def is_done(self) -> bool:
        placed = self._output.exists() or self._errors.exists()
        return placed and not self._output.with_name("answers.jsonl.blendserve").exists()

    def run(self) -> None:
        """Until all is answered, as far as it can be."""
        command = [sys.executable, "-m", "blendserve", "run-batch", *self._flags]
        command += ["-i", str(self._input), "-o", str(self._output)]
        with self._log.open("wb") as log:
            process = subprocess.Popen(
                command, stdin=subprocess.DEVNULL, stdout=log, stderr=subprocess.STDOUT
            )
            try:
                status = process.wait()
            except BaseException:
                # What has arrived is saved, for the next call.
                process.send_signal(signal.SIGTERM)
                try:
                    process.wait(_STOP_SECONDS)
                except subprocess.TimeoutExpired:
                    process.kill()
                    process.wait()
                raise
        if status == _STOPPED:
            raise KeyboardInterrupt
        if status not in (_ALL_ANSWERED, _SOME_FAILED):
            said = self._log.read_text(errors="replace").splitlines()[-_TOLD_LINES:]
            raise GenerateFailed("\n".join([f"run-batch ended with status {status}:", *said]))

    def answers(self, count: int) -> list[Answer]:
        found: dict[int, Answer] = {}
        for path in (self._output, self._errors):
            if path.exists():
                with path.open("rb") as file:
                    found.update(map(_answer, map(json.loads, file)))
        missing = Answer(error="run-batch wrote neither an answer nor an error")
        return [found.get(index, missing) for index in range(count)]


def _answer(line: dict[str, Any]) -> tuple[int, Answer]:
    index, response = int(line["custom_id"]), line.get("response") or {}
    body = response.get("body") or {}
    if response.get("status_code") != 200:
        error = line.get("error") or body.get("error") or body
        said = error.get("message") if isinstance(error, dict) else None
        return index, Answer(error=str(said or error))
    choices = body["choices"]
    return index, Answer(
        tuple(_text(choice) for choice in choices),
        tuple(choice["finish_reason"] for choice in choices),
        usage_of(body),
    )


def _text(choice: dict[str, Any]) -> str:
    message = choice.get("message")
    return str((message["content"] if message else choice["text"]) or "")
