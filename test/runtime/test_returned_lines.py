"""Lines whose engine is gone, one of several: they go again, before all others."""

from __future__ import annotations

import asyncio
from collections import Counter

import pytest
from job_server import Inline, Run, answer_200, mixed

from blendserve.batch.executor import EngineUnavailable
from blendserve.planner import Side
from blendserve.runtime.job_runner import Threads
from blendserve.runtime.line_client import MemberLost


class Lost(MemberLost, ConnectionError):
    """As the fake server raises it."""


class LosesSome:
    """Answers, but for the first so many times that a line of `lost` comes."""

    def __init__(self, lost, times=1, died=True):
        self.lost, self.times, self.died = lost, times, died
        self.seen = Counter()

    def __call__(self, line):
        self.seen[line.index] += 1
        if line.index in self.lost and self.seen[line.index] <= self.times:
            raise Lost("gone", died=self.died)
        return answer_200(line)


def run_with(respond, count=200, **more):
    run = Run(mixed(count), respond=respond, **more)
    asyncio.run(run.finish())
    return run


def test_a_line_whose_engine_is_gone_is_answered_by_another():
    respond = LosesSome({3, 40, 41, 150})
    run = run_with(respond)
    assert sorted(run.answered()) == list(range(200))
    assert {index for index, times in respond.seen.items() if times == 2} == respond.lost
    assert Counter(run.started)[40] == 2
    assert run.runner.view.returned == 4
    assert (run.runner.view.waiting, run.runner.view.in_flight) == (0, 0)


def test_it_goes_before_all_that_its_side_has_not_sent():
    respond = LosesSome({80})
    run = run_with(respond)
    sides = {side: run.sent_on(side) for side in Side}
    [side] = [side for side, sent in sides.items() if 80 in sent]
    first = sides[side].index(80)
    again = sides[side].index(80, first + 1)
    # What was sent meanwhile, as the credits allowed, and no more than a step's answers let go.
    assert again - first <= 16 + 2 * run.server.per_step


def test_its_side_and_rank_are_as_of_any_other():
    run = run_with(LosesSome({80}))
    for side in Side:
        ranks = [sent.tag.rank for sent in run.server.sent if sent.tag.side is side]
        assert ranks == sorted(ranks)
    assert len({sent.tag.side for sent in run.server.sent if sent.index == 80}) == 1


def test_an_unplanned_line_goes_again_too():
    bodies = mixed(40)
    bodies[7]["unreadable"] = True
    lost = []

    async def scenario():
        run = Run(bodies)
        start = run.server.start

        def start_or_lose(line, tag, sequences, replica=None):
            if line.index == 7 and not lost:
                lost.append(7)

                async def gone():
                    raise Lost("gone", died=True)

                return asyncio.create_task(gone())
            return start(line, tag, sequences, replica)

        run.server.start = start_or_lose
        await run.finish()
        return run

    run = asyncio.run(scenario())
    assert sorted(run.answered()) == list(range(40))
    assert Counter(run.started)[7] == 2


def test_a_line_with_which_two_engines_died_is_not_tried_on_a_third():
    respond = LosesSome({40, 90}, times=9)
    with pytest.raises(EngineUnavailable) as told:
        run_with(respond)
    assert told.value.in_flight
    assert told.value.in_flight <= {40, 90}
    assert max(respond.seen[index] for index in told.value.in_flight) == 2


def test_engines_that_were_asked_to_leave_blame_no_line():
    respond = LosesSome({40}, times=5, died=False)
    run = run_with(respond)
    assert sorted(run.answered()) == list(range(200))
    assert respond.seen[40] == 6


def test_a_new_plan_does_not_take_what_has_come_back():
    # A sample is answered first and plans follow, while lines go back and forth.
    respond = LosesSome(set(range(0, 300, 7)))
    # In the same thread, so that plans do come before the end.
    run = run_with(respond, count=300, threads=Threads(Inline(), Inline()))
    assert run.runner.view.plans > 1
    assert sorted(run.answered()) == list(range(300))
    assert max(Counter(sent.index for sent in run.server.sent).values()) == 2
