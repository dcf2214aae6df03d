"""Runs one job: plans it, walks the plan from both ends, and yields the answers.

The job stays in the engine process and its tree in the planning process; the scheduler only ever
sees the next few requests of each side. A small sample runs first; when its answers are in, the
rest is planned again with the lengths that it showed, and again whenever there are twice as many
answers, while requests of the plan before keep the engine busy.
"""

from __future__ import annotations

import asyncio
import logging
from collections import Counter, defaultdict, deque
from collections.abc import AsyncGenerator, Callable, Sequence
from concurrent.futures import Executor
from dataclasses import dataclass
from functools import partial

from blendserve.batch.errors import reason_of
from blendserve.batch.executor import EngineUnavailable, LineResult, Lines
from blendserve.batch.progress import usage_of
from blendserve.planner import DualScanner, Side
from blendserve.policy import Replanning
from blendserve.runtime.dispatcher import Dispatcher, Turn
from blendserve.runtime.job_prompts import BlockReader, LineReader, read_prompts
from blendserve.runtime.job_view import JobView
from blendserve.runtime.line_client import LineSender, MemberLost
from blendserve.runtime.line_flight import EndedLine, SentLine, answered, failed_line
from blendserve.runtime.outlook import Outlook
from blendserve.runtime.plan_tag import LengthUpdate, PlanTag, likely_tokens
from blendserve.runtime.plan_walk import PlanWalk, Step
from blendserve.runtime.plan_worker import JobPlan, News, Planner, UntoldNews, no_plan

logger = logging.getLogger(__name__)

# Lines without a plan that may be with the server at a time; no credits bound them.
_MAX_UNPLANNED = 64
# New lengths of requests sent before, told with one request.
_MAX_UPDATES = 64
# A line with which so many engines of several died is not tried on yet another one.
_MAX_DEATHS = 2
# Answers that may wait to be taken before sending pauses: a disk can be slower than the engine.
_MAX_UNREAD = 1024


@dataclass(frozen=True)
class Threads:
    """Where a job's slow work is done; one worker each, for all jobs of a server.

    Attributes:
        reading: reads and tokenises prompts.
        planning: waits for the planner.
    """

    reading: Executor
    planning: Executor


class JobRunner:
    """One job, from prompts to the last answer. The dispatcher says when its lines are sent.

    Args:
        job_id: id of the batch.
        lines: the lines of its file.
        pending: indexes of the lines to run.
        on_start: called with a line's index when it is sent.
        deadline: unix seconds by which it should end, None for a job without haste.
        reader, client: the way into the server.
        planner, threads: where the job is planned and what waits for it.
        dispatcher: shares the scheduler's queues between the jobs of a server.
    """

    def __init__(
        self,
        job_id: str,
        lines: Lines,
        pending: Sequence[int],
        *,
        on_start: Callable[[int], None] = lambda _: None,
        deadline: float | None = None,
        reader: LineReader | BlockReader,
        client: LineSender,
        planner: Planner,
        threads: Threads,
        dispatcher: Dispatcher,
    ) -> None:
        self.view = JobView(job_id, deadline=deadline)
        self.deadline = deadline
        self._lines = lines
        self._pending = pending
        self._on_start = on_start
        self._reader = reader
        self._client = client
        self._planner = planner
        self._threads = threads
        self._dispatcher = dispatcher
        self._events: asyncio.Queue[EndedLine | OSError] = asyncio.Queue()
        self._closed = False
        self._sent: dict[int, SentLine] = {}
        # What each scheduler has yet to be told.
        self._to_tell: defaultdict[int | None, deque[int]] = defaultdict(deque)
        self._returned: dict[Side, deque[Step]] = {side: deque() for side in Side}
        # Engines that died, by line; and the lines that are to be tried apart from others.
        self._deaths: Counter[int] = Counter()
        self._suspects: list[int] = []
        self._unplanned = 0
        self._sent_seconds = 0.0
        self._replanning: asyncio.Task[None] | None = None
        self._news = UntoldNews()
        self._outlook = Outlook(self.view, planner, threads.planning)

    async def run(self) -> AsyncGenerator[LineResult, None]:
        """Yield one result per pending line, as they come. Closing it aborts what is in flight.

        Raises:
            EngineUnavailable: with its `in_flight` lines several engines died, one after another.
        """
        joined = False
        try:
            self._work = await read_prompts(
                self.job_id,
                self._lines,
                self._pending,
                self._reader,
                self._planner,
                self._threads.reading,
            )
            self.view.phase = "planning"
            self._begin(await self._first_plan())
            self._dispatcher.join(self)
            joined = True
            while self.view.waiting or self.view.in_flight:
                event = await self._events.get()
                if isinstance(event, OSError):
                    raise event
                if (result := self._take(event)) is not None:
                    yield result
                if self._suspects and self._events.empty():
                    raise EngineUnavailable(
                        f"{_MAX_DEATHS} engines died with the same lines", self._suspects
                    )
        finally:
            self._closed = True
            self._outlook.close()
            if self._replanning is not None:
                self._replanning.cancel()
            try:
                await self._client.abort_all()
            finally:
                for sent in self._sent.values():
                    self._dispatcher.credits.answered(sent.replica, sent.sequences)
                if joined:
                    self._dispatcher.leave(self)
                # Behind whatever is still being read. A planner that died has forgotten it, too.
                self._threads.reading.submit(self._planner.forget, self.job_id)

    # -- planning --------------------------------------------------------------------------------

    async def _plan(self, news: News) -> JobPlan:
        return await asyncio.get_running_loop().run_in_executor(
            self._threads.planning, self._planner.plan, self.job_id, news
        )

    async def _first_plan(self) -> JobPlan:
        """Without one the job goes on unplanned: each line is as good as an online request."""
        if self._work.has_planner:
            try:
                return await self._plan(News())
            except Exception as error:
                # Of any type: what the planning process raised comes back as it was.
                logger.error("%s runs without a plan: %s", self.job_id, reason_of(error))
        self._work = self._work.without_plan()
        return no_plan()

    def _begin(self, plan: JobPlan) -> None:
        self.view.begin(plan)
        self._adopt(plan, self.look().computed())
        self._replan_rule = Replanning(self.view.sampled)
        self.view.phase = "running"

    def _adopt(self, plan: JobPlan, computed: tuple[int, int]) -> None:
        """Walk this plan from now on, which was asked for when so much was computed."""
        self._walk = PlanWalk(plan, self._news.started, self._sent, self._returned)
        self.view.sampled += self._walk.sampled
        self.view.adopt(plan, computed)
        self._look()

    def _replan_if_due(self) -> None:
        if not self._replan_rule.due(self.view.observed, self._walk.sample_is_in):
            return
        if self._replanning is None and not self._scanner.exhausted:
            self._replanning = asyncio.create_task(self._replan())

    async def _replan(self) -> None:
        self._replan_rule.begins(self.view.observed, self.view.sampled)
        try:
            computed = self.look().computed()
            self._adopt(await self._plan(self._news.take(self._flight())), computed)
            self._tell_lengths()
        except Exception:
            # Of any type, as for the first plan; the job goes on with the plan that it has.
            self._replan_rule.stop()
            logger.exception("%s is not planned again", self.job_id)
        self._replanning = None
        self._dispatcher.wake()

    def look(self) -> JobView:
        """What an operator sees, and what is in flight as of now."""
        if flight := self._flight():
            self._outlook.look(flight, self._walk.plan, self._news.peek(flight))
        return self.view

    def _flight(self) -> list[tuple[int, int]]:
        """Output tokens so far of what is in flight, by position."""
        return [(at, self._client.tokens_so_far(sent.task)) for at, sent in self._sent.items()]

    def _tell_lengths(self) -> None:
        """Each scheduler is told what the new plan expects of requests that it has already."""
        self._to_tell = defaultdict(deque)
        for position, sent in self._sent.items():
            self._to_tell[sent.replica].append(position)

    # -- what the dispatcher asks for ------------------------------------------------------------

    @property
    def _scanner(self) -> DualScanner:
        return self._walk.scanner

    @property
    def job_id(self) -> str:
        return self.view.job_id

    @property
    def in_flight(self) -> int:
        return self.view.in_flight

    @property
    def unsent(self) -> int:
        return self._scanner.remaining + sum(map(len, self._returned.values()))

    @property
    def work_seconds_left(self) -> float:
        return sum(self.waiting_seconds) + self._sent_seconds

    @property
    def work_seconds_done(self) -> float:
        return self.view.done_work_seconds

    @property
    def waiting_seconds(self) -> tuple[float, float]:
        return self._scanner.remaining_seconds

    def density(self, side: Side) -> float | None:
        if self._closed or self._events.qsize() >= _MAX_UNREAD:
            return None
        return self._walk.density(side)

    def send(self, turn: Turn) -> None:
        side, step = turn.side, self._walk.take(turn.side)
        position = step.position
        sequences = self._work.sequences[position]
        replica = self._dispatcher.credits.replica(side, sequences, step.shares)
        tag = self._walk.tag(self.job_id, step, turn, self._some_updates(replica))
        self._news.started.append(position)
        task = self._start(self._work.lines[position], tag, sequences, position, replica)
        if task is None:
            self._dispatcher.credits.answered(replica, sequences)
            return
        self._dispatcher.credits.sent(side, sequences)
        seconds = tag.compute_seconds + tag.memory_seconds
        self._sent_seconds += seconds
        estimate = tag.output_tokens if tag.likely_output_tokens else None
        self._sent[position] = SentLine(task, side, step, seconds, estimate, sequences, replica)
        self._look()

    def _some_updates(self, replica: int | None) -> tuple[LengthUpdate, ...]:
        plan, to_tell = self._walk.plan, self._to_tell[replica]
        updates: list[LengthUpdate] = []
        while to_tell and len(updates) < _MAX_UPDATES:
            position = to_tell.popleft()
            sent = self._sent.get(position)
            # SGLang makes ids of its own where one line asks for several sequences.
            if sent is None or sent.estimate is None or self._work.sequences[position] > 1:
                continue
            updates.append(
                LengthUpdate(
                    sent.task.get_name(),
                    float(plan.output_tokens[position]),
                    likely_tokens(plan.likely_output_tokens[position]),
                    bool(plan.guessed[position]),
                )
            )
        return tuple(updates)

    def send_unplanned(self) -> bool:
        if self._closed or not self._work.unplannable or self._unplanned >= _MAX_UNPLANNED:
            return False
        self._unplanned += 1
        self._start(self._work.unplannable.popleft(), None)
        self._look()
        return True

    def _start(
        self,
        index: int,
        tag: PlanTag | None,
        sequences: int = 1,
        position: int | None = None,
        replica: int | None = None,
    ) -> asyncio.Task[LineResult] | None:
        try:
            task = self._client.start(self._lines.read(index), tag, sequences, replica)
        except OSError as error:
            # A fault of the disk, not of the line: this pass of the job ends, and another is tried.
            self._closed = True
            self._events.put_nowait(error)
            return None
        except Exception as error:
            # Whatever a body can raise on its way into a request is that line's answer.
            task = asyncio.create_task(answered(failed_line(index, error)))
        ended = partial(EndedLine, index=index, position=position)
        task.add_done_callback(lambda done: self._events.put_nowait(ended(done)))
        self.view.in_flight += 1
        self._on_start(index)
        return task

    # -- answers ---------------------------------------------------------------------------------

    def _take(self, ended: EndedLine) -> LineResult | None:
        """The answer of a line; whatever became of it, it is an answer to this line alone. None
        if its engine is gone, one of several: the line is to run on another."""
        self.view.in_flight -= 1
        lost = None if ended.task.cancelled() else ended.task.exception()
        if isinstance(lost, MemberLost):
            self._put_back(ended, lost)
            self._dispatcher.wake()
            return None
        if ended.task.cancelled():
            # Not by this job, which takes no more answers once it ends.
            result = failed_line(ended.index, asyncio.CancelledError("by the server"))
        elif (error := ended.task.exception()) is not None:
            result = failed_line(ended.index, error)
        else:
            result = ended.task.result()
        if ended.position is None:
            self._unplanned -= 1
        else:
            self._walk.answered(ended.position)
            self._observe(ended.position, result)
            self._replan_if_due()
        self._dispatcher.wake()
        return result

    def _put_back(self, ended: EndedLine, lost: MemberLost) -> None:
        """A line whose engine is gone goes before all else of its side, or is a suspect."""
        self._deaths[ended.index] += lost.died
        suspect = self._deaths[ended.index] >= _MAX_DEATHS
        if ended.position is None:
            self._unplanned -= 1
            if not suspect:
                self._work.unplannable.appendleft(ended.index)
        else:
            sent = self._sent.pop(ended.position)
            self._dispatcher.credits.answered(sent.replica, sent.sequences)
            self._sent_seconds = max(self._sent_seconds - sent.work_seconds, 0.0)
            if not suspect:
                self._returned[sent.side].append(sent.step)
        if suspect:
            self._suspects.append(ended.index)
        self.view.returned += 1
        self._look()

    def _observe(self, position: int, result: LineResult) -> None:
        sent = self._sent.pop(position)
        self._dispatcher.credits.answered(sent.replica, sent.sequences)
        self._sent_seconds = max(self._sent_seconds - sent.work_seconds, 0.0)
        self.view.done_work_seconds += sent.work_seconds
        usage = usage_of(result.body)
        self.view.done_work_tokens += (
            int(self._walk.plan.prefill_tokens[position]) + usage.output_tokens
        )
        if result.status_code == 200:
            # Of several answers to one prompt the usage is the sum.
            answers = len((result.body or {}).get("choices") or [None])
            tokens = usage.output_tokens // answers
            self._news.ended(position, tokens)
            self.view.count_answer(usage.input_tokens, usage.cached_tokens, tokens, sent.estimate)
        elif result.status_code is None or result.status_code < 500:
            # The client's fault is found before any queue, as is what never became a request; the
            # engine's may be found after.
            self._dispatcher.credits.refused(sent.side, sent.sequences, sent.replica)

    def _look(self) -> None:
        """Bring the operator's view up to date."""
        self.view.waiting = self.unsent + len(self._work.unplannable) + len(self._suspects)
        self.view.target_density = self._scanner.target_density
        self.view.left_density = self._scanner.density(Side.LEFT)
        self.view.right_density = self._scanner.density(Side.RIGHT)
