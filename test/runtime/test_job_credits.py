"""A job sends no more than the scheduler's credits allow, and no less."""

from __future__ import annotations

import asyncio
from contextlib import aclosing

import pytest
from job_server import FIRST_DEPTH, Run, finished, let_others_run, mixed

from blendserve.planner import Side
from blendserve.runtime.credits import Credits


def test_the_scheduler_never_has_more_queued_than_the_credits_allow():
    # Up to four requests a step leave the depth as it is at first.
    run = finished(mixed(200), per_step=4)
    assert run.server.longest_queue == {Side.LEFT: FIRST_DEPTH, Side.RIGHT: FIRST_DEPTH}


def test_a_scheduler_that_takes_more_is_sent_more():
    run = finished(mixed(400), per_step=12)
    assert all(run.server.longest_queue[side] > FIRST_DEPTH for side in Side)
    assert run.server.overdrawn == []


def test_a_scheduler_that_takes_nothing_is_sent_no_more():
    async def scenario() -> None:
        run = Run(mixed(200), latency=0)
        run.server.takes = lambda index: run.server.taken.total() < 5
        async with aclosing(run.runner.run()) as results:
            for _ in range(5):
                await anext(results)
            waiting = asyncio.ensure_future(anext(results))
            await let_others_run()
            assert not waiting.done()
            assert len(run.server.sent) == 2 * FIRST_DEPTH + 5
            assert run.runner.view.in_flight == 2 * FIRST_DEPTH
            assert run.runner.view.waiting == 200 - len(run.server.sent)
            run.server.resume()
            await waiting

    asyncio.run(scenario())


def test_a_line_of_several_sequences_takes_a_credit_for_each():
    run = finished(mixed(100, sequences=4), per_step=1)
    assert run.server.longest_queue == {Side.LEFT: FIRST_DEPTH, Side.RIGHT: FIRST_DEPTH}
    assert run.server.taken.total() == 400


def test_lines_that_never_reach_the_scheduler_do_not_stop_the_job():
    run = finished(mixed(150), refuses=lambda index: True)
    assert sorted(run.answered()) == list(range(150))


def test_after_refused_lines_the_queues_are_as_deep_as_without_them():
    # Some on each side, among the first that fill the queues and for a while after.
    run = finished(
        mixed(400), per_step=4, refuses=lambda index: index < 100 and index % 8 in (2, 5)
    )
    assert run.server.longest_queue == {Side.LEFT: FIRST_DEPTH, Side.RIGHT: FIRST_DEPTH}


@pytest.mark.parametrize("sequences", [1, 4])
def test_a_refused_line_gives_its_credits_back(sequences):
    credits = Credits()
    lines = mixed(200, ignore_eos=True, sequences=sequences)
    finished(lines, credits=credits, refuses=lambda index: index % 2 == 1 and index < 64)
    assert [credits.queued(side) for side in Side] == [0, 0]


def test_refused_lines_of_one_side_do_not_leave_the_rest_to_the_other():
    run = finished(mixed(400, ignore_eos=True), refuses=lambda index: index % 2 == 1 and index < 64)
    exams_on_the_right = [index for index in run.sent_on(Side.RIGHT) if index % 2]
    assert exams_on_the_right == []


@pytest.mark.parametrize("lines", [24, 100])  # some of the credits taken along, and all of them
def test_credits_that_an_aborted_job_took_along_do_not_stop_the_next(lines):
    async def scenario() -> Run:
        credits = Credits()
        aborted = Run(mixed(lines), credits=credits)
        aborted.server.takes = lambda index: aborted.server.taken.total() < 3
        await aborted.stop_after(1)
        assert all(credits.available(side) < FIRST_DEPTH for side in Side)
        following = Run(mixed(100), credits=credits)
        # One scheduler serves both, and counts on.
        following.server.taken = aborted.server.taken
        await following.finish()
        return following

    following = asyncio.run(scenario())
    assert sorted(following.answered()) == list(range(100))
    # Its queues are as deep as if there had been no other.
    assert following.server.longest_queue == {Side.LEFT: FIRST_DEPTH, Side.RIGHT: FIRST_DEPTH}
