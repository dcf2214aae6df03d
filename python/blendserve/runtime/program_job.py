"""A job whose requests are frontend programs that a client holds back until it is told "go"."""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import Callable, Sequence
from contextlib import aclosing
from dataclasses import dataclass, field
from typing import Any

from blendserve.batch.executor import BatchLine
from blendserve.planner import Side
from blendserve.runtime.dispatcher import Dispatcher
from blendserve.runtime.job_runner import JobRunner, Threads
from blendserve.runtime.job_view import JobView
from blendserve.runtime.plan_worker import Planner
from blendserve.runtime.program_client import ProgramClient
from blendserve.runtime.prompts import PromptReader

# Programs that may be told to go before the client has room for them: it starts the next one
# without waiting for the server.
_AHEAD = 16
# If programs run and none has sent anything for so long, they may wait for others that are held.
_STUCK_SECONDS = 5.0


@dataclass
class ProgramView(JobView):
    """A job of programs as an operator sees it; its lines are programs.

    Attributes:
        name: of the program.
        programs: how many there are.
        ended, failed: of these; a failed one has ended, too.
        running_limit: programs that may run at once, None for any number.
        owner: salt of the tenant; nobody is shown it.
        started_at: unix seconds.
    """

    name: str = ""
    programs: int = 0
    ended: int = 0
    failed: int = 0
    running_limit: int | None = None
    owner: str = ""
    started_at: float = field(default_factory=time.time)


class FirstPrompts:
    """The first requests of a job's programs, as lines for `/generate`."""

    def __init__(self, bodies: Sequence[dict[str, Any]]) -> None:
        self._bodies = bodies

    def read(self, index: int) -> BatchLine:
        return BatchLine(index, "", "/generate", self._bodies[index])


class ProgramJob(JobRunner):
    """The dispatcher sends these programs as it sends the lines of batches.

    Args:
        view: of this job.
        bodies: the first request of each program.
        client: tells the programs to go on.
        on_limit: called with a new limit on the programs that run at once.
        reader, planner, threads, dispatcher: as of `JobRunner`.
    """

    view: ProgramView

    def __init__(
        self,
        view: ProgramView,
        bodies: Sequence[dict[str, Any]],
        client: ProgramClient,
        on_limit: Callable[[int], None],
        *,
        reader: PromptReader,
        planner: Planner,
        threads: Threads,
        dispatcher: Dispatcher,
    ) -> None:
        super().__init__(
            view.job_id,
            FirstPrompts(bodies),
            range(len(bodies)),
            deadline=view.deadline,
            reader=reader,
            client=client,
            planner=planner,
            threads=threads,
            dispatcher=dispatcher,
        )
        self.view = view
        self.programs = client
        self._on_limit = on_limit

    async def run_all(self) -> None:
        """Until every program has ended. Cancelling it aborts what is in flight."""
        watch = asyncio.create_task(self._watch())
        try:
            async with aclosing(self.run()) as results:
                async for _ in results:
                    self.view.ended += 1
        finally:
            watch.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await watch

    def ended(self, indexes: Sequence[int], failed: Sequence[int]) -> None:
        """The client says which programs have ended; `failed` are others."""
        self.view.failed += len(failed)
        for index in (*indexes, *failed):
            self.programs.program_ended(index)

    # -- what the dispatcher asks for ------------------------------------------------------------

    def density(self, side: Side) -> float | None:
        return super().density(side) if self._has_room() else None

    def send_unplanned(self) -> bool:
        return self._has_room() and super().send_unplanned()

    def _has_room(self) -> bool:
        limit = self.view.running_limit
        return limit is None or self.in_flight < limit + _AHEAD

    async def _watch(self) -> None:
        """Programs that wait for the answers of held ones would wait for ever: twice as many may
        run whenever nothing has come of them for some seconds."""
        while True:
            await asyncio.sleep(_STUCK_SECONDS / 5)
            limit = self.view.running_limit
            idle = time.monotonic() - self.programs.active_at
            if limit is None or not self.in_flight or self.programs.requests:
                continue
            if idle >= _STUCK_SECONDS and limit < self.view.programs:
                self.view.running_limit = limit * 2
                self.programs.active_at = time.monotonic()
                self._on_limit(limit * 2)
                self._dispatcher.wake()
