"""Several jobs over one pair of queues: whose line goes next."""

from __future__ import annotations

import asyncio
import math
from dataclasses import dataclass, field

import pytest

from blendserve.planner import Side
from blendserve.runtime.credits import Credits
from blendserve.runtime.dispatcher import Dispatcher, Turn
from blendserve.runtime.feedback import SchedulerReport
from blendserve.runtime.pacing import Pacer

LEFT, RIGHT = Side.LEFT, Side.RIGHT
DEPTH = 16


@dataclass(eq=False)
class FakeJob:
    """A job whose requests are their densities, from the compute end to the memory end; each takes
    `seconds` of work."""

    job_id: str
    requests: list[float]
    deadline: float | None = None
    seconds: float = 1.0
    unplanned: int = 0
    done: float = 0.0
    turns: list[Turn] = field(default_factory=list)

    @property
    def in_flight(self) -> int:
        return len(self.turns)

    @property
    def unsent(self) -> int:
        return len(self.requests)

    @property
    def work_seconds_left(self) -> float:
        return self.seconds * (len(self.requests) + len(self.turns))

    @property
    def work_seconds_done(self) -> float:
        return self.done

    @property
    def waiting_seconds(self) -> tuple[float, float]:
        return sum(self.requests), float(len(self.requests))

    def density(self, side: Side) -> float | None:
        return self.requests[0 if side is LEFT else -1] if self.requests else None

    def send(self, turn: Turn) -> None:
        self.requests.pop(0 if turn.side is LEFT else -1)
        self.turns.append(turn)
        LOG.append((turn.side, self.job_id))
        CREDITS[0].sent(turn.side, 1)

    def send_unplanned(self) -> bool:
        if not self.unplanned:
            return False
        self.unplanned -= 1
        return True


LOG: list[tuple[Side, str]] = []
CREDITS: list[Credits] = []


def job(name: str, *densities: float, **more) -> FakeJob:
    return FakeJob(name, list(densities), **more)


class Clock:
    now = 1_000.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture
def dispatcher(clock) -> Dispatcher:
    LOG.clear()
    CREDITS[:] = [Credits()]
    return Dispatcher(CREDITS[0], Pacer(lambda: False), clock)


def dispatched(dispatcher: Dispatcher, *jobs: FakeJob) -> dict[Side, list[str]]:
    """Who was sent on each side, with the credits of the start."""

    async def scenario() -> None:
        for each in jobs:
            dispatcher.join(each)
        for _ in range(100):
            await asyncio.sleep(0)
        for each in jobs:
            dispatcher.leave(each)

    asyncio.run(scenario())
    return {side: [name for where, name in LOG if where is side] for side in Side}


def test_the_left_front_of_one_job_runs_with_the_right_front_of_another(dispatcher):
    exams = job("exams", *[100.0 - k for k in range(40)])
    videos = job("videos", *[0.5 - k / 1000 for k in range(40)])
    sent = dispatched(dispatcher, videos, exams)
    assert sent == {LEFT: ["exams"] * DEPTH, RIGHT: ["videos"] * DEPTH}


def test_each_side_takes_the_front_that_lies_furthest_out(dispatcher):
    a = job("a", 90, 40, 10, *[2.0] * 20, 0.3, 0.2)
    b = job("b", 60, 50, *[3.0] * 20, 0.27, 0.1)
    sent = dispatched(dispatcher, a, b)
    assert sent[LEFT][:6] == ["a", "b", "b", "a", "a", "b"]
    assert sent[RIGHT][:5] == ["b", "a", "a", "b", "a"]


def test_a_side_does_not_change_the_job_for_a_little(dispatcher):
    a, b = job("a", 10, 8, 7.9, *[1.0] * 30), job("b", 10, 9.9, 9.8, 8, *[1.0] * 30)
    sent = dispatched(dispatcher, a, b)
    assert sent[LEFT][:8] == ["a", "a", "b", "b", "b", "b", "a", "a"]


def test_equal_fronts_go_in_the_order_of_submission(dispatcher):
    sent = dispatched(dispatcher, job("first", *[1.0] * 40), job("second", *[1.0] * 40))
    assert sent == {LEFT: ["first"] * DEPTH, RIGHT: ["first"] * DEPTH}


def test_ranks_count_the_requests_of_a_side_whoever_they_belong_to(dispatcher):
    jobs = [job("a", 9, 5, 1), job("b", 8, 4, 2)]
    dispatched(dispatcher, *jobs)
    for side in Side:
        turns = [turn for each in jobs for turn in each.turns if turn.side is side]
        assert sorted(turn.rank for turn in turns) == list(range(len(turns)))
        assert turns


def test_the_target_is_that_of_all_that_is_left_of_all_jobs(dispatcher):
    a, b = job("a", 9, 7), job("b", 2)
    dispatched(dispatcher, a, b)
    assert a.turns[0].waiting_seconds == (9 + 7 + 2, 3)
    assert dispatcher.target_density == math.inf


# -- deadlines


def test_a_job_that_would_miss_its_deadline_goes_first_on_both_sides(dispatcher, clock):
    long = job("long", *[9.0] * 40, *[0.1] * 40)
    late = job("late", *[1.0] * 60, deadline=clock.now + 60)
    sent = dispatched(dispatcher, long, late)
    assert sent == {LEFT: ["late"] * DEPTH, RIGHT: ["late"] * DEPTH}


def test_a_job_with_time_enough_is_blended_as_any_other(dispatcher, clock):
    long = job("long", *[9.0] * 40, *[0.1] * 40)
    calm = job("calm", *[1.0] * 60, deadline=clock.now + 600)
    sent = dispatched(dispatcher, long, calm)
    assert sent == {LEFT: ["long"] * DEPTH, RIGHT: ["long"] * DEPTH}


def test_when_an_urgent_job_has_nothing_left_to_send_the_others_go_on(dispatcher, clock):
    late = job("late", 1.0, 1.0, 1.0, deadline=clock.now + 1)
    sent = dispatched(dispatcher, job("long", *[9.0] * 60), late)
    assert sent[LEFT][:2] + sent[RIGHT][:1] == ["late"] * 3
    assert sent[LEFT][2:] + sent[RIGHT][1:] == ["long"] * (2 * DEPTH - 3)


def test_jobs_with_earlier_deadlines_count_in_the_time_that_a_job_has(dispatcher, clock):
    # Each alone could wait; one after the other, the second is late.
    early = job("early", *[1.0] * 100, deadline=clock.now + 200)
    later = job("later", *[9.0] * 100, deadline=clock.now + 210)
    assert dispatched(dispatcher, later, early) == {
        LEFT: ["early"] * DEPTH,
        RIGHT: ["early"] * DEPTH,
    }


def test_equal_deadlines_go_in_the_order_of_submission(dispatcher, clock):
    first = job("first", *[1.0] * 40, deadline=clock.now + 1)
    second = job("second", *[9.0] * 40, deadline=clock.now + 1)
    sent = dispatched(dispatcher, first, second)
    assert set(sent[LEFT] + sent[RIGHT]) == {"first"}


def test_the_time_left_follows_the_pace_so_far(dispatcher, clock):
    due = job("due", *[1.0] * 100, deadline=clock.now + 1_000)

    async def scenario() -> None:
        dispatcher.join(due)
        assert dispatcher.pace == 1.0
        assert dispatcher.urgent() == []
        clock.now += 300
        due.done = 21.0  # a tenth of what the cost model says
        assert dispatcher.pace == pytest.approx(0.1)
        assert dispatcher.urgent() == [due]
        due.done = 600.0
        assert dispatcher.urgent() == []
        dispatcher.leave(due)

    asyncio.run(scenario())


# -- flow


def test_lines_without_a_plan_need_no_credits(dispatcher):
    plain = job("plain", unplanned=70)
    for side in Side:
        CREDITS[0].sent(side, DEPTH)
    busy = job("busy", *[1.0] * 10)
    busy.turns.append(Turn(LEFT, 0, 1.0))  # in flight, so the credits are not settled
    assert dispatched(dispatcher, busy, plain) == {LEFT: [], RIGHT: []}
    assert plain.unplanned == 0


def test_one_line_is_sent_in_a_round_of_the_event_loop(dispatcher):
    async def scenario() -> None:
        long = job("long", *[1.0] * 60)
        dispatcher.join(long)
        most = before = 0
        while before < 2 * DEPTH:
            await asyncio.sleep(0)
            most, before = max(most, len(LOG) - before), len(LOG)
        assert most == 1
        dispatcher.leave(long)

    asyncio.run(scenario())


def test_the_view_names_the_outermost_fronts_and_who_is_in_a_hurry(dispatcher, clock):
    async def scenario() -> None:
        jobs = [job("a", 9, 5, 1), job("b", 7, 0.5, deadline=clock.now + 1)]
        for each in jobs:
            dispatcher.join(each)
        view = dispatcher.view()
        assert view.densities == {"left": 9, "right": 0.5}
        assert view.target_density == dispatcher.target_density
        assert view.urgent == ["b"]
        assert (view.queued, view.available) == ({"left": 0, "right": 0}, {"left": 16, "right": 16})
        for each in jobs:
            dispatcher.leave(each)
        assert dispatcher.view().densities == {"left": None, "right": None}

    asyncio.run(scenario())


def test_credits_that_come_back_are_used_and_leaving_ends_it(dispatcher):
    async def scenario() -> None:
        long = job("long", *[1.0] * 60)
        dispatcher.join(long)
        for _ in range(100):
            await asyncio.sleep(0)
        assert len(LOG) == 2 * DEPTH
        CREDITS[0].on_report(SchedulerReport(taken={"left": 4, "right": 2}))
        dispatcher.wake()
        for _ in range(100):
            await asyncio.sleep(0)
        assert len(LOG) == 2 * DEPTH + 6
        dispatcher.leave(long)
        await asyncio.sleep(0)
        assert len(asyncio.all_tasks()) == 1

    asyncio.run(scenario())
