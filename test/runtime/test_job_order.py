"""In which order a job's lines are sent, and what their tags say."""

from __future__ import annotations

import asyncio
from collections import Counter
from contextlib import aclosing

import pytest
from job_server import (
    FIRST_DEPTH,
    FakeLines,
    Run,
    chat,
    finished,
    mixed,
)

from blendserve.batch.executor import BatchLine
from blendserve.planner import Side
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
        assert sent.tag.likely_output_tokens == ()


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
    likely = first_story.tag.likely_output_tokens
    assert likely[-1] > likely[0] + 10
