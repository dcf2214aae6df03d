"""The programs of a job that were told to go on: what `JobRunner` sends instead of lines.

A line is a request that the server sends itself. A program is in the client's process, where it is
held at its first request; to send it means to tell the client "go", with a ticket. Its requests
come by HTTP as any do, and carry the program's plan from the ticket on.
"""

from __future__ import annotations

import asyncio
import time
import uuid
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from blendserve.batch.executor import BatchLine, LineError, LineResult
from blendserve.planner import NextUse
from blendserve.runtime.dispatcher import Dispatcher
from blendserve.runtime.later_lengths import LaterLengths
from blendserve.runtime.plan_tag import PlanTag, UseTag
from blendserve.runtime.tickets import Tickets

_ABORT_INTERVAL_SECONDS = 0.05
# A program that was told to go and has sent nothing for so long gives its place in the scheduler's
# queue to others: its client may be slow, or stopped, and batches must not wait for it.
_ARRIVAL_SECONDS = 2.0
# Longer than any prompt: stands for all that a request has.
_WHOLE = 1 << 40

Meta = Mapping[str, Any]
GoSender = Callable[[int, str | None], None]


@dataclass(eq=False)
class _Request:
    """One request of a program, with the engine. `sequences`: engine requests made of it."""

    name: str
    ordinal: int
    sequences: int


@dataclass(eq=False)
class _Program:
    """A program that runs. Implements `TicketHolder`.

    Attributes:
        queued: it has credits of a queue, for its first request.
        first: the answer to its first request, None while there is none.
    """

    client: ProgramClient
    index: int
    rid: str
    tag: PlanTag | None
    sequences: int
    replica: int | None
    ended: asyncio.Future[None]
    ticket: str | None = None
    queued: bool = True
    requests: int = 0
    first: LineResult | None = None
    in_flight: dict[str, _Request] = field(default_factory=dict)

    def begin(self, obj: Any) -> str:
        return self.client.begin(self, obj)

    def end(self, name: str, outputs: Sequence[Meta], refused: bool) -> None:
        self.client.end(self, name, outputs, refused)


class ProgramClient:
    """Stands where a `LineClient` does, in `JobRunner`.

    Args:
        salt: of the programs' tenant; see `cache_salt`.
        go: tells the client which program goes on, with which ticket; None for one without a plan.
        abort, tokens_so_far: as of `LineClient`.

    Attributes:
        active_at: when a request of these programs last came or ended, by the monotonic clock.
    """

    def __init__(
        self,
        salt: str,
        go: GoSender,
        *,
        tickets: Tickets,
        dispatcher: Dispatcher,
        abort: Callable[[str], None],
        tokens_so_far: Callable[[str], int],
    ) -> None:
        self._salt = salt
        self._go = go
        self._tickets = tickets
        self._dispatcher = dispatcher
        self._abort = abort
        self._tokens_so_far = tokens_so_far
        self._programs: dict[int, _Program] = {}
        self._lengths = LaterLengths()
        self.active_at = time.monotonic()

    # -- what JobRunner calls ----------------------------------------------------------------------

    def start(
        self, line: BatchLine, tag: PlanTag | None, sequences: int, replica: int | None = None
    ) -> asyncio.Task[LineResult]:
        """Let a program go on; the task ends when it has ended."""
        loop = asyncio.get_running_loop()
        rid = uuid.uuid4().hex
        program = _Program(self, line.index, rid, tag, sequences, replica, loop.create_future())
        if tag is not None:
            program.ticket = self._tickets.issue(program, self._salt)
            loop.call_later(_ARRIVAL_SECONDS, self._lapse, program)
        self._programs[line.index] = program
        self._go(line.index, program.ticket)
        return asyncio.create_task(self._result(program), name=rid)

    def tokens_so_far(self, task: asyncio.Task[LineResult]) -> int:
        """Output tokens so far of a program's first request."""
        return self._tokens_so_far(task.get_name())

    async def abort_all(self) -> None:
        """Forget all programs, end what they have with the engine, and wait until it let go."""
        programs = list(self._programs.values())
        for program in programs:
            self._forget(program)
        try:
            while rids := [name for program in programs for name in program.in_flight]:
                for rid in rids:
                    # Asked again until it ends: a request is not known before it is tokenised.
                    self._abort(rid)
                await asyncio.sleep(_ABORT_INTERVAL_SECONDS)
        finally:
            for program in programs:
                self.program_ended(program.index)

    # -- what the client's side tells --------------------------------------------------------------

    @property
    def requests(self) -> int:
        """Requests of these programs that are with the engine."""
        return sum(len(program.in_flight) for program in self._programs.values())

    def program_ended(self, index: int) -> None:
        """The client says so; a number that does not run is passed over."""
        program = self._programs.pop(index, None)
        if program is None:
            return
        self._forget(program)
        self._lengths.program_ended(program.requests)
        if not program.ended.done():
            program.ended.set_result(None)

    def _forget(self, program: _Program) -> None:
        if program.ticket is not None:
            self._tickets.withdraw(program.ticket)

    async def _result(self, program: _Program) -> LineResult:
        await program.ended
        if program.first is not None:
            return program.first
        if program.requests:
            # It was with the engine, and has no answer.
            return LineResult(program.index, program.rid, 500, {})
        if program.tag is not None and not program.queued:
            # The runner will take back what was taken back already.
            self._dispatcher.credits.sent(program.tag.side, program.sequences)
        error = LineError("not_sent", "The program ended before it sent a request.")
        return LineResult(program.index, program.rid, error=error)

    def _lapse(self, program: _Program) -> None:
        if program.requests or program.tag is None or program.ended.done():
            return
        program.queued = False
        self._dispatcher.credits.refused(program.tag.side, program.sequences)
        self._dispatcher.wake()

    # -- requests with a ticket --------------------------------------------------------------------

    def begin(self, program: _Program, obj: Any) -> str:
        """Write the plan on a request of SGLang's; see `TicketHolder`."""
        assert program.tag is not None
        self.active_at = time.monotonic()
        ordinal, program.requests = program.requests, program.requests + 1
        sequences = _sequences(obj)
        if ordinal == 0:
            tag, name = program.tag, program.rid
            sequences = program.sequences
        else:
            tag, name = self._later_tag(program, obj, ordinal), uuid.uuid4().hex
        if self._lengths.goes_on(ordinal) and tag.use is not None:
            tag = replace(tag, use=_needed_now(tag.use))
        if ordinal or not program.queued:
            self._dispatcher.credits.sent(tag.side, sequences)
        program.queued = True
        params = obj.sampling_params
        custom = {**(params.get("custom_params") or {}), **tag.to_params()}
        obj.sampling_params = {**params, "custom_params": custom}
        if obj.rid is None:
            # SGLang makes several of it where the request stands for several.
            obj.rid = name
        if program.replica is not None:
            obj.routed_dp_rank = program.replica
        program.in_flight[name] = _Request(name, ordinal, sequences)
        return name

    def _later_tag(self, program: _Program, obj: Any, ordinal: int) -> PlanTag:
        """The place of a request after the first: before all programs that have not begun."""
        assert program.tag is not None
        params = obj.sampling_params
        expected, likely = self._lengths.expected(
            ordinal, params.get("max_new_tokens"), bool(params.get("ignore_eos"))
        )
        compute, memory = self._dispatcher.waiting_seconds
        return replace(
            program.tag,
            output_tokens=expected,
            likely_output_tokens=likely,
            # The job's work is counted by its first requests.
            compute_seconds=0.0,
            memory_seconds=0.0,
            rest_compute_seconds=compute,
            rest_memory_seconds=memory,
            updates=(),
            goes_on=True,
        )

    def end(self, program: _Program, name: str, outputs: Sequence[Meta], refused: bool) -> None:
        """See `TicketHolder`."""
        request = program.in_flight.pop(name, None)
        if request is None:
            return
        self.active_at = time.monotonic()
        self._lengths.answered(request.ordinal, [_count(meta, _OUTPUT) for meta in outputs])
        if request.ordinal == 0:
            program.first = _answer(program, outputs, refused)
        elif refused and program.tag is not None:
            self._dispatcher.credits.refused(program.tag.side, request.sequences)
        self._dispatcher.wake()


_PROMPT, _OUTPUT, _CACHED = "prompt_tokens", "completion_tokens", "cached_tokens"


def _count(meta: Meta, name: str) -> int:
    value = meta.get(name)
    return value if isinstance(value, int) else 0


def _answer(program: _Program, outputs: Sequence[Meta], refused: bool) -> LineResult | None:
    if refused:
        return LineResult(program.index, program.rid, 400, {})
    if not outputs:
        return None
    prompt, output, cached = (
        sum(_count(meta, name) for meta in outputs) for name in (_PROMPT, _OUTPUT, _CACHED)
    )
    usage = {_PROMPT: prompt, _OUTPUT: output, "prompt_tokens_details": {_CACHED: cached}}
    body = {"usage": usage, "choices": [None] * len(outputs)}
    return LineResult(program.index, program.rid, 200, body)


def _sequences(obj: Any) -> int:
    prompts = obj.text if isinstance(obj.text, list) else [None]
    n = obj.sampling_params.get("n") or 1
    return len(prompts) * (1 if n == 1 else n + 1)


def _needed_now(use: UseTag) -> UseTag:
    """What a request has beyond the prefixes that others need is needed by its program's next."""
    return replace(use, next_uses=(*use.next_uses, NextUse(_WHOLE, use.due, use.side)))
