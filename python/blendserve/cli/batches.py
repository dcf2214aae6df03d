"""``blendserve batches``: the batches of a server, with nothing but this command."""

from __future__ import annotations

import argparse
import contextlib
import os
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import IO, Any

import httpx
import openai
from openai.types import Batch
from rich.console import Console

from blendserve.batch.line_parser import UnreadableLine, read_entry
from blendserve.cli.batches_text import batch_text, faults_of, in_words, listed
from blendserve.cli.follow import ENDED, follow_with
from blendserve.cli.outcome import causes
from blendserve.cli.server_address import Server

# Exit statuses (docs/batch.md): those of `run-batch`, and one of its own.
DONE, SOME_FAILED, REFUSED, UNREACHABLE, NOT_ENDED, STOPPED = 0, 1, 2, 3, 4, 130
_FOLLOW_SECONDS = 1.0
_BLOCK_BYTES = 1 << 20
_SERVER_FAULT = 500
_UNKNOWN_ROUTE = 404


class BatchesError(RuntimeError):
    """What was asked for cannot be done; the message says what to do."""


def main(argv: Sequence[str]) -> int:
    """Exit status: see above."""
    options = _parse(argv)
    try:
        with Server(options.url, options.api_key) as server:
            status: int = options.run(server, options)
            return status
    except openai.APIStatusError as error:
        return _fault(_said(error), UNREACHABLE if error.status_code >= _SERVER_FAULT else REFUSED)
    except openai.APIConnectionError as error:
        cause = error.__cause__ or error
        return _fault(
            f"no server answers at {options.url} ({type(cause).__name__}): start one with "
            "`blendserve serve`, or name it with --url",
            UNREACHABLE,
        )
    except (httpx.HTTPError, openai.APIError) as error:
        return _fault(f"{options.url} broke off: {type(error).__name__}", UNREACHABLE)
    except BrokenPipeError:
        # Whoever read, as `head` does, has had enough.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return DONE
    except (BatchesError, OSError, ValueError) as error:
        return _fault(str(error), REFUSED)
    except KeyboardInterrupt:
        return STOPPED


def _fault(message: str, status: int) -> int:
    print(f"blendserve batches: {message}", file=sys.stderr)
    return status


def _said(error: openai.APIStatusError) -> str:
    body = error.body
    message = body.get("message") if isinstance(body, dict) else None
    return f"{message or error.message} (HTTP {error.status_code})"


# -- commands -----------------------------------------------------------------------------------


def _list(server: Server, options: argparse.Namespace) -> int:
    most = None if options.all else options.limit
    batches: list[Batch] = []
    for batch in server.client.batches.list(limit=min(options.limit, 100)):
        if most is not None and len(batches) == most:
            break
        batches.append(batch)
    if options.json:
        for batch in batches:
            print(batch.model_dump_json())
    else:
        print(listed(batches))
    return DONE


def _show(server: Server, options: argparse.Namespace) -> int:
    batch = server.client.batches.retrieve(options.id)
    print(batch.model_dump_json() if options.json else batch_text(batch))
    return DONE


def _create(server: Server, options: argparse.Namespace) -> int:
    metadata = dict(_pair(text) for text in options.metadata)
    endpoint = options.endpoint or _endpoint(options.file)
    with options.file.open("rb") as stream:
        name = options.file.name
        named = name if name.lower().endswith(".jsonl") else f"{name}.jsonl"
        upload = server.client.files.create(file=(named, stream), purpose="batch")
    batch = server.client.batches.create(
        input_file_id=upload.id,
        endpoint=endpoint,
        # Wider than OpenAI's, whose only window is 24h.
        completion_window=options.window,
        metadata=metadata or None,
    )
    if options.wait:
        print(f"{batch.id} was made of {options.file}", file=sys.stderr)
        return _waited(server, batch.id, options)
    print(batch.model_dump_json() if options.json else batch.id)
    return DONE


def _wait(server: Server, options: argparse.Namespace) -> int:
    return _waited(server, options.id, options)


def _waited(server: Server, batch_id: str, options: argparse.Namespace) -> int:
    batch = follow_with(server.client, server.http, batch_id, Console(stderr=True))
    print(batch.model_dump_json() if options.json else in_words(batch))
    return _as_status(batch)


def _cancel(server: Server, options: argparse.Namespace) -> int:
    batch = server.client.batches.cancel(options.id)
    print(batch.model_dump_json() if options.json else in_words(batch))
    return DONE


def _download(server: Server, options: argparse.Namespace) -> int:
    batch = server.client.batches.retrieve(options.id)
    with _target(options.output) as stream:
        if batch.status not in ENDED:
            batch = _so_far(server, batch, options.kind, stream, keep_on=options.follow)
        else:
            for block in _whole(server, batch, options.kind):
                stream.write(block)
    if batch.status in ENDED:
        return DONE
    print(f"{in_words(batch)}: these are the lines so far", file=sys.stderr)
    return NOT_ENDED


def _errors(server: Server, options: argparse.Namespace) -> int:
    batch = server.client.batches.retrieve(options.id)
    for line in faults_of(batch):
        print(line)
    with tempfile.NamedTemporaryFile(prefix="blendserve-errors-") as kept:
        if batch.status in ENDED:
            for block in _whole(server, batch, "error"):
                kept.write(block)
        else:
            batch = _so_far(server, batch, "error", kept, keep_on=False)
        kept.flush()
        for line in causes(Path(kept.name), most=None):
            print(line.strip())
    print(in_words(batch), file=sys.stderr)
    return _as_status(batch) if batch.status in ENDED else NOT_ENDED


# -- what they do -------------------------------------------------------------------------------


def _as_status(batch: Batch) -> int:
    counts = batch.request_counts
    whole = batch.status == "completed" and (counts is None or not counts.failed)
    return DONE if whole else SOME_FAILED


def _whole(server: Server, batch: Batch, kind: str) -> Iterator[bytes]:
    file_id = batch.output_file_id if kind == "output" else batch.error_file_id
    if file_id is None:
        return
    with server.client.files.with_streaming_response.content(file_id) as answer:
        yield from answer.iter_bytes(_BLOCK_BYTES)


def _so_far(server: Server, batch: Batch, kind: str, stream: Any, *, keep_on: bool) -> Batch:
    """Writes the lines that are there; with keep_on until the batch has ended. The batch, as it
    was when the last of them were looked for."""
    lines = 0
    while True:
        params: dict[str, str | int] = {"kind": kind, "after": lines}
        path = f"/v1/batches/{batch.id}/results"
        with server.http.stream("GET", path, params=params) as answer:
            if answer.status_code == _UNKNOWN_ROUTE:
                raise BatchesError(
                    f"{in_words(batch)}, and this server tells no results before the end"
                )
            answer.raise_for_status()
            for block in answer.iter_bytes(_BLOCK_BYTES):
                stream.write(block)
                lines += block.count(b"\n")
            stream.flush()
        status = answer.headers["Blendserve-Batch-Status"]
        if status in ENDED or not keep_on:
            return server.client.batches.retrieve(batch.id) if status in ENDED else batch
        time.sleep(_FOLLOW_SECONDS)


@contextlib.contextmanager
def _target(path: str) -> Iterator[IO[bytes]]:
    """Standard output, or a file that appears whole."""
    if path == "-":
        yield sys.stdout.buffer
        sys.stdout.buffer.flush()
        return
    target = Path(path)
    if target.is_dir():
        raise BatchesError(f"{target} is a folder; give the name of a file in it")
    with tempfile.NamedTemporaryFile(
        dir=target.parent, prefix=f".{target.name}.", delete=False
    ) as draft:
        try:
            yield draft.file
        except BaseException:
            Path(draft.name).unlink()
            raise
    os.replace(draft.name, target)


def _endpoint(path: Path) -> Any:
    """The url of the file's first line, which all others have, too."""
    with path.open("rb") as stream:
        for line in stream:
            if not line.strip():
                continue
            try:
                url = read_entry(line).fields.get("url")
            except UnreadableLine:
                break
            if isinstance(url, str):
                return url
            break
    raise BatchesError(f"{path}: its first line names no url; give --endpoint")


def _pair(text: str) -> tuple[str, str]:
    name, equals, value = text.partition("=")
    if not equals:
        raise BatchesError(f"--metadata {text}: write NAME=VALUE")
    return name, value


# -- arguments ----------------------------------------------------------------------------------


def _parse(argv: Sequence[str]) -> argparse.Namespace:
    # Before or behind the command's name, wherever people write it.
    common = argparse.ArgumentParser(add_help=False)
    common.add_argument(
        "--url",
        default=os.environ.get("OPENAI_BASE_URL") or "http://127.0.0.1:30000",
        help="the server (default: OPENAI_BASE_URL, or http://127.0.0.1:30000)",
    )
    common.add_argument(
        "--api-key",
        default=os.environ.get("OPENAI_API_KEY") or "unused",
        help="better: OPENAI_API_KEY, which other users of the machine cannot see",
    )
    common.add_argument("--json", action="store_true", help="objects as JSON lines")
    parser = argparse.ArgumentParser(
        prog="blendserve batches",
        description="List, follow and fetch the batches of a server.",
        epilog="Exit status: 0 done; 1 lines or the batch failed; 2 refused; 3 no answer from the "
        "server; 4 the batch has not ended; 130 stopped.",
        allow_abbrev=False,
    )
    commands = parser.add_subparsers(required=True, metavar="COMMAND")

    def command(name: str, run: Any, text: str, *, of_batch: bool = True) -> Any:
        made = commands.add_parser(name, help=text, parents=[common], allow_abbrev=False)
        made.set_defaults(run=run)
        if of_batch:
            made.add_argument("id", metavar="BATCH", help="batch_...")
        return made

    one = command("list", _list, "the newest batches", of_batch=False)
    one.add_argument("--limit", type=int, default=20, help="how many (default: 20)")
    one.add_argument("--all", action="store_true", help="all of them")
    command("show", _show, "one batch: status, counts, tokens, files")
    one = command("create", _create, "upload a file and make a batch of it", of_batch=False)
    one.add_argument("file", type=Path, help="requests, one JSON object per line")
    one.add_argument("--endpoint", help="default: the url of the first line")
    one.add_argument("--window", default="24h", help="30m, 24h, 7d (default: 24h)")
    one.add_argument("--metadata", action="append", default=[], metavar="NAME=VALUE")
    one.add_argument("--wait", action="store_true", help="follow it to its end")
    command("wait", _wait, "follow a batch to its end")
    command("cancel", _cancel, "stop a batch; what is finished is kept")
    one = command("download", _download, "the answers, also of a batch that still runs")
    one.add_argument("-o", "--output", default="-", help="a file (default: standard output)")
    one.add_argument("--kind", choices=("output", "error"), default="output")
    one.add_argument("--follow", action="store_true", help="go on as they come, to the end")
    command("errors", _errors, "what is wrong: bad lines, and failed ones by cause")
    return parser.parse_args(list(argv))
