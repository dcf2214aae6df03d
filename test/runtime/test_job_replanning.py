"""A job's sample goes first; with its answers the rest is planned again."""

from __future__ import annotations

import asyncio
import itertools
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

import pytest
from job_server import (
    ANSWER_TOKENS,
    COST_MODEL,
    FIRST_DEPTH,
    Body,
    Inline,
    Run,
    answer_400,
    chat,
    exam,
    finished,
    planner_job,
    story,
)

from blendserve.batch.executor import BatchLine, LineResult
from blendserve.planner import PlannerConfig, Side, make_plan
from blendserve.planner.plan import PINNED_OUTPUT_TOKENS
from blendserve.runtime import plan_worker
from blendserve.runtime.job_runner import Threads
from blendserve.runtime.plan_worker import PlanWorker
from blendserve.runtime.planner_process import PlannerDied


@pytest.mark.parametrize("pending", [range(100), range(5, 400, 3), range(400)])
@pytest.mark.parametrize("fraction", [0.01, 0.25])  # the larger one has to wait for credits
def test_each_side_is_sent_its_sample_first(pending, fraction):
    lines = chat(400)
    config = PlannerConfig(sample_fraction=fraction)
    plan = make_plan(planner_job([lines[index] for index in pending]), COST_MODEL, config)
    sample: dict[Side, list[int]] = {side: [] for side in Side}
    for position in plan.sample.tolist():
        dense = plan.request_density[position] >= plan.target_density
        sample[Side.LEFT if dense else Side.RIGHT].append(pending[position])
    run = finished(lines, pending, config=config)
    assert run.runner.view.sampled == len(plan.sample)
    for side in Side:
        assert sample[side]
        assert run.sent_on(side)[: len(sample[side])] == sample[side]


def test_the_sample_takes_the_sides_that_its_densities_say():
    # Long prompts that share nothing, with limits that do not say enough about their answers.
    papers = [
        {"prompt": list(range(1000 * n, 1000 * n + 300)), "max_tokens": PINNED_OUTPUT_TOKENS + 1}
        for n in range(100)
    ]
    lines = [papers[n] if n % 2 else story(n) for n in range(100)]
    sample = make_plan(planner_job(lines), COST_MODEL).sample.tolist()
    run = finished(lines)
    sides = {sent.index: sent.tag.side for sent in run.server.sent if sent.tag}
    assert {n: sides[n] for n in sample} == {n: Side.LEFT if n % 2 else Side.RIGHT for n in sample}
    assert {sides[n] for n in sample} == set(Side)


def test_a_sample_that_waits_on_one_side_does_not_hold_up_the_other():
    lines = [exam(n) if n % 4 else story(n) for n in range(400)]
    stories = set(range(0, 400, 4))
    run = Run(lines, config=PlannerConfig(sample_fraction=1.0))
    run.server.takes = lambda index: index not in stories
    asyncio.run(asyncio.wait_for(run.stop_after(300), timeout=30))
    # The answers of exams are short whatever they say, so the stories alone are sampled.
    assert run.runner.view.sampled == len(stories)
    assert set(run.answered()) == set(range(400)) - stories
    assert len(run.sent_on(Side.RIGHT)) == FIRST_DEPTH


@pytest.mark.parametrize(
    ("limit", "sampled"), [(PINNED_OUTPUT_TOKENS, 0), (PINNED_OUTPUT_TOKENS + 1, 8)]
)
def test_lines_whose_answers_must_be_short_need_no_sample(limit, sampled):
    assert finished(chat(100, max_tokens=limit)).runner.view.sampled == sampled


def test_a_sample_larger_than_the_credits_waits_for_them():
    run = finished(chat(400), config=PlannerConfig(sample_fraction=0.25))
    assert run.runner.view.sampled == 100
    assert run.server.overdrawn == []
    assert all(length <= FIRST_DEPTH for length in run.server.longest_queue.values())


@dataclass
class Planned:
    """What one call of the planner was told."""

    observed: dict[int, int]
    exclude: set[int]
    running: dict[int, int]
    sampled: set[int]


@pytest.fixture
def plans(monkeypatch: pytest.MonkeyPatch) -> list[Planned]:
    """The calls of the planner, as they come."""
    calls: list[Planned] = []

    def watched(job, cost_model, config, *, observed, exclude, tree, running, sampled):
        # Only the first plan has to sort the prompts.
        assert (tree is None) == (not calls)
        calls.append(Planned(dict(observed), set(exclude), dict(running), set(sampled)))
        return make_plan(
            job,
            cost_model,
            config,
            observed=observed,
            exclude=exclude,
            tree=tree,
            running=running,
            sampled=sampled,
        )

    monkeypatch.setattr(plan_worker, "make_plan", watched)
    return calls


async def finish_after_the_second_plan(run: Run, lines: Sequence[Body]) -> None:
    """The scheduler takes the sample, and goes on when the second plan is there."""
    sample = set(make_plan(planner_job(lines), COST_MODEL).sample.tolist())
    run.server.takes = sample.__contains__
    finishing = asyncio.ensure_future(run.finish())
    while run.runner.view.plans < 2:
        await asyncio.sleep(0.001)
    run.server.resume()
    await finishing


def test_the_rest_is_planned_again_with_the_lengths_of_the_sample(plans):
    lines = chat(100)
    run = Run(lines)
    asyncio.run(finish_after_the_second_plan(run, lines))

    first, second = plans[:2]
    assert (first.observed, first.exclude) == ({}, set())
    unseen = make_plan(planner_job(lines), COST_MODEL)
    sample = unseen.sample.tolist()
    assert second.observed == dict.fromkeys(sample, ANSWER_TOKENS)
    # What had started, and so kept the engine busy, is not planned a second time.
    sent_before = run.server.indexes[: len(second.exclude)]
    assert set(sent_before) == second.exclude
    assert len(second.exclude) > len(sample)
    assert Counter(run.server.indexes) == Counter(range(100))

    for sent in run.server.sent:
        assert sent.tag is not None
        guess = unseen.estimated_output_tokens[sent.index]
        expected = guess if sent.index in second.exclude else ANSWER_TOKENS
        assert sent.tag.output_tokens == pytest.approx(expected, rel=1e-3)

    # The scheduler is told what is now expected of those that it had already.
    told = {
        update.rid: update for sent in run.server.sent if sent.tag for update in sent.tag.updates
    }
    for sent in run.server.sent:
        if sent.index in second.exclude.difference(sample):
            assert sent.task is not None
            update = told[sent.task.get_name()]
            assert update.output_tokens == pytest.approx(ANSWER_TOKENS, rel=1e-3)


def test_a_plan_is_made_whenever_there_are_so_many_more_answers(plans):
    lines = chat(200)
    run = Run(lines, threads=Threads(Inline(), Inline()))
    asyncio.run(run.finish())
    counts = [len(plan.observed) for plan in plans]
    sample = set(make_plan(planner_job(lines), COST_MODEL).sample.tolist())
    assert counts[0] == 0
    assert sample <= plans[1].observed.keys()
    assert all(later >= 1.4 * before for before, later in itertools.pairwise(counts[1:]))
    assert len(counts) > 3
    assert run.runner.view.plans == len(plans)
    for before, later in itertools.pairwise(plans):
        assert before.observed.items() <= later.observed.items()
        assert before.exclude <= later.exclude


def test_a_plan_is_told_how_far_the_running_requests_have_come(plans):
    lines = chat(100)
    run = Run(lines, latency=4)
    run.server.progress = lambda index: 50 * (index % 3)
    asyncio.run(finish_after_the_second_plan(run, lines))
    second = plans[1]
    in_flight = second.exclude - second.observed.keys()
    assert second.running == {index: 50 * (index % 3) for index in in_flight if index % 3}
    assert second.running


def test_a_job_goes_on_with_its_plan_if_it_cannot_be_planned_again(caplog):
    class FailingPlanner(PlanWorker):
        def plan(self, job_id, news):
            if len(news.started):
                raise PlannerDied("out of memory")
            return super().plan(job_id, news)

    planner = FailingPlanner(COST_MODEL, PlannerConfig())
    run = Run(chat(100), planner=planner, threads=Threads(Inline(), Inline()))
    asyncio.run(run.finish())
    assert sorted(run.answered()) == list(range(100))
    assert run.runner.view.plans == 1
    assert caplog.text.count("batch-1 is not planned again") == 1
    assert "out of memory" in caplog.text


def test_a_line_that_failed_says_nothing_about_the_length_of_others(plans):
    lines = chat(100)
    run = Run(lines, respond=answer_400)
    asyncio.run(finish_after_the_second_plan(run, lines))
    assert {len(plan.observed) for plan in plans} == {0}
    unseen = make_plan(planner_job(lines), COST_MODEL).estimated_output_tokens
    assert {s.tag.output_tokens for s in run.server.sent if s.tag} == set(unseen.tolist())


def test_several_answers_to_a_line_count_as_one_of_their_mean_length(plans):
    def respond(line: BatchLine) -> LineResult:
        body = {"usage": {"completion_tokens": 90}, "choices": [{}, {}, {}]}
        return LineResult(line.index, "rid", status_code=200, body=body)

    lines = chat(100, sequences=4)
    run = Run(lines, respond=respond)
    asyncio.run(finish_after_the_second_plan(run, lines))
    assert set(plans[1].observed.values()) == {30}


def test_without_a_sample_there_is_no_second_plan(plans):
    run = finished(chat(100), config=PlannerConfig(sample_fraction=0.0))
    assert len(plans) == 1
    assert (run.runner.view.sampled, run.runner.view.plans) == (0, 1)
