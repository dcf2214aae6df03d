"""Reads the prompts of a job without holding up the engine process's event loop.

SGLang's handlers are Python and want the interpreter lock that the event loop wants too. So the
lines are read in one thread for all jobs, a block at a time, with a rest after every line in which
the loop gets the lock.
"""

from __future__ import annotations

import asyncio
import logging
import time
from array import array
from collections import deque
from collections.abc import Mapping, Sequence
from concurrent.futures import Executor
from dataclasses import dataclass, field
from typing import Any, Protocol, runtime_checkable

import numpy as np

from blendserve.batch.errors import reason_of
from blendserve.batch.executor import Lines
from blendserve.planner import MediaRuns
from blendserve.runtime.plan_worker import Planner, PromptBatch
from blendserve.runtime.prompt_data import Prompt

logger = logging.getLogger(__name__)

_LINES_PER_BLOCK = 64
# A waiting thread wakes within this; without a real rest the reader would have the lock again
# before the loop has noticed that it was free.
_REST_SECONDS = 1e-4


class LineReader(Protocol):
    """Reads the body of one line. Called from a worker thread."""

    def read(self, url: str, body: Mapping[str, Any]) -> Prompt:
        """Raises an exception of any type for a body that has no prompt to plan with."""
        ...


@runtime_checkable
class BlockReader(Protocol):
    """Reads many lines at a time, somewhere else. Called from a worker thread."""

    @property
    def lines_at_once(self) -> int: ...

    def read_block(self, lines: Lines, block: Sequence[int]) -> list[Prompt | None]:
        """A prompt for each line of the block, None for what cannot be read."""
        ...


@dataclass
class JobLines:
    """The plannable lines of a job by position, and the others.

    Attributes:
        lines: index in the file.
        prompt_tokens, sequences: see `Prompt`.
        unplannable: indexes of lines that the server must answer by itself.
        has_planner: the planner has all plannable lines.
    """

    lines: array[int] = field(default_factory=lambda: array("q"))
    prompt_tokens: array[int] = field(default_factory=lambda: array("q"))
    sequences: array[int] = field(default_factory=lambda: array("q"))
    unplannable: deque[int] = field(default_factory=deque)
    has_planner: bool = True

    def without_plan(self) -> JobLines:
        """The same lines, all of which the server answers by itself."""
        return JobLines(unplannable=deque([*self.unplannable, *self.lines]), has_planner=False)


async def read_prompts(
    job_id: str,
    lines: Lines,
    pending: Sequence[int],
    reader: LineReader | BlockReader,
    planner: Planner,
    thread: Executor,
) -> JobLines:
    """Read and tokenise the pending lines and give them to the planner.

    thread: has one worker, which all jobs take in turns.
    """
    loop = asyncio.get_running_loop()
    read = JobLines()
    start = 0
    # A job without lines is a job, too.
    while not start or start < len(pending):
        size = reader.lines_at_once if isinstance(reader, BlockReader) else _LINES_PER_BLOCK
        block = pending[start : start + size]
        start += size
        await loop.run_in_executor(thread, _read_block, job_id, lines, block, reader, planner, read)
    return read


def _read_block(
    job_id: str,
    lines: Lines,
    block: Sequence[int],
    reader: LineReader | BlockReader,
    planner: Planner,
    read: JobLines,
) -> None:
    prompts: list[Prompt] = []
    if isinstance(reader, BlockReader):
        found = reader.read_block(lines, block)
    else:
        found = [_read_line(lines, index, reader) for index in block]
    for index, prompt in zip(block, found, strict=True):
        if prompt is None:
            read.unplannable.append(index)
            continue
        prompts.append(prompt)
        read.lines.append(index)
        read.prompt_tokens.append(len(prompt.token_ids))
        read.sequences.append(prompt.sequences)
    if not read.has_planner:
        return
    try:
        planner.append(job_id, _batch(prompts))
    except Exception as error:
        # Of any type: the planning process may have died, or raised what comes back as it was.
        read.has_planner = False
        logger.error("%s cannot be given to the planner: %s", job_id, reason_of(error))


def _read_line(lines: Lines, index: int, reader: LineReader) -> Prompt | None:
    try:
        line = lines.read(index)
        return reader.read(line.url, line.body)
    except Exception:
        # Whatever is wrong with it: the server answers it, with the error that an online client
        # would get, or nobody can, which shows when it is sent.
        return None
    finally:
        time.sleep(_REST_SECONDS)


def _batch(prompts: Sequence[Prompt]) -> PromptBatch:
    tokens = [prompt.token_ids for prompt in prompts]
    return PromptBatch(
        tokens=np.concatenate(tokens) if tokens else np.empty(0, dtype=np.int32),
        lengths=np.array([len(ids) for ids in tokens], dtype=np.int64),
        max_output_tokens=np.array([p.max_output_tokens for p in prompts], dtype=np.int64),
        ignore_eos=np.array([p.ignore_eos for p in prompts], dtype=np.bool_),
        media=_media(prompts),
    )


def _media(prompts: Sequence[Prompt]) -> MediaRuns:
    runs = [(at, run.end, run.patches) for at, p in enumerate(prompts) for run in p.media]
    request, end, patches = np.array(runs, dtype=np.int64).reshape(-1, 3).T
    return MediaRuns(request, end, patches)
