"""Reads the prompts of a job without holding up the front process's event loop.

SGLang's handlers are Python and want the interpreter lock that the event loop wants too. So the
lines are read in one thread for all jobs, a block at a time, with a rest after every line in which
the loop gets the lock.
"""

from __future__ import annotations

import asyncio
import time
from array import array
from collections import deque
from collections.abc import Sequence
from concurrent.futures import Executor
from dataclasses import dataclass, field

import numpy as np

from blendserve.batch.executor import LineSource
from blendserve.runtime.plan_worker import Planner, PromptBatch
from blendserve.runtime.prompts import Prompt, PromptReader, UnreadablePrompt

_LINES_PER_BLOCK = 64
# A waiting thread wakes within this; without a real rest the reader would have the lock again
# before the loop has noticed that it was free.
_REST_SECONDS = 1e-4


@dataclass(frozen=True)
class JobLines:
    """The plannable lines of a job by position, and the others.

    Attributes:
        lines: index in the file.
        prompt_tokens, sequences: see `Prompt`.
        unplannable: indexes of lines that the server must answer by itself.
    """

    lines: array[int] = field(default_factory=lambda: array("q"))
    prompt_tokens: array[int] = field(default_factory=lambda: array("q"))
    sequences: array[int] = field(default_factory=lambda: array("q"))
    unplannable: deque[int] = field(default_factory=deque)


async def read_prompts(
    job_id: str,
    lines: LineSource,
    pending: Sequence[int],
    reader: PromptReader,
    planner: Planner,
    thread: Executor,
) -> JobLines:
    """Read and tokenise the pending lines and give them to the planner.

    thread: has one worker, which all jobs take in turns.
    """
    loop = asyncio.get_running_loop()
    read = JobLines()
    # A job without lines is a job, too.
    for start in range(0, max(len(pending), 1), _LINES_PER_BLOCK):
        block = pending[start : start + _LINES_PER_BLOCK]
        await loop.run_in_executor(thread, _read_block, job_id, lines, block, reader, planner, read)
    return read


def _read_block(
    job_id: str,
    lines: LineSource,
    block: Sequence[int],
    reader: PromptReader,
    planner: Planner,
    read: JobLines,
) -> None:
    prompts: list[Prompt] = []
    for index in block:
        line = lines.read(index)
        try:
            prompt = reader.read(line.url, line.body)
        except UnreadablePrompt:
            # The server answers it, with the error that an online client would get.
            read.unplannable.append(index)
            continue
        finally:
            time.sleep(_REST_SECONDS)
        prompts.append(prompt)
        read.lines.append(index)
        read.prompt_tokens.append(len(prompt.token_ids))
        read.sequences.append(prompt.sequences)
    planner.append(job_id, _batch(prompts))


def _batch(prompts: Sequence[Prompt]) -> PromptBatch:
    tokens = [prompt.token_ids for prompt in prompts]
    return PromptBatch(
        tokens=np.concatenate(tokens) if tokens else np.empty(0, dtype=np.int32),
        lengths=np.array([len(ids) for ids in tokens], dtype=np.int64),
        max_output_tokens=np.array([p.max_output_tokens for p in prompts], dtype=np.int64),
        ignore_eos=np.array([p.ignore_eos for p in prompts], dtype=np.bool_),
    )
