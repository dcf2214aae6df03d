"""In which order a job's lines are sent, and what their tags say."""

from __future__ import annotations

import asyncio
import itertools
from collections import Counter
from contextlib import aclosing

import pytest
from job_server import (
    COST_MODEL,
    FIRST_DEPTH,
    FakeLines,
    Run,
    chat,
    finished,
    mixed,
    planner_job,
)

from blendserve.batch.executor import BatchLine
from blendserve.planner import PlannerConfig, Side, make_plan
from blendserve.runtime import job_runner


def test_compute_heavy_lines_go_to_the_left_and_memory_heavy_ones_to_the_right():
    run = finished(mixed(80, ignore_eos=True))
    first = run.server.sent[: 2 * FIRST_DEPTH]
    sides = {sent.index: sent.tag.side for sent in first if sent.tag}
    assert sides == {index: Side.LEFT if index % 2 else Side.RIGHT for index in sides}
    assert Counter(sides.values()) == {Side.LEFT: FIRST_DEPTH, Side.RIGHT: FIRST_DEPTH}


def test_each_side_is_numbered_in_the_order_in_which_it_is_sent():
    run = finished(mixed(120))
    for side in Side:
        ranks = [sent.tag.rank for sent in run.server.sent if sent.tag and sent.tag.side is side]
        assert ranks == list(range(len(ranks)))
        assert ranks


def test_known_lengths_need_no_sample_and_are_what_the_tags_say():
    run = finished(mixed(40, ignore_eos=True))
    assert (run.runner.view.sampled, run.runner.view.plans) == (0, 1)
    for sent in run.server.sent:
        assert sent.tag is not None
        assert sent.tag.output_tokens == (2 if sent.index % 2 else 4000)
        assert sent.tag.output_deviation == 0


def test_lines_wait_while_answers_are_not_taken(monkeypatch):
    monkeypatch.setattr(job_runner, "_MAX_UNREAD", 10)

    async def scenario() -> None:
        run = Run(mixed(400, ignore_eos=True))
        async with aclosing(run.runner.run()) as results:
            await anext(results)
            while run.server.in_flight():
                await asyncio.sleep(0)
            # Ten answers wait to be taken; what had been sent before was answered, too.
            assert len(run.server.sent) < 100
            taken = 1 + len([result async for result in results])
        assert taken == 400

    asyncio.run(scenario())


def test_a_file_that_can_no_longer_be_read_ends_the_job_with_its_error():
    class TornLines(FakeLines):
        reads = 0

        def read(self, index: int) -> BatchLine:
            self.reads += 1
            if self.reads > 150:  # all were read once, for their prompts
                raise OSError("gone")
            return super().read(index)

    async def scenario() -> None:
        run = Run(chat(100))
        run.runner._lines = TornLines(run.runner._lines.bodies)
        with pytest.raises(OSError, match="gone"):
            await run.finish()
        assert len(run.server.sent) == 50
        assert run.server.in_flight() == []

    asyncio.run(scenario())


def test_a_tag_says_how_far_a_guess_may_be_off():
    run = finished(mixed(40))
    first_story = next(sent for sent in run.server.sent if sent.index % 2 == 0)
    assert first_story.tag is not None
    assert first_story.tag.output_deviation > 10


def test_a_tag_says_what_a_prompt_shares_with_the_one_before_it_on_its_side():
    lines = mixed(120, ignore_eos=True)
    run = finished(lines)
    for side in Side:
        sent = [sent for sent in run.server.sent if sent.tag and sent.tag.side is side]
        assert sent[0].tag.shared_tokens == 0
        for before, after in itertools.pairwise(sent):
            first, second = (lines[each.index]["prompt"] for each in (before, after))
            same = itertools.takewhile(
                lambda pair: pair[0] == pair[1], zip(first, second, strict=False)
            )
            assert after.tag.shared_tokens == len(list(same))
        assert sum(each.tag.shared_tokens for each in sent) > len(sent)


def test_what_follows_a_sample_is_not_known_to_share_anything():
    lines = mixed(200)
    run = finished(lines, config=PlannerConfig(sample_fraction=0.05))
    sample = make_plan(planner_job(lines), COST_MODEL, PlannerConfig(0.05)).sample.tolist()
    for side in Side:
        tags = {
            sent.index: sent.tag for sent in run.server.sent if sent.tag and sent.tag.side is side
        }
        sampled = [index for index in tags if index in sample]
        assert {tags[index].shared_tokens for index in sampled} <= {0}
        following = list(tags)[len(sampled)]
        assert tags[following].shared_tokens == 0
