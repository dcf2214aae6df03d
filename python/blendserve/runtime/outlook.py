"""How a job will go on from where it is: its course, predicted anew now and then while somebody
looks. Nobody's order changes by it."""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Callable
from concurrent.futures import Executor
from dataclasses import asdict, replace

from blendserve.batch.errors import reason_of
from blendserve.runtime.job_view import JobView
from blendserve.runtime.plan_worker import JobPlan, News, Planner

logger = logging.getLogger(__name__)

_UNTOLD = 25
# At most so often, and no more than this part of the planning process's time.
_PAUSE_SECONDS, _BUSY_PART = 2.0, 0.05


class Outlook:
    """Of one job. Use it in its event loop.

    Args:
        view: gets the course, and what of the lines in flight is computed.
        planner, thread: where it is predicted, and what waits for it.
        clock: seconds.
    """

    def __init__(
        self,
        view: JobView,
        planner: Planner,
        thread: Executor,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._view = view
        self._planner = planner
        self._thread = thread
        self._clock = clock
        self._due = 0.0
        self._task: asyncio.Task[None] | None = None

    def look(self, in_flight: list[tuple[int, int]], plan: JobPlan, news: News) -> None:
        """Brings the view up to date.

        Args:
            in_flight: output tokens so far of all lines in flight, by position.
            plan: that is walked now.
            news: what the planner has not been told, with `in_flight` as what runs.
        """
        running = [(position, tokens) for position, tokens in in_flight if tokens]
        prefill = (int(plan.prefill_tokens[position]) for position, _ in running)
        self._view.flight_prefill_tokens = sum(prefill)
        self._view.flight_output_tokens = sum(tokens for _, tokens in running)
        # SGLang tells of answers that are not streamed every 50 tokens: of those that are on their
        # way, half as many have come since.
        news = replace(
            news, running_tokens=news.running_tokens + _UNTOLD * (news.running_tokens > 0)
        )
        # The plan's own course says whether there is one to tell.
        if plan.curve is not None and self._task is None and self._clock() >= self._due:
            self._task = asyncio.create_task(self._predict(news, self._view.computed()))

    def close(self) -> None:
        if self._task is not None:
            self._task.cancel()

    async def _predict(self, news: News, computed: tuple[int, int]) -> None:
        started = self._clock()
        loop, view = asyncio.get_running_loop(), self._view
        plans = view.plans
        try:
            curve = await loop.run_in_executor(
                self._thread, self._planner.forecast, view.job_id, news
            )
            # One that a plan has overtaken is of what was before.
            if curve is not None and plans == view.plans:
                view.follow(asdict(curve), computed)
            took = self._clock() - started
            self._due = self._clock() + max(_PAUSE_SECONDS, took / _BUSY_PART)
        except Exception as error:
            # Of any type; the job goes on, and the time left is told by what was predicted before.
            logger.warning(
                "%s: its course is not predicted again: %s", view.job_id, reason_of(error)
            )
            self._due = float("inf")
        finally:
            self._task = None
