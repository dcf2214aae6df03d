"""Reads a file of requests for the planner: OpenAI batch lines, or lines of token ids."""

from __future__ import annotations

import difflib
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from blendserve.batch.endpoints import did_you_mean
from blendserve.batch.line_parser import UnreadableLine, read_entry
from blendserve.batch.lines import iter_lines

Tokens = NDArray[np.int32]
Run = tuple[int, int]

_MAX_LINE_BYTES = 1 << 30
_TOKEN_FIELDS = ("id", "input_ids", "output_len", "max_tokens")
# OpenAI's default for completions without max_tokens, and SGLang's.
_COMPLETION_TOKENS = 16


class JobFileError(ValueError):
    """A file that cannot be planned; names the file, the line and the remedy."""


class UncountableMedia(ValueError):
    """A conversation with pictures of which no tokens can be told; says why."""


class Encoder(Protocol):
    """A model's tokenizer and chat template."""

    def text(self, text: str) -> list[int]:
        """Tokens of a plain prompt, with what the model puts before every text."""

    def chat(self, messages: list[Any], tools: list[Any] | None) -> list[int]:
        """Tokens of a conversation, up to where the answer begins."""

    def media(self, messages: list[Any], tools: list[Any] | None) -> tuple[Tokens, list[Run]]:
        """The same of one with pictures, and (end, patches) of each, see `MediaRuns`.

        Raises:
            UncountableMedia
        """


@dataclass
class JobFile:
    """The requests of a file, as parallel lists; a line with n > 1 or several prompts is several.

    ids, lines: its id and line number. token_ids: int32 prompts. max_output_tokens: limits.
    known_output_tokens: lengths that are certain, -1 elsewhere. given_limits: max_tokens of lines
    of token ids, -1 without.
    runs: (request, end, patches) of the pictures, see `MediaRuns`.
    too_long, media: (id, line) of lines left out: no room for an answer within the context
    length; pictures that cannot be counted. media_fault: why the first of these is.
    """

    ids: list[str] = field(default_factory=list)
    lines: list[int] = field(default_factory=list)
    token_ids: list[NDArray[np.int32]] = field(default_factory=list)
    max_output_tokens: list[int] = field(default_factory=list)
    known_output_tokens: list[int] = field(default_factory=list)
    given_limits: list[int] = field(default_factory=list)
    too_long: list[tuple[str, int]] = field(default_factory=list)
    media: list[tuple[str, int]] = field(default_factory=list)
    media_fault: str = ""
    runs: list[tuple[int, int, int]] = field(default_factory=list)


@dataclass(frozen=True)
class _Request:
    """One line: its prompts, its limit (None: the context length), whether it is exact, the limit
    that was given beside an exact length, and the pictures of its (only) prompt."""

    prompts: list[NDArray[np.int32]]
    limit: int | None
    exact: bool
    given_limit: int = -1
    runs: tuple[Run, ...] = ()


class _BadLine(ValueError):
    pass


def read_job_file(
    path: Path,
    context_length: int,
    encoder: Callable[[], Encoder],
    leave_out: Callable[[int, str], None] | None = None,
) -> JobFile:
    """Read all lines; blank ones are skipped.

    Args:
        context_length: of the model; longer prompts are left out and named in the result.
        encoder: called once, at the first line that holds text.
        leave_out: called with the number of each line that is no request, and why. Without it the
            first one is an error.

    Raises:
        JobFileError: the file cannot be read, a line is no request, or there is none.
    """
    job = JobFile()
    seen: dict[str, int] = {}
    loaded: list[Encoder] = []

    def tokenizer() -> Encoder:
        if not loaded:
            loaded.append(encoder())
        return loaded[0]

    try:
        stream = path.open("rb")
    except OSError as error:
        raise JobFileError(
            f"{path}: {error.strerror or error}; give the path of a JSONL file with -i"
        ) from error
    with stream:
        for line in iter_lines(stream, _MAX_LINE_BYTES):
            try:
                entry = _entry(line.data)
                name = _name(entry, "id" if "input_ids" in entry else "custom_id")
                if name in seen:
                    raise _BadLine(
                        f"the id {name!r} is that of line {seen[name]} already; make ids unique"
                    )
                seen[name] = line.number
                _add(job, name, line.number, _request(entry, tokenizer), context_length)
            except UncountableMedia as error:
                job.media_fault = job.media_fault or str(error)
                job.media.append((name, line.number))
            except _BadLine as error:
                if leave_out is None:
                    raise JobFileError(f"{path}, line {line.number}: {error}") from error
                leave_out(line.number, str(error))
    if not seen:
        raise JobFileError(
            f"{path} has no requests; it must hold one JSON object per line, with custom_id, "
            "method, url and body, or with id and input_ids"
        )
    return job


def _add(job: JobFile, name: str, number: int, request: _Request, context_length: int) -> None:
    for prompt in request.prompts:
        room = context_length - len(prompt)
        # A scoring request may fill the context; any other needs room for a token.
        if room < (0 if request.limit == 0 else 1):
            job.too_long.append((name, number))
            continue
        limit = room if request.limit is None else min(request.limit, room)
        job.runs.extend((len(job.ids), *run) for run in request.runs)
        job.ids.append(name)
        job.lines.append(number)
        job.token_ids.append(prompt)
        job.max_output_tokens.append(limit)
        job.known_output_tokens.append(limit if request.exact else -1)
        job.given_limits.append(request.given_limit)


def _entry(data: bytes | None) -> dict[str, Any]:
    if data is None:
        raise _BadLine(f"longer than {_MAX_LINE_BYTES} bytes; split the file's requests into lines")
    try:
        entry = read_entry(data).fields
    except UnreadableLine as error:
        raise _BadLine(f"{error} Write one JSON object per line") from error
    if "input_ids" in entry or "body" in entry:
        return entry
    raise _BadLine(
        "no request; a line must be a JSON object with custom_id, method, url and body (OpenAI "
        "batch), or with id, input_ids and perhaps output_len (token ids)"
    )


def _request(entry: dict[str, Any], tokenizer: Callable[[], Encoder]) -> _Request:
    return _token_line(entry) if "input_ids" in entry else _batch_line(entry, tokenizer)


# -- token ids


def _token_line(entry: dict[str, Any]) -> _Request:
    for key in entry:
        if key not in _TOKEN_FIELDS:
            near = difflib.get_close_matches(key, _TOKEN_FIELDS, n=1)
            hint = f"did you mean {near[0]!r}?" if near else f"use {', '.join(_TOKEN_FIELDS)}"
            raise _BadLine(f"unknown key {key!r}; {hint}")
    prompt = _token_array(entry["input_ids"], "input_ids")
    output, limit = _count(entry, "output_len", 0), _count(entry, "max_tokens", 1)
    if output is None or limit is None:
        return _Request([prompt], limit if output is None else output, output is not None)
    return _Request([prompt], min(output, limit), exact=True, given_limit=limit)


def _name(entry: Mapping[str, Any], key: str) -> str:
    value = entry.get(key)
    if isinstance(value, bool) or not isinstance(value, str | int) or value == "":
        raise _BadLine(f"{key} is {_shown(value)}; give every line a string that names it")
    return str(value)


def _token_array(value: Any, key: str) -> NDArray[np.int32]:
    remedy = "it must be a list of whole numbers from 0 to 2147483647"
    if not isinstance(value, list):
        raise _BadLine(f"{key} is {_shown(value)}; {remedy}")
    if not value:
        return np.empty(0, dtype=np.int32)
    try:
        ids = np.array(value)
    except ValueError as error:
        raise _BadLine(f"{key} holds lists of unequal lengths; {remedy}") from error
    if ids.ndim != 1 or ids.dtype.kind not in "iu":
        raise _BadLine(f"{key} holds something else than whole numbers; {remedy}")
    if int(ids.min()) < 0 or int(ids.max()) > 0x7FFFFFFF:
        raise _BadLine(f"{key} holds a token id out of range; {remedy}")
    return ids.astype(np.int32)


def _count(entry: Mapping[str, Any], key: str, least: int) -> int | None:
    value = entry.get(key)
    if value is None:
        return None
    whole = type(value) is int or (type(value) is float and value.is_integer())
    if not whole or value < least:
        raise _BadLine(f"{key} is {_shown(value)}; it must be a whole number from {least}")
    return int(value)


def _shown(value: Any) -> str:
    text = repr(value)
    return "missing" if value is None else text if len(text) <= 60 else text[:57] + "..."


# -- OpenAI batch


def _batch_line(entry: dict[str, Any], tokenizer: Callable[[], Encoder]) -> _Request:
    body, url = entry["body"], entry.get("url")
    if not isinstance(body, dict):
        raise _BadLine(f"body is {_shown(body)}; it must be a JSON object")
    readers: dict[str, Callable[[dict[str, Any], Callable[[], Encoder]], _Request]] = {
        "/v1/chat/completions": _chat,
        "/v1/completions": _completion,
        "/v1/embeddings": _embedding,
        "/v1/responses": _response,
        "/v1/classify": _embedding,
        "/v1/score": _score,
        "/v1/rerank": _rerank,
    }
    if url not in readers:
        meant = did_you_mean(url) if isinstance(url, str) else ""
        raise _BadLine(f"url is {_shown(url)}; it must be one of {', '.join(readers)}.{meant}")
    request = readers[url](body, tokenizer)
    copies = _count(body, "n", 1) or 1
    return replace(
        request,
        prompts=request.prompts * copies,
        exact=bool(body.get("ignore_eos")) or request.exact,
    )


def _chat(body: dict[str, Any], tokenizer: Callable[[], Encoder]) -> _Request:
    limit = _count(body, "max_completion_tokens", 0)
    if limit is None:
        limit = _count(body, "max_tokens", 0)
    ids, runs = _conversation(body.get("messages"), "messages", body.get("tools"), tokenizer)
    return _Request([ids], limit, exact=False, runs=tuple(runs))


def _response(body: dict[str, Any], tokenizer: Callable[[], Encoder]) -> _Request:
    given = body.get("input")
    messages = [{"role": "user", "content": given}] if isinstance(given, str) else given
    if isinstance(messages, list) and isinstance(body.get("instructions"), str):
        messages = [{"role": "system", "content": body["instructions"]}, *messages]
    ids, runs = _conversation(messages, "input", body.get("tools"), tokenizer)
    limit = _count(body, "max_output_tokens", 0)
    return _Request([ids], limit, exact=False, runs=tuple(runs))


def _completion(body: dict[str, Any], tokenizer: Callable[[], Encoder]) -> _Request:
    limit = _count(body, "max_tokens", 0)
    prompts = list(_prompts(body.get("prompt"), "prompt", tokenizer))
    return _Request(prompts, _COMPLETION_TOKENS if limit is None else limit, exact=False)


def _embedding(body: dict[str, Any], tokenizer: Callable[[], Encoder]) -> _Request:
    return _Request(list(_prompts(body.get("input"), "input", tokenizer)), 0, exact=True)


def _score(body: dict[str, Any], tokenizer: Callable[[], Encoder]) -> _Request:
    items = list(_prompts(body.get("items"), "items", tokenizer))
    if body.get("query"):
        [query] = _prompts(body["query"], "query", tokenizer)
        ends = [(item, query) if body.get("item_first") else (query, item) for item in items]
        items = [np.concatenate(pair) for pair in ends]
    return _Request(items, 0, exact=True)


def _rerank(body: dict[str, Any], tokenizer: Callable[[], Encoder]) -> _Request:
    query, documents = _plain_text(body.get("query"), "query"), body.get("documents")
    if not isinstance(documents, list) or not documents:
        raise _BadLine(f"documents is {_shown(documents)}; it must be a list of texts")
    pairs = [(query, _plain_text(document, "documents")) for document in documents]
    if any(None in pair for pair in pairs):
        raise _BadLine("query and documents hold pictures; only texts are planned")
    # The reranker's template is the server's to fill in; what it adds is the same in all.
    return _Request(
        [np.array(tokenizer().text("".join(map(str, pair))), dtype=np.int32) for pair in pairs],
        0,
        exact=True,
    )


def _prompts(value: Any, key: str, tokenizer: Callable[[], Encoder]) -> Iterator[NDArray[np.int32]]:
    """A text, token ids, or a list of either."""
    if isinstance(value, str):
        yield np.array(tokenizer().text(value), dtype=np.int32)
    elif isinstance(value, list) and value and isinstance(value[0], str | list):
        for item in value:
            yield from _prompts(item, key, tokenizer)
    elif isinstance(value, list) and value:
        yield _token_array(value, key)
    else:
        raise _BadLine(f"{key} is {_shown(value)}; it must be a text or a list of token ids")


def _conversation(
    messages: Any, key: str, tools: Any, tokenizer: Callable[[], Encoder]
) -> tuple[Tokens, list[Run]]:
    if not isinstance(messages, list) or not messages:
        raise _BadLine(f"{key} is {_shown(messages)}; it must be a list of messages")
    plain = []
    has_media = False
    for message in messages:
        if not isinstance(message, dict) or not isinstance(message.get("role"), str):
            raise _BadLine(f"{key} holds {_shown(message)}; every message needs a role and content")
        text = _plain_text(message.get("content"), key)
        has_media = has_media or text is None
        plain.append({**message, "content": text})
    tools = tools if isinstance(tools, list) else None
    try:
        if has_media:
            return tokenizer().media(messages, tools)
        ids = tokenizer().chat(plain, tools)
    except (JobFileError, UncountableMedia):
        raise
    except Exception as error:  # Templates are programs of the model's authors.
        raise _BadLine(f"the chat template refuses {key}: {error}; mend the messages") from error
    return np.array(ids, dtype=np.int32), []


def _plain_text(content: Any, key: str) -> str | None:
    """Of a message's content; None where some of it is no text."""
    if content is None:
        return ""
    if isinstance(content, str):
        return content
    if not isinstance(content, list):
        raise _BadLine(f"{key} holds content {_shown(content)}; it must be a text or text parts")
    texts = []
    for part in content:
        text = part.get("text") if isinstance(part, dict) else None
        if not isinstance(text, str):
            return None
        texts.append(text)
    return "\n".join(texts)
