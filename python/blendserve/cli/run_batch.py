"""``blendserve run-batch``: a file of requests in, a file of answers out, no server to manage.

It starts the very server that ``blendserve serve`` starts, on a loopback port of its own, and
drives it through the Batch API. All state lies in a folder beside the output file, so the same
command started again goes on where the last one ended, however that ended.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import secrets
import shutil
import sys
from collections.abc import Sequence
from pathlib import Path

from openai import OpenAI
from openai.types import Batch
from rich.console import Console

from blendserve.cli.follow import ENDED, follow, openai_client
from blendserve.cli.server_process import ServerFailed, free_port, running_server

# Limits protect a shared server; this one is the user's own.
_NO_LIMITS = ("--max-batch-lines", str(10**9), "--max-file-bytes", str(10**13))
_METADATA_KEY = "input_sha256"


class RunBatchError(RuntimeError):
    """The run cannot start or go on; the message says what to do."""


def main(argv: Sequence[str]) -> int:
    """Exit status: 0 every line answered, 1 some lines failed or the run did, 2 wrong usage."""
    options, server_flags = _parse(argv)
    console = Console(stderr=True)
    try:
        _check_paths(options)
        endpoint = _endpoint(options.input)
        _clear(options)
        return _run(options, server_flags, endpoint, console)
    except (RunBatchError, ServerFailed) as error:
        _say(console, f"blendserve run-batch: {error}")
        return 1
    except KeyboardInterrupt:
        console.print("Stopped. The same command goes on from here.")
        return 130


def _say(console: Console, text: str) -> None:
    # Not folded or coloured: paths in messages must stay whole, for eyes and for grep.
    console.print(text, highlight=False, markup=False, emoji=False, soft_wrap=True)


def _parse(argv: Sequence[str]) -> tuple[argparse.Namespace, list[str]]:
    parser = argparse.ArgumentParser(
        prog="blendserve run-batch",
        description="Run an OpenAI batch file offline.",
        epilog="Every flag of `blendserve serve`, so every SGLang flag, may follow.",
        allow_abbrev=False,
    )
    parser.add_argument("-i", "--input", type=Path, required=True, help="OpenAI batch file (JSONL)")
    parser.add_argument("-o", "--output", type=Path, required=True, help="answers with status 200")
    parser.add_argument(
        "--errors", type=Path, help="lines without one (default: OUTPUT's name with .errors.jsonl)"
    )
    parser.add_argument(
        "--overwrite", action="store_true", help="drop an earlier output and its state, begin anew"
    )
    options, rest = parser.parse_known_args(list(argv))
    if not options.output.name:
        parser.error(f"-o {options.output}: give the name of a file")
    if options.errors is None:
        options.errors = options.output.with_suffix(".errors.jsonl")
    options.state = options.output.with_name(options.output.name + ".blendserve")
    return options, rest


def _check_paths(options: argparse.Namespace) -> None:
    if not options.input.is_file():
        raise RunBatchError(f"input {options.input} is not a file")
    paths = [path.resolve() for path in (options.input, options.output, options.errors)]
    if len(set(paths)) < len(paths):
        raise RunBatchError("input, output and errors must be three different files")
    state = options.state.resolve()
    if any(path == state or state in path.parents for path in paths):
        raise RunBatchError(f"{options.state} holds this command's state; keep files out of it")
    if options.state.exists() and not options.state.is_dir():
        raise RunBatchError(f"{options.state} is in the way; it must be a folder, or not exist")
    for path in (options.output, options.errors):
        if path.is_dir():
            raise RunBatchError(f"{path} is a folder; give the name of a file in it")
        if not path.parent.is_dir():
            raise RunBatchError(f"the folder of {path} does not exist")
        if path.exists() and not options.overwrite:
            raise RunBatchError(
                f"{path} exists already. Give another name, or --overwrite to replace it."
            )


def _clear(options: argparse.Namespace) -> None:
    """Make room for the answers, once everything else has been found right."""
    if options.overwrite:
        options.output.unlink(missing_ok=True)
        options.errors.unlink(missing_ok=True)
        shutil.rmtree(options.state, ignore_errors=True)
    options.state.mkdir(exist_ok=True)


def _endpoint(path: Path) -> str:
    """The url of the first request; the server finds the lines that have another one."""
    with path.open("rb") as lines:
        for number, line in enumerate(lines, start=1):
            if not line.strip():
                continue
            try:
                return str(json.loads(line)["url"])
            except (ValueError, KeyError, TypeError) as error:
                raise RunBatchError(
                    f"{path}, line {number} is not a batch request: it must be a JSON object with "
                    "custom_id, method, url and body"
                ) from error
    raise RunBatchError(f"{path} has no requests")


def _run(
    options: argparse.Namespace, server_flags: list[str], endpoint: str, console: Console
) -> int:
    port = free_port()
    command = [sys.executable, "-m", "blendserve", "serve", *_NO_LIMITS, *server_flags]
    command += ["--host", "127.0.0.1", "--port", str(port)]
    command += ["--batch-dir", str(options.state / "batches")]
    log = options.state / "server.log"
    _say(console, f"Starting the engine (its log: {log}) ...")
    with running_server(command, port, log) as url:
        client = openai_client(url, {})
        batch = _find_or_create(client, options.input, endpoint)
        batch = follow(url, batch.id, console, {})
        if batch.status == "failed":
            raise RunBatchError(_faults(batch, options.input))
        for file_id, path in (
            (batch.output_file_id, options.output),
            (batch.error_file_id, options.errors),
        ):
            if file_id is not None:
                _download(client, file_id, path)
    shutil.rmtree(options.state)
    counts = batch.request_counts
    assert counts is not None
    failed = f", {counts.failed} failed in {options.errors}" if counts.failed else ""
    _say(console, f"{batch.status}: {counts.completed} answered in {options.output}{failed}")
    return 1 if counts.failed or batch.status != "completed" else 0


def _find_or_create(client: OpenAI, path: Path, endpoint: str) -> Batch:
    """The batch of an earlier run over the same input, or a new one."""
    with path.open("rb") as stream:
        digest = hashlib.file_digest(stream, "sha256").hexdigest()
    for batch in client.batches.list(limit=100):
        same = (batch.metadata or {}).get(_METADATA_KEY) == digest
        if same and (batch.status not in ENDED or batch.status == "completed"):
            return batch
    uploaded = client.files.create(file=(path.stem + ".jsonl", path.open("rb")), purpose="batch")
    return client.batches.create(
        input_file_id=uploaded.id,
        endpoint=endpoint,  # type: ignore[arg-type]
        completion_window="365d",  # type: ignore[arg-type]
        metadata={_METADATA_KEY: digest},
    )


def _download(client: OpenAI, file_id: str, path: Path) -> None:
    """Write a result file so that its name never stands for a half of it."""
    draft = path.with_name(f".{path.name}.{secrets.token_hex(4)}")
    try:
        with client.files.with_streaming_response.content(file_id) as response:
            response.stream_to_file(draft)
        with draft.open("rb") as written:
            os.fsync(written.fileno())
        draft.rename(path)
    finally:
        draft.unlink(missing_ok=True)


def _faults(batch: Batch, path: Path) -> str:
    faults = batch.errors.data if batch.errors and batch.errors.data else []
    listed = [
        f"  line {fault.line}: {fault.message} ({fault.code})"
        if fault.line
        else f"  {fault.message}"
        for fault in faults
    ]
    return "\n".join([f"{path} cannot be run:", *listed])
