"""Checking an input file before any of it runs: one streaming pass that names every bad line."""

from __future__ import annotations

import codecs
import hashlib
import logging
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import orjson

from blendserve.batch.bodies import body_faults
from blendserve.batch.executor import BatchLine, Executor, LineFault
from blendserve.batch.limits import BatchLimits
from blendserve.batch.lines import RawLine, iter_lines
from blendserve.batch.objects import BatchFault
from blendserve.batch.rests import with_rests

logger = logging.getLogger(__name__)

_UTF16_MARKS = (codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)
_STOP_CHECK_LINES = 64
_LINE_FIELDS = frozenset({"custom_id", "method", "url", "body"})


class ValidationStopped(Exception):
    """Somebody cancelled the batch, or the server stops."""


@dataclass(frozen=True)
class Verdict:
    """What validation found: the file is good if `faults` is empty.

    `total` counts the requests of the file, `model` is the one that all of them name.
    """

    total: int
    model: str | None
    faults: list[BatchFault]


def validate_file(
    path: Path,
    endpoint: str,
    executor: Executor,
    limits: BatchLimits,
    should_stop: Callable[[], bool],
) -> Verdict:
    """Reads the whole file once and collects the faults of all lines, in file order.

    Memory: about 100 bytes per line, for the digests that find duplicate custom_ids. Raises
    ValidationStopped soon after `should_stop()` turns true.
    """
    return _Validator(endpoint, executor, limits).run(path, should_stop)


class _Validator:
    def __init__(self, endpoint: str, executor: Executor, limits: BatchLimits) -> None:
        self._endpoint = endpoint
        self._executor = executor
        self._limits = limits
        self._model: str | None = None
        self._line_of_id: dict[bytes, int] = {}
        self._faults: list[BatchFault] = []
        self._unlisted = 0

    def run(self, path: Path, should_stop: Callable[[], bool]) -> Verdict:
        total = 0
        with open(path, "rb") as file:
            if file.read(2) in _UTF16_MARKS:
                fault = LineFault("invalid_encoding", "The file is UTF-16; save it as UTF-8.")
                return Verdict(0, None, [_named(fault, None)])
            file.seek(0)
            for raw in with_rests(iter_lines(file, self._limits.max_line_bytes)):
                if total % _STOP_CHECK_LINES == 0 and should_stop():
                    raise ValidationStopped
                if total < self._limits.max_lines:
                    for fault in self._line_faults(raw, total):
                        self._note(_named(fault, raw.number))
                total += 1
        return Verdict(total, self._model, self._file_faults(total) + self._faults + self._rest())

    def _file_faults(self, total: int) -> list[BatchFault]:
        if total == 0:
            fault = LineFault("empty_file", "The file holds no requests.")
        elif total > self._limits.max_lines:
            fault = LineFault(
                "too_many_tasks",
                f"The file holds {total} requests; at most {self._limits.max_lines} are allowed. "
                "Split it, or raise the server's limit. The rest was not checked.",
            )
        else:
            return []
        return [_named(fault, None)]

    def _rest(self) -> list[BatchFault]:
        if self._unlisted == 0:
            return []
        fault = LineFault("more_errors", f"and {self._unlisted} more errors that are not listed")
        return [_named(fault, None)]

    def _note(self, fault: BatchFault) -> None:
        if len(self._faults) < self._limits.max_listed_faults:
            self._faults.append(fault)
        else:
            self._unlisted += 1

    def _line_faults(self, raw: RawLine, index: int) -> Iterator[LineFault]:
        entry = self._parse(raw)
        if isinstance(entry, LineFault):
            yield entry
            return
        faults = list(self._envelope_faults(entry, raw.number))
        body = entry.get("body")
        if isinstance(body, dict):
            faults += self._model_faults(body)
            faults += body_faults(self._endpoint, body, self._limits)
        yield from faults
        if not faults and isinstance(body, dict):
            line = BatchLine(index, entry["custom_id"], entry["url"], body)
            if (fault := self._executor_fault(line)) is not None:
                yield fault

    def _parse(self, raw: RawLine) -> dict[str, Any] | LineFault:
        if raw.data is None:
            return LineFault(
                "line_too_long",
                f"The line is {raw.size} bytes long; at most "
                f"{self._limits.max_line_bytes} are allowed.",
            )
        try:
            entry = orjson.loads(raw.data)
        except orjson.JSONDecodeError as error:
            try:
                raw.data.decode("utf-8")
            except UnicodeDecodeError as bad:
                message = f"The line is not UTF-8 (byte {bad.start + 1} of the line)."
            else:
                message = f"The line is not valid JSON: {error.msg} (column {error.colno})."
            return LineFault("invalid_json_line", message)
        if not isinstance(entry, dict):
            return LineFault("invalid_json_line", "The line is JSON, but not an object.")
        return entry

    def _envelope_faults(self, entry: dict[str, Any], number: int) -> Iterator[LineFault]:
        yield from self._custom_id_faults(entry, number)
        method = entry.get("method")
        if method is None:
            yield _missing("method")
        elif method != "POST":
            yield LineFault("invalid_method", 'method must be "POST".', "method")
        yield from self._url_faults(entry.get("url"))
        if entry.get("body") is None:
            yield _missing("body")
        elif not isinstance(entry["body"], dict):
            yield LineFault("invalid_type", "body must be an object.", "body")
        for name in entry.keys() - _LINE_FIELDS:
            yield LineFault(
                "unknown_parameter",
                f"A line has custom_id, method, url and body, and no {name[:80]!r}.",
                name[:80],
            )

    def _custom_id_faults(self, entry: dict[str, Any], number: int) -> Iterator[LineFault]:
        custom_id = entry.get("custom_id")
        if custom_id is None:
            yield _missing("custom_id")
        elif not isinstance(custom_id, str) or not custom_id:
            yield LineFault(
                "invalid_type", "custom_id must be a string that is not empty.", "custom_id"
            )
        else:
            digest = hashlib.blake2b(custom_id.encode(), digest_size=16).digest()
            first = self._line_of_id.setdefault(digest, number)
            if first != number:
                yield LineFault(
                    "duplicate_custom_id",
                    f"The custom_id of line {first} is used again.",
                    "custom_id",
                )

    def _url_faults(self, url: Any) -> Iterator[LineFault]:
        if url is None:
            yield _missing("url")
        elif not isinstance(url, str):
            yield LineFault("invalid_type", "url must be a string.", "url")
        elif url == self._endpoint:
            return
        elif url in self._executor.endpoints:
            yield LineFault(
                "url_mismatch",
                f"The line's url is {url}, the batch's endpoint is {self._endpoint}.",
                "url",
            )
        else:
            yield LineFault(
                "invalid_url",
                f"There is no endpoint {url[:80]!r}; this batch is for {self._endpoint}.",
                "url",
            )

    def _model_faults(self, body: dict[str, Any]) -> Iterator[LineFault]:
        model = body.get("model")
        if model is None:
            yield _missing("body.model")
        elif not isinstance(model, str):
            yield LineFault("invalid_type", "model must be a string.", "body.model")
        elif self._model is not None and model != self._model:
            yield LineFault(
                "model_mismatch",
                f"The line names model {model[:80]!r}, the first one named {self._model[:80]!r}; "
                "a batch has one model.",
                "body.model",
            )
        else:
            self._model = model
            if self._executor.models and model not in self._executor.models:
                served = ", ".join(sorted(self._executor.models))
                yield LineFault(
                    "model_not_found",
                    f"The model {model[:80]!r} is not served here; this server has {served}.",
                    "body.model",
                )

    def _executor_fault(self, line: BatchLine) -> LineFault | None:
        try:
            return self._executor.check(line)
        except Exception as error:
            # A line that breaks the checker is a bad line, not a broken service. The text of the
            # exception may quote the prompt, so only its type is told.
            logger.warning("the check of line %d raised %s", line.index, type(error).__name__)
            return LineFault(
                "invalid_request",
                f"The request cannot be read by the engine ({type(error).__name__}).",
                "body",
            )


def _named(fault: LineFault, number: int | None) -> BatchFault:
    return BatchFault(code=fault.code, message=fault.message, param=fault.param, line=number)


def _missing(param: str) -> LineFault:
    return LineFault("missing_required_parameter", f"{param} is missing.", param)
