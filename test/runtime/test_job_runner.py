"""One job against a scheduler that only takes, answers and reports: each line once, to the end."""

from __future__ import annotations

import asyncio
from collections import Counter

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from job_server import (
    COST_MODEL,
    FIRST_DEPTH,
    Body,
    Run,
    answer_200,
    answer_400,
    bodies,
    chat,
    exam,
    finished,
    let_others_run,
    mixed,
    planner_job,
    story,
)

from blendserve.batch.executor import LineResult
from blendserve.planner import Side, make_plan

# -- every line once


@st.composite
def jobs(draw: st.DrawFn) -> tuple[list[Body], list[int]]:
    """Up to a hundred lines, and those of them that are pending."""
    count = draw(st.integers(0, 100))
    lines = draw(st.lists(bodies, min_size=count, max_size=count))
    done = draw(st.sets(st.integers(0, 99), max_size=count))
    return lines, [index for index in range(count) if index not in done]


@settings(deadline=None, database=None, max_examples=60)
@given(
    job=jobs(),
    per_step=st.integers(1, 20),
    latency=st.integers(0, 4),
    refused=st.sampled_from([0, 2, 3]),
)
def test_every_pending_line_is_sent_once_and_answered_once(job, per_step, latency, refused):
    lines, pending = job
    run = finished(
        lines,
        pending,
        per_step=per_step,
        latency=latency,
        refuses=lambda index: bool(refused) and index % refused == 0,
    )
    assert Counter(run.answered()) == Counter(pending)
    assert Counter(run.server.indexes) == Counter(pending)
    assert run.started == run.server.indexes
    assert run.server.overdrawn == []
    assert run.server.aborted == []
    assert (run.runner.view.waiting, run.runner.view.in_flight) == (0, 0)


def test_a_job_without_pending_lines_ends_at_once():
    run = finished(mixed(5), pending=[])
    assert (run.answers, run.server.sent) == ([], [])


def test_only_the_pending_lines_are_run():
    run = finished(mixed(60), pending=range(1, 60, 7))
    assert sorted(run.server.indexes) == list(range(1, 60, 7))


def test_the_answer_of_the_server_is_the_answer_of_the_line():
    run = finished(
        mixed(20), respond=lambda line: answer_400(line) if line.index == 9 else answer_200(line)
    )
    statuses = {result.index: result.status_code for result in run.answers}
    assert statuses == {index: 400 if index == 9 else 200 for index in range(20)}


# -- lines that cannot be planned


def test_a_line_that_cannot_be_planned_goes_untagged_to_the_server_for_its_answer():
    lines = [*chat(30), {"unreadable": True}, *chat(30), {"unreadable": True}]
    run = finished(lines)
    untagged = [sent.index for sent in run.server.sent if sent.tag is None]
    assert untagged == [30, 61]
    assert run.server.indexes[:2] == untagged  # they need no place in the plan
    statuses = {result.index: result.status_code for result in run.answers}
    assert statuses == {index: 400 if index in untagged else 200 for index in range(62)}


def test_a_job_of_such_lines_alone_is_answered():
    run = finished([{"unreadable": True}] * 40)
    assert sorted(run.answered()) == list(range(40))
    assert {sent.tag for sent in run.server.sent} == {None}


# -- several jobs at once


def test_jobs_beside_each_other_share_the_queues_and_are_all_answered():
    async def scenario() -> tuple[Run, Run]:
        exams = Run([exam(n, ignore_eos=True) for n in range(150)])
        stories = Run([story(n, ignore_eos=True) for n in range(90)], beside=exams)
        exams.server.takes = lambda index: False
        running = asyncio.gather(exams.finish(), stories.finish())
        while not exams.runner.view.phase == stories.runner.view.phase == "running":
            await asyncio.sleep(0.001)
        exams.server.resume()
        await running
        return exams, stories

    exams, stories = asyncio.run(scenario())
    assert sorted(exams.answered()) == list(range(150))
    assert sorted(stories.answered()) == list(range(90))
    sent = exams.server.sent
    assert exams.server.overdrawn == []
    for side in Side:
        ranks = [each.tag.rank for each in sent if each.tag and each.tag.side is side]
        assert ranks == list(range(len(ranks)))
    # What filled the queues before the second job was there is one job's; then they are blended.
    both = sent[2 * FIRST_DEPTH :][:100]
    sides = {(len(each.prompt) > 100, each.tag.side) for each in both if each.tag}
    assert sides == {(True, Side.LEFT), (False, Side.RIGHT)}


# -- endings before the end


@pytest.mark.parametrize("answers", [1, 20, 60])
def test_closing_it_aborts_what_is_in_flight_and_sends_no_more(answers):
    async def scenario() -> None:
        run = Run(chat(100), latency=3)
        results = run.runner.run()
        for _ in range(answers):
            await anext(results)
        in_flight, sent = run.server.in_flight(), len(run.server.sent)
        assert in_flight
        await results.aclose()
        assert run.server.aborted == in_flight
        await let_others_run()
        assert len(run.server.sent) == sent

    asyncio.run(scenario())


def test_cancelling_it_aborts_what_is_in_flight():
    async def scenario() -> None:
        run = Run(chat(100))
        run.server.takes = lambda index: run.server.taken.total() < 10
        task = asyncio.ensure_future(run.finish())
        while len(run.answers) < 10:
            await asyncio.sleep(0)
        in_flight = run.server.in_flight()
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        assert in_flight
        assert run.server.aborted == in_flight

    asyncio.run(scenario())


# -- what an operator sees


def test_the_view_counts_the_jobs_tokens_and_ends_with_all_its_work_done():
    lines = mixed(40, ignore_eos=True)
    run = finished(
        lines,
        respond=lambda line: LineResult(
            line.index,
            "rid",
            status_code=200,
            body={"usage": {"completion_tokens": lines[line.index]["max_tokens"]}},
        ),
    )
    view = run.runner.view
    plan = make_plan(planner_job(lines), COST_MODEL)
    assert view.phase == "running"
    assert view.prompt_tokens == sum(len(line["prompt"]) for line in lines) == plan.prompt_tokens
    assert view.unique_tokens == plan.unique_tokens < view.prompt_tokens
    assert (view.left_density, view.right_density) == (None, None)
    assert view.done_work_tokens == pytest.approx(view.total_work_tokens)
