"""What the user is told, and left with, where lines of a job have failed."""

from __future__ import annotations

import os
import shutil
from collections import Counter
from pathlib import Path
from typing import Any

import orjson

_MAX_CAUSES = 3
_MAX_MESSAGE = 200


def causes(errors: Path, most: int | None = _MAX_CAUSES) -> list[str]:
    """The most frequent causes in an error file, as lines of text; None: all of them."""
    counts: Counter[tuple[str, str]] = Counter()
    examples: dict[tuple[str, str], tuple[str, str]] = {}
    with errors.open("rb") as lines:
        for line in lines:
            custom_id, kind, message = _cause(orjson.loads(line))
            # Numbers and names differ from line to line: one example stands for a kind.
            counts[kind] += 1
            examples.setdefault(kind, (custom_id, message))
    said = []
    for kind, count in counts.most_common(most):
        custom_id, message = examples[kind]
        said.append(f"  {count} x {' '.join(filter(None, kind))}, e.g. {custom_id[:80]}: {message}")
    if most is not None and len(counts) > most:
        said.append(f"  and {len(counts) - most} more causes")
    return said


def keep_log(log: Path, output: Path) -> Path | None:
    """Moves what the engine printed beside the output; None if it printed nothing."""
    if not log.exists() or log.stat().st_size == 0:
        return None
    kept = output.with_name(output.name + ".server.log")
    try:
        os.replace(log, kept)
    except OSError:
        shutil.copyfile(log, kept)
    # It may quote what was asked.
    kept.chmod(0o600)
    return kept


def _cause(line: dict[str, Any]) -> tuple[str, tuple[str, str], str]:
    """(custom_id, (HTTP status if any, code), message) of a line of an error file."""
    error = line.get("error")
    status = ""
    if not isinstance(error, dict):
        response = line.get("response") or {}
        status = str(response.get("status_code", ""))
        body = response.get("body")
        error = body.get("error", body) if isinstance(body, dict) else {}
    if not isinstance(error, dict):
        error = {"message": error}
    # SGLang's errors stand in the body itself, with the HTTP status as code.
    codes = [str(error[name]) for name in ("code", "type") if error.get(name)]
    code = next((code for code in codes if code != status), "")
    message = " ".join(str(error.get("message") or "").split())[:_MAX_MESSAGE]
    return str(line.get("custom_id")), (status, code), message
