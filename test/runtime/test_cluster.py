"""One plan over several engines: they share the lines, and any of them may go at any time."""

from __future__ import annotations

import asyncio

from cluster_fakes import FakeCluster, FakeEngine, text


def job(count: int, tokens: int = 3, groups: int = 10):
    """Lines of some families, each with a long common prefix; the last token is the line's own."""
    return [
        {"prompt": [n % groups, *range(500, 560), 1_000 + n], "max_tokens": tokens}
        for n in range(count)
    ]


def assert_complete(bodies, results):
    assert sorted(result.index for result in results) == list(range(len(bodies)))
    assert {result.status_code for result in results} == {200}
    assert all(text(result) == str(bodies[result.index]["prompt"][-1]) for result in results)


def test_two_engines_share_a_job_and_each_line_is_answered_once():
    async def scenario() -> None:
        async with FakeCluster([FakeEngine(), FakeEngine()]) as cluster:
            bodies = job(400)
            assert_complete(bodies, await cluster.answers(bodies))
            shares = [engine.answered / 400 for engine in cluster.engines]
            assert sum(shares) == 1
            assert all(0.3 <= share <= 0.7 for share in shares)
            assert all(engine.prompts_read > 0 for engine in cluster.engines)
            assert set(cluster.started.values()) == {1}

    asyncio.run(scenario())
