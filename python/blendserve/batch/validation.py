"""Checking an input file before any of it runs: one streaming pass that names every bad line.

What is wrong with a line's envelope fails the file; what is wrong inside its body is that line's
own matter, and answered there and then.
"""

from __future__ import annotations

import codecs
import hashlib
import logging
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from blendserve.batch.bodies import body_faults
from blendserve.batch.endpoints import ENDPOINTS, did_you_mean
from blendserve.batch.executor import BatchLine, EngineUnavailable, Executor, LineFault
from blendserve.batch.limits import BatchLimits
from blendserve.batch.line_parser import Entry, UnreadableLine, read_entry
from blendserve.batch.lines import RawLine, iter_lines
from blendserve.batch.objects import BatchFault
from blendserve.batch.refusals import RefusedLine
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

    `total` counts the requests of the file, `refused` those of them that were told to `on_refused`.
    `model` is the one that the lines name, None if none names one.
    """

    total: int
    model: str | None
    faults: list[BatchFault]
    refused: int = 0


def validate_file(
    path: Path,
    endpoint: str,
    executor: Executor,
    limits: BatchLimits,
    should_stop: Callable[[], bool],
    on_refused: Callable[[RefusedLine], None],
) -> Verdict:
    """Reads the whole file once and collects the faults of all envelopes, in file order.

    `on_refused` is called with each line whose envelope is good and whose body is not, also in a
    file that turns out to be bad. Memory: about 100 bytes per line, for the digests that find
    duplicate custom_ids. Raises ValidationStopped soon after `should_stop()` turns true.
    """
    return _Validator(endpoint, executor, limits, on_refused).run(path, should_stop)


class _Validator:
    def __init__(
        self,
        endpoint: str,
        executor: Executor,
        limits: BatchLimits,
        on_refused: Callable[[RefusedLine], None],
    ) -> None:
        self._endpoint = endpoint
        self._executor = executor
        self._limits = limits
        self._on_refused = on_refused
        self._refused = 0
        self._model: str | None = None
        self._some_served = False
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
                    self._look_at(raw, total)
                total += 1
        faults = self._file_faults(total) + self._faults + self._rest()
        return Verdict(total, self._model, faults, self._refused)

    def _file_faults(self, total: int) -> list[BatchFault]:
        if total == 0:
            fault = LineFault("empty_file", "The file holds no requests.")
        elif total > self._limits.max_lines:
            fault = LineFault(
                "too_many_tasks",
                f"The file holds {total} requests; at most {self._limits.max_lines} are allowed. "
                "Split it, or raise the server's limit. The rest was not checked.",
            )
        elif self._limits.mixed_endpoints and not (self._some_served or self._faults):
            fault = self._not_served(self._endpoint)
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

    def _look_at(self, raw: RawLine, index: int) -> None:
        try:
            entry = self._parse(raw)
        except UnreadableLine as error:
            self._note(_named(LineFault("invalid_json_line", str(error)), raw.number))
            return
        if isinstance(entry, LineFault):
            self._note(_named(entry, raw.number))
            return
        faults = list(self._envelope_faults(entry, raw.number))
        for fault in faults:
            self._note(_named(fault, raw.number))
        if not faults and (own := self._own_faults(entry, index)):
            self._refused += 1
            self._on_refused(RefusedLine(index, raw.number, entry.fields["custom_id"], own))

    def _own_faults(self, entry: Entry, index: int) -> list[LineFault]:
        """What is wrong with a line whose envelope is good."""
        url = entry.fields["url"]
        if url not in self._executor.endpoints:
            return [self._not_served(url)]
        self._some_served = True
        if entry.body_fault is not None:
            return [entry.body_fault]
        body = entry.fields["body"]
        faults = [*_model_type_faults(body), *body_faults(url, body, self._limits)]
        if faults:
            return faults
        line = BatchLine(index, entry.fields["custom_id"], url, body)
        fault = self._executor_fault(line)
        return [] if fault is None else [fault]

    def _parse(self, raw: RawLine) -> Entry | LineFault:
        if raw.data is None:
            return LineFault(
                "line_too_long",
                f"The line is {raw.size} bytes long; at most "
                f"{self._limits.max_line_bytes} are allowed.",
            )
        return read_entry(raw.data)

    def _envelope_faults(self, entry: Entry, number: int) -> Iterator[LineFault]:
        fields = entry.fields
        yield from self._custom_id_faults(entry, number)
        method = fields.get("method")
        if method is None:
            yield _missing("method")
        elif method != "POST":
            yield LineFault("invalid_method", 'method must be "POST".', "method")
        yield from self._url_faults(fields.get("url"))
        body = fields.get("body")
        if body is None:
            yield _missing("body")
        elif not isinstance(body, dict):
            yield LineFault("invalid_type", "body must be an object.", "body")
        else:
            yield from self._model_faults(body.get("model"))
        for name in (name for name in fields if name not in _LINE_FIELDS):
            yield LineFault(
                "unknown_parameter",
                f"A line has custom_id, method, url and body, and no {name[:80]!r}.",
                name[:80],
            )

    def _custom_id_faults(self, entry: Entry, number: int) -> Iterator[LineFault]:
        custom_id = entry.fields.get("custom_id")
        if custom_id is None:
            yield _missing("custom_id")
        elif not isinstance(custom_id, str) or not custom_id:
            yield LineFault(
                "invalid_type", "custom_id must be a string that is not empty.", "custom_id"
            )
        elif entry.broken_id:
            yield LineFault(
                "invalid_value",
                "custom_id holds half of a surrogate pair, which no result file could give back.",
                "custom_id",
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
        elif self._limits.mixed_endpoints:
            if url not in ENDPOINTS:
                yield _no_endpoint(url, f"use one of {', '.join(sorted(ENDPOINTS))}")
        elif url in self._executor.endpoints:
            yield LineFault(
                "url_mismatch",
                f"The line's url is {url}, the batch's endpoint is {self._endpoint}.",
                "url",
            )
        else:
            yield _no_endpoint(url, f"this batch is for {self._endpoint}")

    def _model_faults(self, model: Any) -> Iterator[LineFault]:
        # One that is missing is the served one; one of another type names none.
        if not isinstance(model, str) or not model:
            return
        if self._model is not None and model != self._model:
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

    def _not_served(self, url: str) -> LineFault:
        served = ", ".join(sorted(self._executor.endpoints))
        return LineFault(
            "invalid_endpoint", f"The engine does not serve {url}; it has {served}.", "url"
        )

    def _executor_fault(self, line: BatchLine) -> LineFault | None:
        try:
            return self._executor.check(line)
        except EngineUnavailable:
            raise
        except Exception as error:
            # A line that breaks the checker is a bad line, not a broken service. The text of the
            # exception may quote the prompt, so only its type is told.
            logger.warning("the check of line %d raised %s", line.index, type(error).__name__)
            return LineFault(
                "invalid_request",
                f"The request cannot be read by the engine ({type(error).__name__}).",
                "body",
            )


def _no_endpoint(url: str, remedy: str) -> LineFault:
    message = f"There is no endpoint {url[:80]!r}; {remedy}.{did_you_mean(url)}"
    return LineFault("invalid_url", message, "url")


def _named(fault: LineFault, number: int | None) -> BatchFault:
    return BatchFault(code=fault.code, message=fault.message, param=fault.param, line=number)


def _model_type_faults(body: dict[str, Any]) -> Iterator[LineFault]:
    model = body.get("model")
    if model is not None and (not isinstance(model, str) or not model):
        yield LineFault(
            "invalid_type", "model must be a string that is not empty, or left out.", "body.model"
        )


def _missing(param: str) -> LineFault:
    return LineFault("missing_required_parameter", f"{param} is missing.", param)
