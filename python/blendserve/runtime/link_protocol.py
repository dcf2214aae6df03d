"""What a coordinator and an engine say to each other over HTTP. Knows neither SGLang nor a socket.

Both ends send frames: a line of JSON, and as many bytes after it as its "bytes" says. Bodies and
answers travel as those bytes, just as SGLang's routes read and write them.

    POST /blendserve/link                    one stream per coordinator, as long as it lives:
        {"hello": {...}}                     first: what the engine is (`EngineDescription`)
        {"report": 0, "bytes": 310}          of a scheduler (`SchedulerReport`, msgpack), which has
                                             taken nothing when the stream begins
        {"tokens": {"rid": 12}}              output tokens so far of lines that run
        {"answer": "rid", "status": 200, "bytes": 812}
        {"fingerprint": "..."}               it has other weights now
        {"taken": true}                      another coordinator has the engine; the last frame
        {}                                   nothing new
    POST /blendserve/link/SESSION/lines      {"rid", "url", "salt", "bytes"}: lines to run, as they
                                             come, for as long as the stream lives
    POST /blendserve/link/SESSION/abort      {"rids": [...]}
    POST /blendserve/prompts                 {"url", "bytes"}: bodies to read; see `pack_prompts`
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import orjson
from pydantic import BaseModel, ConfigDict

from blendserve.runtime.prompt_data import MediaRun, Prompt

LINK_VERSION = 1
"""Both ends must have the same."""
HEARTBEAT_SECONDS = 1.0
"""An engine sends a frame at least this often."""
_MAX_HEAD_BYTES = 4 << 20


class LinkError(ValueError):
    """The other end does not speak this protocol; the message says in what."""


def other_version(coordinators: int, engines: int) -> str:
    """What is wrong, and the remedy."""
    return (
        f"the coordinator speaks version {coordinators} of the link, and the engine {engines}: "
        "install the same release of BlendServe on both"
    )


class LinkHello(BaseModel):
    """What a coordinator says of itself when it opens a stream."""

    model_config = ConfigDict(extra="forbid")

    coordinator: str
    link_version: int


class EngineDescription(BaseModel):
    """What an engine says of itself.

    Attributes:
        session: names the stream.
        release: of BlendServe.
        model_config_json, hardware, tensor_ranks: what its cost model is made of.
        dp_size: data-parallel schedulers in it.
        kv_tokens: of each of them; None: not known.
        shares_reads: its attention reads what running requests share once for all of them.
    """

    session: str
    link_version: int
    release: str
    endpoints: list[str]
    models: list[str]
    served_model: str
    fingerprint: str
    model_config_json: dict[str, Any]
    hardware: dict[str, Any]
    tensor_ranks: int
    dp_size: int
    kv_tokens: int | None
    shares_reads: bool


def frame(head: dict[str, Any], content: bytes | None = None) -> bytes:
    """One frame."""
    if content is None:
        return orjson.dumps(head, option=orjson.OPT_APPEND_NEWLINE)
    return orjson.dumps({**head, "bytes": len(content)}, option=orjson.OPT_APPEND_NEWLINE) + content


class FrameReader:
    """Cuts what arrives into frames."""

    def __init__(self) -> None:
        self._buffer = bytearray()
        self._head: dict[str, Any] | None = None

    @property
    def empty(self) -> bool:
        """Nothing has begun that has not ended."""
        return not self._buffer and self._head is None

    def feed(self, block: bytes) -> Iterator[tuple[dict[str, Any], bytes]]:
        """The frames that this block completes: head and content. Raises LinkError."""
        self._buffer += block
        place = 0
        try:
            while True:
                if self._head is None:
                    end = self._buffer.find(b"\n", place)
                    if end < 0:
                        if len(self._buffer) - place > _MAX_HEAD_BYTES:
                            raise LinkError("a frame's head is too long")
                        return
                    self._head = _head(bytes(self._buffer[place:end]))
                    place = end + 1
                size = self._head.get("bytes", 0)
                if len(self._buffer) - place < size:
                    return
                content = bytes(self._buffer[place : place + size])
                place += size
                head, self._head = self._head, None
                yield head, content
        finally:
            del self._buffer[:place]


def _head(line: bytes) -> dict[str, Any]:
    try:
        head = orjson.loads(line)
    except orjson.JSONDecodeError as error:
        raise LinkError("a frame does not begin with JSON") from error
    if not isinstance(head, dict):
        raise LinkError("a frame's head is no object")
    size = head.get("bytes", 0)
    if not isinstance(size, int) or size < 0:
        raise LinkError("a frame's size is no number of bytes")
    return head


def frames(data: bytes) -> list[tuple[dict[str, Any], bytes]]:
    """All frames of a body. Raises LinkError, also for one that is cut short."""
    reader = FrameReader()
    found = list(reader.feed(data))
    if not reader.empty:
        raise LinkError("the last frame is cut short")
    return found


def pack_prompts(prompts: Sequence[Prompt | None]) -> bytes:
    """Prompts, None where a body cannot be read, as one frame: the tokens are int32, end to end."""
    read = [prompt for prompt in prompts if prompt is not None]
    tokens = [prompt.token_ids for prompt in read]
    head = {
        "lengths": [-1 if prompt is None else len(prompt.token_ids) for prompt in prompts],
        "limits": [prompt.max_output_tokens for prompt in read],
        "exact": [prompt.ignore_eos for prompt in read],
        "sequences": [prompt.sequences for prompt in read],
        "media": [[(run.end, run.patches) for run in prompt.media] for prompt in read],
    }
    joined = np.concatenate(tokens) if tokens else np.empty(0, dtype=np.int32)
    return frame(head, joined.astype("<i4", copy=False).tobytes())


def unpack_prompts(data: bytes) -> list[Prompt | None]:
    """The other way. Raises LinkError."""
    try:
        [(head, content)] = frames(data)
        tokens = np.frombuffer(content, dtype="<i4").astype(np.int32, copy=False)
        lengths = head["lengths"]
        media = [[MediaRun(*run) for run in runs] for runs in head["media"]]
        rest = zip(head["limits"], head["exact"], head["sequences"], media, strict=True)
        prompts: list[Prompt | None] = []
        place = 0
        for length in lengths:
            if length < 0:
                prompts.append(None)
                continue
            prompts.append(Prompt(tokens[place : place + length], *next(rest)))
            place += length
        if place != len(tokens):
            raise LinkError("the prompts' lengths are not those of the tokens")
    except (KeyError, TypeError, ValueError, StopIteration) as error:
        raise LinkError(f"an engine's prompts cannot be read: {error}") from error
    return prompts
